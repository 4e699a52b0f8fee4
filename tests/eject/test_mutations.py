"""The comparison finds what is wrong: ejected scripts are broken on purpose, in one place each, and none passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sheer.eject.check import Compared, check
from sheer.eject.eject import eject
from tests.eject.scripts import ON, SCHEDULER, script

pytestmark = pytest.mark.xdist_group("mutations")  # what its tests share is made once

SCRIPT = script(
    f"max_epochs=2, precision='bf16-mixed', gradient_clip_val=0.5, accumulate_grad_batches=2, callbacks=[sheer.EMA(0.9)], {ON}",
    "model, step, train_loader, val_loader, optimizer=optimizer, scheduler=scheduler",
    SCHEDULER,
)
BREAKAGES = [
    ("optimizer.zero_grad()", "pass"),
    ("scheduler.step()", "pass"),
    ("GRADIENT_CLIP_VAL = 0.5", "GRADIENT_CLIP_VAL = 0.4"),
    ("MAX_EPOCHS = 2", "MAX_EPOCHS = 3"),
    ("ACCUMULATE_GRAD_BATCHES = 2", "ACCUMULATE_GRAD_BATCHES = 3"),
    ("LOG_EVERY_N_STEPS = 4", "LOG_EVERY_N_STEPS = 5"),
    ("torch.bfloat16", "torch.float16"),
    ("SeedSequence((self.seed, number))", "SeedSequence((self.seed, number + 1))"),
    ("model.eval()", "model.train()"),
    ("module.training = True", "pass"),
    ("loss * (samples / total)", "loss / 2"),
    ("torch.manual_seed(3)", "torch.manual_seed(4)"),
    ("EMA(0.9)", "EMA(0.8)"),
    ("clip_grads_with_norm_(", "print("),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Compared]:
    folder = tmp_path_factory.mktemp("mutations")
    original = folder / "train.py"
    original.write_text(SCRIPT)
    text = eject(original).text

    def with_change(old: str, new: str) -> Compared:
        assert old in text, f"{old!r} is not in the ejected script any more; break something else"
        made = folder / "train_torch.py"
        made.write_text(text.replace(old, new))
        return check(original, made, [], updates=1000)

    return with_change


def test_without_a_change_there_is_no_difference(
    compared: Callable[[str, str], Compared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compared("MAX_EPOCHS", "MAX_EPOCHS").difference is None


@pytest.mark.parametrize(("old", "new"), BREAKAGES)
def test_every_breakage_is_found(
    old: str, new: str, compared: Callable[[str, str], Compared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compared(old, new).difference is not None
