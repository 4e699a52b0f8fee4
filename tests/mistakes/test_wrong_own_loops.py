"""Mistakes in one's own loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import sheer
from sheer import DataError, ModelError, RunError, SettingsError, StepError
from tests.task import loader, loss_step, model, step


def started(net: nn.Module, optimizers: Any, **how: Any) -> sheer.Loop:
    schedulers = how.pop("schedulers", None)
    return sheer.Trainer(max_steps=3, checkpoint=False, **how).start(net, optimizers=optimizers, schedulers=schedulers)


def sgd(net: nn.Module) -> SGD:
    return SGD(net.parameters(), lr=0.1)


def test_optimizers_without_names() -> None:
    net = model()
    for given in ([sgd(net)], sgd(net), {}):
        with pytest.raises(SettingsError, match="optimizers must name each optimizer, as"):
            started(net, given)


def test_schedulers_without_names() -> None:
    net = model()
    optimizer = sgd(net)
    with pytest.raises(SettingsError, match="schedulers must name each by its optimizer, as"):
        started(net, {"sgd": optimizer}, schedulers=StepLR(optimizer, 1))


def test_a_scheduler_of_an_optimizer_that_is_not_there() -> None:
    net = model()
    with pytest.raises(SettingsError, match="which schedulers refers to, has no 'sdg'"):
        started(net, {"sgd": sgd(net)}, schedulers={"sdg": None})


def test_an_update_with_an_optimizer_that_the_run_does_not_know() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with (
        pytest.raises(SettingsError, match="not one of those the run was started with: sgd"),
        started(net, {"sgd": sgd(net)}) as run,
    ):
        for batch in run.steps(loader()):
            run.update(sgd(net), step, batch)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_parameters_that_none_of_several_optimizers_has() -> None:
    net: Any = model()
    with pytest.raises(ModelError, match=r"No optimizer holds 1\.weight, 1\.bias"):
        started(net, {"a": sgd(net[0]), "b": sgd(net[4])})


def test_a_step_without_a_loss() -> None:
    net = model()
    optimizer = sgd(net)
    with pytest.raises(StepError, match="returned None"), started(net, {"sgd": optimizer}) as run:
        for batch in run.steps(loader()):
            run.update(optimizer, lambda net, batch: None, batch)


def test_a_step_bound_to_the_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 1)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.inner(batch[0]).mean()

    net = Net()
    optimizer = sgd(net)
    with pytest.raises(StepError, match="Pass it unbound"), started(net, {"sgd": optimizer}) as run:
        for batch in run.steps(loader()):
            run.update(optimizer, net.training_step, batch)


def test_an_empty_loader() -> None:
    net = model()
    with pytest.raises(DataError, match="The training loader is empty"), started(net, {"sgd": sgd(net)}) as run:
        for _ in run.steps([]):
            pass


def test_no_duration() -> None:
    net = model()
    with pytest.raises(SettingsError, match="Give max_steps, max_epochs or max_time"):
        sheer.Trainer().start(net, optimizers={"sgd": sgd(net)})


def test_a_plateau_schedule_without_a_monitored_metric() -> None:
    net = model()
    optimizer = sgd(net)
    with pytest.raises(SettingsError, match="ReduceLROnPlateau follows the monitored metric"):
        started(net, {"sgd": optimizer}, schedulers={"sgd": ReduceLROnPlateau(optimizer)})


def test_a_monitored_metric_that_the_evaluation_does_not_return() -> None:
    net = model()
    optimizer = sgd(net)
    with (
        pytest.raises(SettingsError, match=r"monitor='val/eror' is no metric.* Did you mean 'val/error'\?"),
        started(net, {"sgd": optimizer}, monitor="val/eror") as run,
    ):
        for batch in run.steps(loader()):
            run.update(optimizer, loss_step, batch)
            run.evaluate(step, loader(32, shuffle=False))
    assert run.step == 1


def test_an_update_outside_of_the_loop() -> None:
    net = model()
    optimizer = sgd(net)
    run = started(net, {"sgd": optimizer})
    batch = next(iter(loader()))
    for use in (
        lambda: run.update(optimizer, step, batch),
        lambda: run.backward(step, batch),
        lambda: run.apply(optimizer),
    ):
        with pytest.raises(RunError, match="belongs inside the loop"):
            use()
    assert run.step == 0
    run.finish()


def test_an_error_in_an_update_is_told_with_its_step_once() -> None:
    def broken(net: nn.Module, batch: Any) -> Any:
        raise ValueError("broken")

    def trained(run: sheer.Loop) -> None:
        for batch in run.steps(loader()):
            run.update(optimizer, step if run.step < 2 else broken, batch)

    net = model()
    optimizer = sgd(net)
    where = ["In step 2; its batch: [float32 [16, 6], float32 [16, 1]]."]
    with pytest.raises(ValueError, match="broken") as caught, started(net, {"sgd": optimizer}) as run:
        trained(run)
    assert caught.value.__notes__ == where
    run = started(net, {"sgd": optimizer})
    with pytest.raises(ValueError, match="broken") as caught:
        trained(run)
    assert caught.value.__notes__ == where
    run.finish()


def test_an_optimizer_that_was_never_used() -> None:
    net: Any = nn.ModuleDict({"d": nn.Linear(6, 1), "g": nn.Linear(6, 1)})
    optimizers = {name: SGD(net[name].parameters(), lr=0.1) for name in "dg"}
    with pytest.warns(sheer.SheerWarning, match="The optimizer 'g' was never used"), started(net, optimizers) as run:
        for batch in run.steps(loader()):
            run.update(optimizers["d"], lambda net, batch: loss_step(net["d"], batch), batch)


def test_a_monitored_metric_without_an_evaluation() -> None:
    net = model()
    optimizer = sgd(net)
    with (
        pytest.warns(sheer.SheerWarning, match="call run.evaluate in the loop"),
        started(net, {"sgd": optimizer}, monitor="val/loss") as run,
    ):
        for batch in run.steps(loader()):
            run.update(optimizer, step, batch)


UNFINISHED = """
import sheer, torch
from tests.task import loader, model, step

