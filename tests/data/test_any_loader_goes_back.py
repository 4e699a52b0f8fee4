"""For any loader: a run that goes back from a NaN sees the batches that it would have seen, in their order, but for those that are left out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import sheer
from sheer.progress import Progress
from tests.data.test_any_loader_resumes import KINDS, Case, make, plain
from tests.rollback import progress_of

pytestmark = pytest.mark.usefixtures("in_memory")

EPOCHS = 3
Seen = dict[int, list[Any]]  # of each step its batches


class Stream:
    """Batches without a length, with a state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        first = self.at % 6
        for self.at in range(first + 1, 7):
            yield self.at + torch.rand(3)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Looks:
    """Notes what each step is trained on, and is NaN on some batches."""

    def __init__(self, bad: Sequence[Any], fails: bool) -> None:
        self.bad, self.fails, self.seen = bad, fails, Seen()

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        if self.fails and step in self.seen:  # the run has gone back
            raise InterruptedError
        self.seen = {made: batches for made, batches in self.seen.items() if made < step}

    def __call__(self, net: nn.Module, batch: Any, step: int) -> Tensor:
        self.seen.setdefault(step, []).append(plain(batch))
        return net(torch.ones(1)).sum() * (float("nan") if plain(batch) in self.bad else 1.0)


Left = tuple[Seen, torch.Tensor, int]


def train(folder: str, case: Case, bad: Sequence[Any] = (), fails: bool = False) -> Left:
    """Fit, or go on; return what the steps were trained on, the random state that is left, and how many steps there were."""
    looks, net = Looks(bad, fails), nn.Linear(1, 1)
    sheer.seed_everything(0)
    trainer = sheer.Trainer(
        max_epochs=EPOCHS, device="cpu", nonfinite=sheer.Rollback(max_times=9) if bad else "raise", run_dir=folder,
        log_every_n_steps=3, checkpoint=sheer.Checkpoint(every_n_steps=2), limit_train_batches=case.limit, resume="auto",
        accumulate_grad_batches=case.accumulate, callbacks=[looks], loggers=[sheer.Console(live=False)],
    )  # fmt: skip
    result = trainer.fit(
        net,
        looks,
        Stream() if case.kind == "a stream" else make(case),
        optimizer=SGD(net.parameters(), lr=0.0),
        resume_by_skipping=case.kind == "an iterable",
    )
    return looks.seen, torch.get_rng_state(), result.step


CASES = [
    Case(kind, *how)
    for number, kind in enumerate(KINDS)
    for how in [((0, False, None, 1), (2, False, 4, 1))[number % 2], ((2, True, 4, 1), (0, False, 4, 2))[number // 2 % 2]]
    if (kind, how[1]) not in (("an iterable", True), ("torchdata's", True))  # the latter ends its workers after 5 s
]  # fmt: skip
CASES += [Case("torchdata's", 0, False, None, 1)]
CASES += [Case("an iterable", workers, False, None, 1) for workers in (0, 2)]
CASES += [Case("a stream", 0, False, None, accumulate) for accumulate in (1, 2)]
WHERE = [(case, number % 3) for number, case in enumerate(CASES)]
WHERE += [(Case("a dict", 2, True, None, 1), 0), (Case("shuffled", 2, True, None, 1), 0)]


@pytest.mark.parametrize("number", range(len(WHERE)))
def test_the_order_of_all_others_stays(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, where = WHERE[number]
    clean, random, _ = train("clean", case)
    steps = list(clean.values())
    epoch = len(steps) // EPOCHS
    at = (0, epoch - 1, epoch + 1)[where]
    what, bad = f"{case}, step {at + 1}", [steps[at][-1], steps[at + 2][0]]
    seen, left, made = train("bad", case, bad)
    if (at + 1) % epoch and (
        at + 3
    ) % epoch:  # what is left out at an epoch's end is not read, so nothing is drawn for it
        assert list(seen.values()) == [step for step in steps if not any(batch in bad for batch in step)], what
        assert torch.equal(left, random), what

    if case.workers == 0:  # an error leaves workers to the garbage collector, which waits for them
        with pytest.raises(InterruptedError):
            train("parts", case, bad, fails=True)
        rest, random, _ = train("parts", case, bad)
        assert rest == {step: batches for step, batches in seen.items() if step in rest}, what
        assert torch.equal(left, random), what

    monkeypatch.setattr("sheer.start.Progress", functools.partial(Progress, left_out=progress_of("bad")["left_out"]))
    expected, random, _ = train("without", case)
    assert seen == expected and made == len(expected) < len(steps), what
    assert torch.equal(left, random), what
