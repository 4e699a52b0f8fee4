"""`sheer profile`: what it says of scripts whose time goes to a known place, and what it leaves behind."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sheer import loop, rundir, start
from sheer.cli import app
from sheer.profile.advice import advise
from sheer.profile.phases import COPY, DATA, FORWARD, LOGGING, OPTIMIZER, PHASES, REST, InPhase, Phases, seconds_of
from sheer.profile.report import table_of_phases, typical_seconds, uneven
from sheer.profile.script import Seen, watch_script
from sheer.profile.syncs import MASKED, READ, SyncFinder
from sheer.profile.trace import DeviceTime, device_time_of
from sheer.trainer import Trainer

SCRIPT = """
import time, sys, torch, sheer
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 400

    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.ones(4)

def step(model, batch):
    loss = model(batch).square().mean()
    loss.item()
    return loss

def made():
    model = nn.Linear(4, 1)
    return model, torch.optim.AdamW(model.parameters())

trainer = sheer.Trainer(max_steps=40, log_every_n_steps=2, run_dir="run", resume="auto", device="cpu",
    callbacks=[sheer.LearningRateMonitor()], checkpoint=sheer.Checkpoint(every_n_steps=3, directory="store"), loggers=[sheer.Console(live=False), sheer.CSV()])
model, optimizer = made()
if sys.argv[1:] == ["own"]:
    run = trainer.start(model, optimizers={"adam": optimizer})
    for batch in run.steps(DataLoader(Slow(), batch_size=4)):
        run.update(optimizer, step, batch)
    run.finish()
else:
    trainer.fit(model, step, DataLoader(Slow(), batch_size=4), optimizer=optimizer)
print("behind the training")
"""


def profiled(text: str, *options: str) -> tuple[int, str]:
    """Profile a script by the command; return its status and what it printed."""
    Path("train.py").write_text(textwrap.dedent(text))
    done = CliRunner().invoke(app, ["profile", "train.py", "--warmup", "2", "--steps", "4", *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def share(output: str, phase: str) -> float:
    found = re.search(rf"^{phase} +[0-9.]+ +([0-9.]+)%", output, re.MULTILINE)
    return float(found[1]) if found is not None else -1.0


def test_a_slow_dataset_is_told_and_a_read_value_is_named_with_its_line() -> None:
    status, output = profiled(SCRIPT)
    assert status == 0
    assert share(output, DATA) >= 10
    assert re.search(r"\d\. waiting for data takes \d+% of a step .*num_workers=", output)
    assert f"train.py:16 would wait for a GPU 1x a step, since {READ}: `loss.item()`" in output
    assert all(
        share(output, phase) >= 0 for phase in ("forward", "backward", "optimizer", "logging", "saving", "callbacks")
    )
    assert "behind the training" not in output

    assert not Path("run").exists() and not Path("store").exists()  # where the script would have had its run
    (folder,) = Path("runs/profile").iterdir()
    names = {event["name"] for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {DATA, "forward", "backward", "optimizer"} <= names
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")


def test_workers_are_named_only_where_they_cost_less_than_the_wait() -> None:
    seen, shares = Seen(workers=0), dict.fromkeys(PHASES, 0.0) | {DATA: 0.25, COPY: 0.25, REST: 0.5}
    assert not any("workers" in text for text in advise(seen, shares, 1e-3, None))
    assert all("num_workers=" in text for text in advise(seen, shares, 10e-3, None))


def test_a_loop_of_ones_own_is_profiled_as_well() -> None:
    status, output = profiled(SCRIPT, "own")
    assert status == 0 and share(output, DATA) >= 10
    assert all(share(output, phase) >= 0 for phase in ("forward", "backward", "optimizer", "logging", "saving"))
    assert not Path("run").exists() and "behind the training" not in output


LOGGED = """
class Seen:
    def on_log(self, step, metrics):
        print("logged", step)