net = model()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
run = sheer.Trainer(max_steps=3, run_dir="run").start(net, optimizers={"sgd": optimizer})
for batch in run.steps(loader()):
    run.update(optimizer, step, batch)
    if run.step == 2:
        LEAVE
"""


@pytest.mark.parametrize(("leave", "status", "saved"), [("break", 0, [2]), ("pass", 0, [3]), ("1 / 0", 1, [])])
def test_a_script_that_ends_without_finish(leave: str, status: int, saved: list[int]) -> None:
    Path("train.py").write_text(UNFINISHED.replace("LEAVE", leave))
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); exec(open('train.py').read())"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert ("without run.finish()" in done.stderr) is (status == 0)
    assert [int(path.name[5:]) for path in sorted(Path("run/checkpoints").glob("step-*"))] == saved
    if status == 0:
        assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1, "what was not logged yet is"


def test_a_validation_by_steps_in_a_loop_of_ones_own() -> None:
    net = model()
    with pytest.warns(
        sheer.SheerWarning, match="validate_every_n_steps and validate_first do nothing in a loop of your own"
    ):
        started(net, {"sgd": sgd(net)}, validate_every_n_steps=2).finish()


def test_two_runs_of_one_process_in_one_folder() -> None:
    net = model()
    made = sheer.Trainer(max_steps=3, run_dir="run", resume="auto")
    run = made.start(net, optimizers={"sgd": sgd(net)})
    with pytest.raises(RunError, match=r"or a run of this one that was not finished \(run.finish\(\)\)"):
        made.start(net, optimizers={"sgd": sgd(net)})
    run.finish()
