"""The events of a run: their order, and what a callback must look like."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

import sheer
from sheer.events import EVENTS, events_of
from tests.task import loader, step, trainer


class Recorder:
    """Has all events, and writes down which came, with the step or epoch if it is told."""

    def __init__(self, seen: list[str], name: str = "") -> None:
        for event in EVENTS:
            setattr(self, event, self._recording(seen, f"{name}{event.removeprefix('on_')}"))

    def _recording(self, seen: list[str], event: str) -> Any:
        def record(*arguments: Any) -> None:
            seen.append(f"{event} {arguments[0]}" if arguments and isinstance(arguments[0], int) else event)

        return record


def fitted(*callbacks: Any, step: Any = step, **settings: Any) -> None:
    net = nn.Linear(6, 1)
    settings = {"max_epochs": 2, "log_every_n_steps": 2, "run_dir": "run", **settings}
    trainer(callbacks=callbacks, **settings).fit(
        net, step, loader(50), loader(50), optimizer=SGD(net.parameters(), lr=0.01)
    )


def test_the_order_over_a_run_with_validation_logging_and_saving() -> None:
    """Two epochs of two steps; log points at 2 and 4, a validation after each epoch, saves at steps 2 and 4 and at the end."""
    seen: list[str] = []
    fitted(Recorder(seen), checkpoint=sheer.Checkpoint(every_n_steps=2, asynchronous=False))
    evaluation = ["evaluation_start", "evaluation_end"]
    assert seen == [
        "fit_start",
        *evaluation,  # the try
        "epoch_start 0",
        *["step_start 1", "gradients 1", "update 1", "step_end 1"],
        *["step_start 2", "gradients 2", "update 2", "log 2"],
        *[*evaluation, "validation_end 2", "step_end 2", "epoch_end 0", "save 2"],
        "epoch_start 1",
        *["step_start 3", "gradients 3", "update 3", "step_end 3"],
        *["step_start 4", "gradients 4", "update 4", "log 4"],
        *[*evaluation, "validation_end 4", "step_end 4", "epoch_end 1", "save 4"],
        "fit_end 4",
    ]


def test_callbacks_come_in_the_order_they_were_given_and_ends_of_evaluations_in_reverse() -> None:
    seen: list[str] = []
    fitted(Recorder(seen, "a "), Recorder(seen, "b "), max_steps=1)
    assert [event[0] for event in seen if "evaluation_start" in event] == ["a", "b"] * 2
    assert [event[0] for event in seen if "evaluation_end" in event] == ["b", "a"] * 2
    assert [event[0] for event in seen if "gradients" in event] == ["a", "b"]


def test_an_error_ends_with_the_exception_and_no_end_of_the_fit() -> None:
    seen: list[str] = []

    def bad(net: nn.Module, batch: Any, step: int) -> Any:
        if step == 2:
            raise ZeroDivisionError
        return net(batch[0]).mean()

    with pytest.raises(ZeroDivisionError):
        fitted(Recorder(seen), step=bad, limit_val_batches=0)
    assert seen[-3:] == ["step_end 1", "step_start 2", "exception"]


def test_an_error_in_an_evaluation_still_ends_it() -> None:
    seen: list[str] = []

    def bad(net: nn.Module, batch: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fitted(Recorder(seen), step=bad)
    assert seen == ["fit_start", "evaluation_start", "evaluation_end", "exception"]


@pytest.mark.parametrize("event", ["validation_end", "step_end", "epoch_end"])
def test_a_string_returned_stops_the_run_and_is_the_reason(event: str) -> None:
    net = nn.Linear(6, 1)
    callback = sheer.On(**{event: lambda number, what: f"enough at {event}"})
    outcome = trainer(callbacks=[callback], max_epochs=5).fit(
        net, step, loader(50), loader(50), optimizer=SGD(net.parameters(), lr=0.01)
    )
    assert outcome.stopped_by == f"enough at {event}" and outcome.step == (1 if event == "step_end" else 2)


def test_a_typo_in_an_events_name_is_an_error_with_the_nearest_name() -> None:
    class Typo:
        def on_fit_strat(self) -> None:
            pass

    with pytest.raises(sheer.SettingsError, match=r"Typo\.on_fit_strat is no event.* Did you mean on_fit_start\?"):
        events_of([Typo()])


def test_a_class_and_an_object_without_events_are_refused() -> None:
    with pytest.raises(sheer.SettingsError, match=r"the class EMA; give an object: EMA\(\)"):
        events_of([sheer.EMA])
    with pytest.raises(sheer.SettingsError, match="object has no event"):
        events_of([object()])


def test_an_event_that_a_callback_does_not_have_costs_nothing() -> None:
    events = events_of([sheer.LearningRateMonitor()])
    assert len(events.log) == 1 and events.step_end == events.update == events.step_start == ()


def test_the_state_of_a_callback_that_cannot_be_saved_is_refused_at_the_start() -> None:
    class Strange(Recorder):
        def state_dict(self) -> dict[str, Any]:
            return {"what": object()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    seen: list[str] = []
    with pytest.raises(sheer.RunError, match=r"callbacks/Strange/what.* holds a object"):
        fitted(Strange(seen))
    assert seen == []


def test_the_table_in_the_docs_has_all_events_in_their_order() -> None:
    page = (Path(__file__).parents[1] / "docs" / "events.md").read_text()
    assert tuple(re.findall(r"^\| `(on_\w+)\(", page, re.MULTILINE)) == EVENTS


def test_the_docs_have_a_section_for_each_callback() -> None:
    root = Path(__file__).parents[1]
    sections = re.findall(r"^### (\w+)", (root / "docs" / "events.md").read_text(), re.MULTILINE)
    modules = [path.read_text() for path in (root / "sheer" / "callbacks").glob("[a-z]*.py")]
    classes = [name for text in modules for name in re.findall(r"^class ([A-Z]\w*)", text, re.MULTILINE)]
    assert sorted(sections) == sorted(classes)
    assert all(hasattr(sheer, name) for name in classes)


def test_a_callback_that_fails_at_an_error_does_not_keep_the_loggers_open() -> None:
    closed = []

    class Kept:
        def start(self, info: Any) -> None: ...

        def log(self, step: int, metrics: Any) -> None: ...

        def close(self) -> None:
            closed.append(True)

    class Fails:
        def on_exception(self, error: BaseException) -> None:
            raise RuntimeError("in the callback")

    def bad(net: nn.Module, batch: Any) -> Any:
        if net.training:
            raise ValueError("in the step")
        return step(net, batch)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="in the callback") as caught:
        fitted(Fails(), step=bad, loggers=[Kept()])
    assert isinstance(caught.value.__context__, ValueError)
    assert "In step 1" in caught.value.__context__.__notes__[0]
    assert closed == [True] and signal.getsignal(signal.SIGINT) is before
