"""Disks that run full: named, and what was saved before stays good."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

import sheer
from sheer import RunError
from tests.mistakes.common import contents, finished_run, fit, refused
from tests.task import assert_same, loader, model, step


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """No file can grow above `room` bytes: the write fails in the kernel, as on a full disk, but with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullFrom:
    """The disk is full from a step on."""

    def __init__(self, step: int, room: int = 0) -> None:
        self.step, self.disk = step, full_disk(room)

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        if step == self.step:
            self.disk.__enter__()

    def on_exception(self, error: BaseException) -> None:
        self.disk.__exit__(None, None, None)

    def on_fit_end(self, step: int, model: nn.Module) -> None:
        self.disk.__exit__(None, None, None)


class Silent(sheer.Console):
    """Prints nothing: where the output is a file, it must not grow either."""

    def say(self, line: str) -> None:
        pass


QUIET: dict[str, Any] = {"loggers": [Silent(live=False)]}


def test_a_disk_that_is_full_at_the_start() -> None:
    with full_disk():
        refused(RunError, "The run directory run cannot be written", "make room", run_dir="run", **QUIET)
    assert not Path("run").exists()


def test_a_disk_that_is_full_when_a_run_goes_on_leaves_the_run_as_it_was() -> None:
    before = finished_run()
    with full_disk():
        refused(
            RunError, "The run directory run cannot be written", run_dir="run", resume="auto", max_steps=8,
            checkpoint=sheer.Checkpoint(), **QUIET,
        )  # fmt: skip
    assert contents("run") == before


@pytest.mark.parametrize("room", [100, 3000])
def test_a_disk_that_runs_full_in_a_save_leaves_the_older_checkpoint_and_the_run_goes_on_from_it(room: int) -> None:
    """Whether the tensors do not fit, or they do and the state does not."""
    how: dict[str, Any] = {"checkpoint": sheer.Checkpoint(every_n_steps=2, asynchronous=False), "max_steps": 8, **QUIET}
    whole = model()
    sheer.seed_everything(0)
    fit(net=whole, run_dir="whole", **how)

    net = model()
    sheer.seed_everything(0)
    message = refused(
        RunError, "The checkpoint of step 4 could not be written", "The older ones are as they were: step-00000002",
        "Make room", 'go on with resume="auto"', run_dir="run", callbacks=[FullFrom(4, room)], updates=4, net=net,
        **how,
    )  # fmt: skip
    assert "File too large" in message
    folder = Path("run/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step-00000002"]
    assert (folder / "last" / "manifest.json").is_file()

    net = model()
    sheer.seed_everything(0)
    assert fit(net=net, run_dir="run", resume="auto", **how).step == 8
    assert_same(net.state_dict(), whole.state_dict())


def test_a_save_of_the_same_step_that_fails_leaves_the_one_that_was_there() -> None:
    """One's own loop that ends behind a save is saved again at its end."""
    net = model()
    optimizer = SGD(net.parameters(), lr=0.01)
    saves = sheer.Checkpoint(every_n_steps=2, asynchronous=False)
    made = sheer.Trainer(max_steps=9, run_dir="run", checkpoint=saves, **QUIET)
    run = made.start(net, optimizers={"sgd": optimizer})
    for batch in run.steps(loader()):
        if run.step == 3:
            break
        run.update(optimizer, step, batch)
    before = contents("run/checkpoints")
    with pytest.warns(sheer.SheerWarning, match="JSONL"), pytest.raises(RunError, match="could not be written"):
        with full_disk(100):
            run.finish()
    assert contents("run/checkpoints") == before


class Failing:
    """A logger that cannot write."""

    def __init__(self) -> None:
        self.calls = 0

    def start(self, info: Any) -> None:
        pass

    def log(self, step: int, metrics: Any) -> None:
        self.calls += 1
        Path("/dev/full").write_text("metrics")

    def close(self) -> None:
        pass


def test_a_logger_whose_disk_is_full_is_warned_of_once_and_the_training_goes_on() -> None:
    logger = Failing()
    with pytest.warns(sheer.SheerWarning, match=r"Failing\.log failed, and training goes on: OSError") as caught:
        assert fit(loggers=[logger, Silent(live=False)], log_every_n_steps=1, max_steps=6).step == 6
    assert logger.calls == 6
    assert len([warning for warning in caught if warning.category is sheer.SheerWarning]) == 1


def test_metrics_whose_disk_is_full_do_not_stop_the_next_save() -> None:
    """The lines that did not fit are cut off when the run goes on."""

    class Frees:
        def on_validation_end(self, step: int, metrics: Any) -> None:
            disk.disk.__exit__(None, None, None)

    disk = FullFrom(2)
    with pytest.warns(sheer.SheerWarning, match=r"JSONL\.log failed, and training goes on"):
        result = fit(
            run_dir="run", log_every_n_steps=1, max_steps=4, validate_every_n_steps=3,
            val_loader=loader(32, shuffle=False),
            checkpoint=sheer.Checkpoint(every_n_steps=4), callbacks=[disk, Frees()], **QUIET,
        )  # fmt: skip
    assert result.last is not None and result.last.name == "step-00000004"