model, optimizer = made()
trainer = sheer.Trainer(max_steps=40, log_every_n_steps=4, device="cpu", callbacks=[Seen()], loggers=[], checkpoint=False)
trainer.fit(model, step, [torch.ones(4, 4)] * 40, optimizer=optimizer)
"""


def test_two_in_the_same_second_have_a_folder_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir.time, "strftime", lambda form: "now")
    short = SCRIPT[: SCRIPT.index("trainer = ")] + LOGGED
    for name in ("train-now", "train-now-2"):
        status, output = profiled(short)
        assert status == 0 and f"trace:   runs/profile/{name}/trace.json" in output


def test_a_folder_that_cannot_be_made_is_told_with_status_2() -> None:
    Path("runs").write_text("notes")
    status, output = profiled(SCRIPT)
    assert status == 2 and "for the trace cannot be made: Not a directory." in output
    assert Path("runs").read_text() == "notes"


def test_the_first_log_point_is_made_before_steps_are_timed() -> None:
    script = SCRIPT[: SCRIPT.index("trainer = ")] + LOGGED
    assert re.findall(r"^logged (\d+)$", profiled(script)[1], re.MULTILINE) == ["2", "4", "8"]
    script = script.replace("log_every_n_steps=4", "log_every_n_steps=2")  # it was made
    assert re.findall(r"^logged (\d+)$", profiled(script)[1], re.MULTILINE) == ["2", "4", "6", "8", "10"]


def test_the_loop_is_as_it_was_afterwards() -> None:
    before = [loop.apply, loop.end_step, loop.backward_of, start.events_of, Trainer.fit, Trainer.start]
    profiled(SCRIPT)
    assert [loop.apply, loop.end_step, loop.backward_of, start.events_of, Trainer.fit, Trainer.start] == before


def test_one_step_that_took_far_longer_is_told() -> None:
    steps = [[(FORWARD, 0.0, length)] for length in (1e-3, 9e-3, 1e-3)]
    assert uneven(steps) == ["uneven: the longest step took 9 ms, the median 1 ms (see the picture)"]
    assert uneven(steps[:1]) == []


def test_one_hiccup_is_not_what_a_step_takes_and_what_is_due_now_and_then_counts() -> None:
    long = [0.1, *[1e-3] * 9]
    steps = [[(OPTIMIZER, 0.0, taken), (LOGGING, taken, taken + taken), (DATA, 0.0, taken)] for taken in long]
    typical = typical_seconds(steps)
    assert typical[OPTIMIZER] == typical[DATA] == pytest.approx(1e-3) and typical[LOGGING] == pytest.approx(10.9e-3)
    assert typical_seconds(steps, workers=2)[DATA] == pytest.approx(10.9e-3)  # they bring batches in bursts


def test_the_parts_are_the_whole_step() -> None:
    Path("train.py").write_text(SCRIPT)
    seen = watch_script(Path("train.py"), [], {}, 2, 5, Path("trace.json"))
    assert len(seen.steps) == 5 and seen.recorded == 5
    for step, following in zip(seen.steps, seen.steps[1:], strict=False):
        assert all(one[2] == other[1] for one, other in itertools.pairwise(step))  # without a gap
        assert step[-1][2] == following[0][1]
        assert sum(seconds_of(step).values()) == pytest.approx(step[-1][2] - step[0][1], rel=1e-9)


def test_a_phase_inside_of_another_takes_its_time_from_that() -> None:
    phases = Phases()
    phases.restart()
    with InPhase(phases, OPTIMIZER), InPhase(phases, FORWARD):
        pass
    phases.end_step()
    assert [phase for phase, _, _ in phases.steps[0]] == [REST, OPTIMIZER, FORWARD, OPTIMIZER, REST]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (SCRIPT.replace("max_steps=40", "max_steps=3"), "The run ended after 3 steps"),
        ("print('no training')", "ended without a call of fit or start"),
    ],
)
def test_what_cannot_be_profiled_says_why_with_status_2(script: str, said: str) -> None:
    status, output = profiled(script)
    assert status == 2 and said in output
    assert not list(Path("runs/profile").iterdir())


def test_a_short_run_is_profiled_over_the_steps_that_it_has() -> None:
    status, output = profiled(SCRIPT.replace("max_steps=40", "max_steps=6"))
    assert status == 0 and "3 steps timed, 1 more recorded" in output


def test_an_error_of_the_script_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        profiled(SCRIPT.replace("loss.item()", "1 / 0"))
    assert not list(Path("runs/profile").iterdir())


def test_waits_are_found_wherever_a_value_leaves_the_device() -> None:
    x = torch.tensor([1.0, -2.0])
    finder = SyncFinder(x.device)
    with finder:
        if x.sum() > 0 or float(x[0]) > 0:
            x.cpu()
        x[x > 0]
        x.tolist()
        x * 2  # waits for nothing
    lines = Counter(what for what, file, _ in finder.found.elements() if file == __file__)
    assert lines == {READ: 2, "a tensor is copied to the host": 2, MASKED: 1}


def kernel(name: str, since: float, took: float, category: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": since, "dur": took}


def test_what_the_device_did_is_read_from_a_trace() -> None:
    events = [
        kernel("gemm", 0.0, 10.0),
        kernel("copy", 5.0, 10.0, "gpu_memcpy"),  # beside it, on another stream
        kernel("add", 100.0, 5.0),
        kernel("cudaStreamSynchronize", 0.0, 9.0, "cuda_runtime"),
        kernel("forward", 0.0, 90.0, "gpu_user_annotation"),
    ]
    assert device_time_of(events, 2) == DeviceTime(busy=pytest.approx(10e-6), kernels=1.0, waits=0.5)


def test_advice_for_a_gpu_has_its_reasons_in_numbers() -> None:
    model = nn.Linear(2, 2)
    seen = Seen(device=torch.device("cuda"), workers=2, optimizers=[torch.optim.AdamW(model.parameters())])
    shares = dict.fromkeys(PHASES, 0.0) | {FORWARD: 0.8, OPTIMIZER: 0.2}
    idle = advise(seen, shares, 10e-3, DeviceTime(busy=3e-3, kernels=600, waits=0))
    assert idle[0].startswith("the device is idle 70% of a step, and its 600 kernels are small (5.0 µs each)")
    assert idle[1] == "the optimizer takes 20% of a step (2 ms): AdamW(..., fused=True)"
    busy = advise(seen, shares, 10e-3, DeviceTime(busy=9e-3, kernels=60, waits=0))
    assert busy[0].startswith("the device works 90% of a step, in 32 bits") and "compile=True" in busy[1]
    seen.syncs = Counter({(READ, "train.py", 31): 2})
    first = advise(seen, shares, 10e-3, DeviceTime(busy=9e-3, kernels=60, waits=2))[0]
    assert first.startswith(f"train.py:31 waits for the device 2x a step, since {READ}: return the tensor")
    table = table_of_phases({FORWARD: 8e-3, OPTIMIZER: 2e-3, REST: 0.0}, DeviceTime(3e-3, 600, 1.0))
    assert re.search(r"device idle \(host-bound gaps\) +7\.000 +70\.0%", table)
