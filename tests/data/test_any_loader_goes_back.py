"""For any loader: a run that goes back from a NaN sees the batches that it would have seen, in their order, but for those that are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import sheer
from tests.data.test_any_loader_resumes import KINDS, Case, make, plain

EPOCHS = 3
Seen = dict[int, list[Any]]  # of each step its batches


class Looks:
    """Notes what each step is trained on, and is NaN on one of these batches."""

    def __init__(self, bad: Any = None) -> None:
        self.bad, self.seen = bad, Seen()

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        self.seen = {made: batches for made, batches in self.seen.items() if made < step}

    def __call__(self, net: nn.Module, batch: Any, step: int) -> Tensor:
        self.seen.setdefault(step, []).append(plain(batch))
        return net(torch.ones(1)).sum() * (float("nan") if plain(batch) == self.bad else 1.0)


def train(folder: str, case: Case, bad: Any = None) -> tuple[list[Any], torch.Tensor, int]:
    """Fit; return what the steps were trained on, the random state that is left, and how many steps there were."""
    looks, net = Looks(bad), nn.Linear(1, 1)
    sheer.seed_everything(0)
    trainer = sheer.Trainer(
        max_epochs=EPOCHS, device="cpu", nonfinite="raise" if bad is None else sheer.Rollback(max_times=9), run_dir=folder,
        log_every_n_steps=3, checkpoint=sheer.Checkpoint(every_n_steps=2), limit_train_batches=case.limit,
        accumulate_grad_batches=case.accumulate, callbacks=[looks], loggers=[sheer.Console(live=False)],
    )  # fmt: skip
    result = trainer.fit(
        net, looks, make(case), optimizer=SGD(net.parameters(), lr=0.0), resume_by_skipping=case.kind == "an iterable"
    )
    return list(looks.seen.values()), torch.get_rng_state(), result.step


CASES = [
    Case(kind, *how)
    for number, kind in enumerate(KINDS)
    for how in [((0, False, None, 1), (2, False, 4, 1))[number % 2], ((2, True, 4, 1), (0, False, 4, 2))[number // 2 % 2]]
    if (kind, how[1]) != ("an iterable", True)
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_order_of_all_others_stays(number: int) -> None:
    case = CASES[number]
    steps, random, _ = train("clean", case)
    at = (0, len(steps) // EPOCHS - 1, len(steps) // EPOCHS + 1)[number % 3]
    bad = steps[at][-1]
    seen, left, made = train("bad", case, bad)
    expected = [step for step in steps if bad not in step]
    assert seen == expected and made == len(expected) < len(steps), f"{case}, step {at + 1}"
    assert torch.equal(left, random), f"{case}, step {at + 1}"
