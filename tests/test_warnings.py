"""A warning points at the user's line that led to it, however deep in the library it is raised."""

from __future__ import annotations

import ast
import linecache
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import sheer
from sheer.errors import SheerWarning, user_level
from tests.task import loader, model, step, trainer


def fit(net: nn.Module | None = None, val_loader: Any = None, step: Any = step, **settings: Any) -> sheer.Result:
    net = model() if net is None else net
    return trainer(**settings).fit(net, step, loader(), val_loader, optimizer=AdamW(net.parameters()))  # the line


def nothing_to_validate_on() -> None:
    fit(max_steps=1, validate_first=True)


def other_hparams() -> None:
    fit(max_steps=1, run_dir="run", checkpoint=True, hparams={"width": 1})
    fit(max_steps=2, run_dir="run", checkpoint=True, hparams={"width": 2}, resume="auto")


def a_damaged_checkpoint() -> None:
    fit(max_steps=4, run_dir="run", checkpoint=sheer.Checkpoint(every_n_steps=2, keep_last=2))
    Path("run/checkpoints/step-00000004/manifest.json").write_text("{")
    fit(max_steps=6, run_dir="run", checkpoint=True, resume="auto")


def a_damaged_log() -> None:
    fit(max_steps=4, run_dir="run", checkpoint=True)
    log = Path("run/metrics.jsonl")
    log.write_text(log.read_text().replace("epoch", "Epoch"))
    fit(max_steps=6, run_dir="run", checkpoint=True, resume="auto")


def a_loss_that_is_nan_in_the_validation() -> None:
    stopping = sheer.EarlyStopping(9, monitor="val/error", mode="min")
    fit(None, loader(), nan_in_validation, max_steps=1, callbacks=[stopping], nonfinite="ignore")


def nan_in_validation(net: nn.Module, batch: Any) -> Any:
    said = step(net, batch)
    return said if net.training else {**said, "error": torch.tensor(float("nan"))}


def a_parameter_without_a_gradient() -> None:
    net = model()
    net.register_parameter("idle", nn.Parameter(torch.zeros(1)))
    fit(net, max_steps=1)


class Failing:
    def start(self, info: Any) -> None:
        raise OSError("no room")

    def log(self, step: int, metrics: Any) -> None: ...

    def close(self) -> None: ...


def a_logger_that_fails() -> None:
    fit(max_steps=1, loggers=[Failing(), sheer.Console(live=False)])


def weights_of_another_model() -> None:
    torch.save({**model().state_dict(), "more": torch.zeros(1)}, "weights.pt")
    sheer.load_weights(model(), "weights.pt", strict=False)  # the line


def an_optimizer_that_is_never_used() -> None:
    net = model()
    run = trainer(max_steps=1).start(net, optimizers={"one": AdamW(net.parameters())})
    for _ in run.steps(loader()):
        pass
    run.finish()  # the line


@pytest.mark.parametrize(
    "lead_to_it",
    [
        nothing_to_validate_on,
        other_hparams,
        a_damaged_checkpoint,
        a_damaged_log,
        a_loss_that_is_nan_in_the_validation,
        a_parameter_without_a_gradient,
        a_logger_that_fails,
        weights_of_another_model,
        an_optimizer_that_is_never_used,
    ],
)
def test_it_points_at_the_line_that_led_to_it(lead_to_it: Callable[[], None]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lead_to_it()
    raised = [one for one in caught if issubclass(one.category, SheerWarning)]
    assert raised
    for one in raised:
        assert one.filename == __file__, f"{one.message} points at {one.filename}:{one.lineno}"
        assert linecache.getline(one.filename, one.lineno).rstrip().endswith("# the line")


def test_what_torch_calls_in_between_is_not_the_users() -> None:
    def level_in(*modules: str) -> int:
        call: Callable[[], int] = user_level
        for module in modules:
            names: dict[str, Any] = {"__name__": module, "inner": call}
            exec("def outer():\n    return inner()", names)
            call = names["outer"]
        return call()

    assert level_in() == 1
    assert level_in("sheer.step") == 2
    assert level_in("sheer.step", "torch.optim.optimizer", "contextlib", "sheer.loop") == 5
    assert level_in("sheer.step", "users_own", "sheer.loop") == 2
    assert level_in("sheer.step", "sheerness", "torchvision") == 2


def test_where_there_is_no_users_line_it_is_the_librarys() -> None:
    import threading

    found: list[int] = []
    thread = threading.Thread(target=exec, args=("put(level())", {"__name__": "sheer.x", "put": found.append, "level": user_level}))  # fmt: skip
    thread.start()
    thread.join()
    assert found == [1]


def test_all_warnings_of_the_library_ask_for_the_line() -> None:
    for path in sorted(Path(sheer.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                where = f"{path.name}:{node.lineno}"
                assert ast.unparse(node.args[1]) == "SheerWarning", where
                assert {k.arg: ast.unparse(k.value) for k in node.keywords} == {"stacklevel": "user_level()"}, where
