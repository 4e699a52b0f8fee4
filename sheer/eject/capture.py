"""Runs a script up to the call that trains, in a process of its own, and writes down what was passed.

Run as `python -m sheer.eject.capture FACTS SCRIPT [ARGUMENTS]`; `capture` does that and reads the facts.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import runpy
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sheer.eject.facts import Facts, Other, Plugin, Span
from sheer.eject.program import Refusal
from sheer.eject.script import Script, span_of

NONE = {
    "fit": ("val_loader", "eval_step", "scheduler", "parallelize"),
    "start": ("train_loader", "schedulers", "total_steps"),
}
REACHED = 86  # exit status of a process that wrote its facts


class Reached(BaseException):
    """Ends the script at its call; no `except Exception` of the script stops it."""


def capture(script: Path, arguments: Sequence[str]) -> Facts:
    """Run a script up to its first call that trains, and return the facts of that call.

    Raises:
        Refusal: the script failed before it, or never came to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "facts.json"
        command = [sys.executable, "-m", "sheer.eject.capture", str(file), str(script), *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, env={**os.environ, "SHEER_EJECT": "1"})
        if done.returncode == REACHED:
            return Facts.from_json(file.read_text())
    if done.returncode:
        raise Refusal(
            f"{script} failed before it came to fit (see above). It must run up to that call; what follows is never run."
        )
    raise Refusal(f"{script} ended without a call of fit or start on a Trainer, so there is no loop to eject.")


class _Observer:
    """Stands for `Trainer.__init__`, `fit` and `start` while a script is captured."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.made: dict[int, tuple[object, str, Span, FrameType]] = {}

    def install(self) -> None:
        """Put the observer in place of the trainer's methods."""
        from sheer import settings
        from sheer.trainer import Trainer

        settings._parallel_on = kept_as_given  # this is one process, and how several are used is to be seen
        make, observer = Trainer.__init__, self

        def observed(trainer: Any, **settings: Any) -> None:
            make(trainer, **settings)
            observer.made[id(trainer)] = (trainer, *_called_from())

        def fit(trainer: Any, *arguments: Any, **named: Any) -> NoReturn:
            given = inspect.signature(fitted).bind(trainer, *arguments, **named).arguments
            observer.reached(trainer, "fit", *_called_from(), given)

        def start(trainer: Any, *arguments: Any, **named: Any) -> _Started:
            given = inspect.signature(started).bind(trainer, *arguments, **named).arguments
            return _Started(observer, trainer, _called_from(), given)

        fitted, started = Trainer.fit, Trainer.start
        Trainer.__init__, Trainer.fit, Trainer.start = observed, fit, start  # type: ignore[method-assign, assignment]

    def reached(
        self, trainer: Any, kind: str, file: str, call: Span, frame: FrameType, arguments: dict[str, Any]
    ) -> NoReturn:
        """Write the facts of a call down, and end the script."""
        _, trainer_file, made, _ = self.made[id(trainer)]
        others = tuple(others_of(file, call, frame))
        facts = facts_of(trainer, kind, arguments, [loader for _, loader in others])
        facts = dataclasses.replace(
            facts,
            file=file,
            call=call,
            trainer_file=trainer_file,
            trainer=made,
            others=tuple(other for other, _ in others),
            arguments=tuple(sys.argv[1:]),
            modules=tuple(modules_with_the_library(Path(file))),
        )
        self.file.write_text(facts.to_json())
        raise Reached


def kept_as_given(parallel: Any, world_size: int) -> Any:
    """Stand for what turns a setting into what it means on so many ranks."""
    return parallel


class _Started:
    """Stands for a run of one's own loop, up to its first step."""

    def __init__(
        self, observer: _Observer, trainer: Any, called: tuple[str, Span, FrameType], arguments: dict[str, Any]
    ) -> None:
        self._observer, self._trainer, self._called, self._arguments = observer, trainer, called, arguments
        self.model, self.optimizers, self.device = arguments["model"], arguments["optimizers"], trainer.device
        self.step = self.epoch = 0

    def __enter__(self) -> _Started:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def steps(self, loader: Any = None, *, resume_by_skipping: bool = False) -> NoReturn:
        """Write the facts of the loop down, and end the script."""
        file, call, _ = self._called
        _, _, frame = _called_from()
        script = Script(Path(file), Path(file).read_text())
        given = {**self._arguments, "train_loader": loader, "resume_by_skipping": resume_by_skipping}
        given |= steps_of(script, script.at(call), frame)
        self._observer.reached(self._trainer, "start", file, call, frame, given)


def steps_of(script: Script, start: ast.Call, frame: FrameType) -> dict[str, Any]:
    """Return the steps that a loop of one's own updates and evaluates with, and what it evaluates on, as the names stand for them now.

    Raises:
        Refusal: one of them is not known before the loop.
    """
    parent = script.parents[id(start)]
    target = parent.targets[0] if isinstance(parent, ast.Assign) else getattr(parent, "optional_vars", None)
    if not isinstance(target, ast.Name):
        raise script.refusal(
            start, "the run needs a name: write run = trainer.start(...), or `with trainer.start(...) as run:`."
        )
    calls = [node for node in ast.walk(script.function_of(start)) if isinstance(node, ast.Call)]
    found: dict[str, Any] = {"steps": [], "eval_steps": [], "val_loaders": [], "own_batches": False}
    yielded = {ast.unparse(node.target) for node in ast.walk(script.tree) if isinstance(node, ast.For)}
    for call in (
        call for call in calls if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == target.id
    ):
        kind = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        names = {
            "update": ("optimizer", "step", "batch"),
            "backward": ("step", "batch", "optimizer"),
            "evaluate": ("step", "loader"),
        }
        given = dict(zip(names.get(kind, ()), call.args, strict=False)) | {
            k.arg: k.value for k in call.keywords if k.arg
        }
        if kind not in names:
            continue
        step = looked_up(given.get("step"), frame)
        if step is None:
            raise script.refusal(call, "the step of this call is not known before the loop. Define it above.")
        found["eval_steps" if kind == "evaluate" else "steps"].append(step)
        if kind == "evaluate":
            found["val_loaders"].append(looked_up(given.get("loader"), frame))
        elif ast.unparse(given["batch"]) not in yielded:
            found["own_batches"] = True
    return found


def others_of(file: str, call: Span, frame: FrameType) -> Iterator[tuple[Other, Any]]:
    """Yield the later calls of `test`, `validate` and `predict` in the same function, each with its loader.

    The names that stand for their steps and loaders are looked up where the script was stopped; a loader that is made later is None.
    """
    from sheer.build import takes_step_number

    script = Script(Path(file), Path(file).read_text())
    name = ast.unparse(script.at(call).func).rpartition(".")[0]
    calls = [node for node in ast.walk(script.function_of(script.at(call))) if isinstance(node, ast.Call)]
    for node in (
        node for node in calls if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == name
    ):
        kind = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if kind not in ("test", "validate", "predict"):
            continue
        given = dict(zip(("model", "step", "loader"), node.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        step = looked_up(given.get("step"), frame)
        if step is None:
            raise script.refusal(node, "the step of this call is not known before fit is called. Define it above.")
        yield Other(span_of(node), kind, takes_step_number(step)), looked_up(given.get("loader"), frame)


def looked_up(node: ast.expr | None, frame: FrameType) -> Any:
    """Return what a name, or an attribute of one, stands for in a frame; None for all else, and for what is not there yet."""
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    return getattr(looked_up(node.value, frame), node.attr, None) if isinstance(node, ast.Attribute) else None


def modules_with_the_library(script: Path) -> Iterator[str]:
    """Yield the modules beside a script, and below, that import the library: they stay imported, so the ejected script would need it."""
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.suffix != ".py" or script.parent not in file.parents or file == script:
            continue
        if "site-packages" in file.parts or name.split(".")[0] == "sheer":
            continue
        found = Script(file, file.read_text())
        for node in ast.walk(found.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "sheer" for name in names):
                yield f"{file}, line {getattr(node, 'lineno', 1)}"


def _called_from() -> tuple[str, Span, FrameType]:
    """Return the file and the place of the innermost call that is not in the library, and its frame."""
    own = str(Path(__file__).resolve().parent.parent)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(Path(frame.f_code.co_filename).resolve()).startswith(own):
        frame = frame.f_back
    assert frame is not None
    positions = inspect.getframeinfo(frame).positions
    assert positions is not None and positions.lineno is not None
    span = Span(positions.lineno, positions.col_offset or 0, positions.end_lineno or 0, positions.end_col_offset or 0)
    return str(Path(frame.f_code.co_filename).resolve()), span, frame


def facts_of(trainer: Any, kind: str, arguments: dict[str, Any], more_loaders: list[Any]) -> Facts:
    """Return what matters of a trainer and the arguments of a call; where they stand is put in by the caller."""
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

    from sheer.build import takes_step_number
    from sheer.data.choose import make_source
    from sheer.events import named
    from sheer.run import tensors_of

    model, loader, val_loader = (arguments.get(name) for name in ("model", "train_loader", "val_loader"))
    optimizers = list(arguments.get("optimizers", {"optimizer": arguments.get("optimizer")}).values())
    schedulers = list((arguments.get("schedulers", {"scheduler": arguments.get("scheduler")}) or {}).values())
    steps = {
        "step": arguments.get("steps", [arguments.get("step")]),
        "eval_step": arguments.get("eval_steps", [arguments.get("eval_step")]),
    }
    source = make_source(loader, seed=0, device=trainer.device) if loader is not None else None
    evaluated = [each for each in values_of(val_loader) if each is not None]
    evaluated += [each for part in (*more_loaders, *arguments.get("val_loaders", [])) for each in values_of(part)]
    loaders = [*values_of(loader), *evaluated] if loader is not None else evaluated
    structures = {structure_of(each) for each in loaders}
    callbacks = list(trainer.plugins.callbacks)
    labels = labels_of([*callbacks, *trainer.plugins.loggers])
    state_names = {
        id(each): name for group in (callbacks, trainer.plugins.loggers) for name, each in named(group).items()
    }
    return Facts(
        file="",
        call=Span(0, 0, 0, 0),
        trainer_file="",
        trainer=Span(0, 0, 0, 0),
        kind=kind,
        settings=dataclasses.asdict(trainer.settings),
        callbacks=tuple(_plugin(c, labels.pop(0), state_names.get(id(c), "")) for c in callbacks),
        loggers=tuple(
            _plugin(logger, labels.pop(0), state_names.get(id(logger), "")) for logger in trainer.plugins.loggers
        ),
        none=tuple(name for name in NONE[kind] if arguments.get(name) is None),
        functions=tuple(
            what
            for what, made, kinds in (
                ("optimizer", optimizers, (Optimizer,)),
                ("scheduler", schedulers, (LRScheduler, ReduceLROnPlateau)),
            )
            if alike([not isinstance(each, kinds) for each in made if each is not None], what)
        ),
        plateau=any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers),
        numbered=tuple(
            name
            for name, own in steps.items()
            if alike([takes_step_number(step, model=model) for step in own if step is not None], name)
        ),
        skips=bool(arguments.get("resume_by_skipping")),
        is_abstract=model is not None and is_abstract(model),
        is_training=model is not None and model.training,
        has_hparams=trainer.plugins.hparams is not None,
        parallel=parallel_of(trainer.settings.parallel),
        has_extra=model is None or len(tensors_of(model)) != len(model.state_dict()),
        has_buffers=model is not None and any(True for _ in model.buffers()),
        stops=tuple(
            event
            for event in ("validation_end", "step_end", "epoch_end")
            if any(may_stop(getattr(callback, f"on_{event}", None)) for callback in callbacks)
        ),
        stops_alone=next((type(c).__name__ for c in callbacks if may_stop(getattr(c, "on_step_end", None))), ""),
        refused_on_ranks=refused_on_ranks(model, evaluated, arguments.get("parallelize")),
        plain_data=(plain_data := is_plain_data(loader, type(source).__name__, trainer.settings)),
        reads=tuple(reads_of(loader)) if plain_data else (),
        batch=structures.pop() if len(structures) == 1 else "",
        own_batches=bool(arguments.get("own_batches")),
        returns="Mapping" if all(returns_mapping(s) for own in steps.values() for s in own if s is not None) else "",
        uses=("computed",) if keeps_metrics() else (),
        total_steps=total_steps(trainer, loader) if loader is not None else None,
        val_names=tuple(val_loader) if isinstance(val_loader, dict) else None,
    )


def parallel_of(given: Any) -> dict[str, Any] | None:
    """Return how several ranks are used; None where the script leaves it to their number, or is for one process."""
    from sheer.settings import Parallel

    words = {"ddp": Parallel(dp_replicate=-1, dp_shard=1), "fsdp": Parallel()}
    meant = words.get(given) if isinstance(given, str) else given
    return dataclasses.asdict(meant) if meant is not None else None


def refused_on_ranks(model: Any, evaluated: list[Any], parallelize: Any) -> str:
    """Return which of the objects that were passed has no plain form on several ranks, and what to do."""
    from torch.utils.data import BatchSampler, SequentialSampler

    if callable(parallelize):
        return "parallelize is a function. Pass a plan, or call it behind what divides the model, once the script is ejected."
    if is_abstract(model):
        return "the model is on the meta device. Build it on the CPU."
    for loader in evaluated:
        sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        if type(sampler) is not SequentialSampler or type(batches) is not BatchSampler or structure_of(loader) == "":
            return (
                "a loader to validate on is another than DataLoader(dataset, batch_size=...), with batches of tensors."
            )
    return ""


def is_abstract(model: Any) -> bool:
    """Whether some of a model is on the meta device, and gets its values when training starts."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def alike(answers: list[bool], what: str) -> bool:
    """Return the one answer that holds for all; False where there is nothing to ask.

    Raises:
        Refusal: some are of one kind, some of another.
    """
    if len(set(answers)) > 1:
        raise Refusal(
            f"Some {what}s of this loop are functions of another kind than the others. Write all {what}s the same way."
        )
    return bool(answers and answers[0])


def total_steps(trainer: Any, loader: Any) -> int | None:
    """Return how many steps a run will make, where that is known."""
    from sheer.build import make_compute
    from sheer.start import count_steps, training_data

    cfg = trainer.settings
    return count_steps(cfg, training_data(cfg, make_compute(cfg.precision, trainer.device), None, loader, True))


def values_of(loaders: Any) -> list[Any]:
    """Return loaders one by one."""
    return list(loaders.values()) if isinstance(loaders, dict) else [loaders]


def structure_of(loader: Any) -> str:
    """Return what the batches of a loader are: a "list", "tuple" or "dict" of tensors, a "tensor", or "" for all else."""
    from torch import Tensor
    from torch.utils.data import DataLoader, IterableDataset

    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return ""
    batch = loader.collate_fn([loader.dataset[0]])
    parts = batch.values() if type(batch) is dict else batch if type(batch) in (list, tuple) else [batch]
    if not all(isinstance(part, Tensor) and part.dim() > 0 for part in parts) or not parts:
        return ""
    return "tensor" if isinstance(batch, Tensor) else type(batch).__name__


def is_plain_data(loader: Any, source: str, settings: Any) -> bool:
    """Whether a plain twin reads a training loader as the library does: one in its default order, with the common options."""
    from torch.utils.data import RandomSampler, SequentialSampler

    from sheer.data.order import INDEXED_ABOVE

    return (
        source == "GlobalOrderSource"
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
        and loader.generator is getattr(loader.sampler, "generator", None) is None
        and loader.timeout == 0
        and loader.multiprocessing_context is None
        and loader.batch_size is not None
        and len(loader.dataset) <= INDEXED_ABOVE
        and settings.limit_train_batches is None
        and not settings.overfit_batches
        and not settings.precision.endswith("64-true")
        and not settings.precision.endswith("bf16-true")
    )


def reads_of(loader: Any) -> Iterator[str]:
    """Yield what a plain twin need know of a training loader."""
    from torch.utils.data import RandomSampler, Subset

    if type(loader.sampler) is RandomSampler:
        yield "shuffled"
    if loader.num_workers > 0:
        yield "workers"
        if loader.persistent_workers:
            yield "persistent"
        if hasattr(loader.dataset, "__getitems__") and not isinstance(loader.dataset, Subset):
            yield "together"


def returns_mapping(step: Any) -> bool:
    """Whether a step function is seen to return a dict: each of its `return`s has one written out."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(step)))
    except (OSError, TypeError, SyntaxError):
        return False
    returned = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return bool(returned) and all(isinstance(node.value, ast.Dict) for node in returned)


def may_stop(event: Any) -> bool:
    """Whether a callback's event may return something; where its source cannot be read, it may."""
    if event is None:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(event)))
    except (OSError, TypeError, SyntaxError):
        return True
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return any(
        value is not None and not (isinstance(value, ast.Constant) and value.value is None) for value in returned
    )


def keeps_metrics() -> bool:
    """Whether a step may return an object that is a metric: those of torchmetrics, or of a class of the script's own."""
    own = vars(sys.modules["__main__"]).values()
    kept = [value for value in own if isinstance(value, type) and hasattr(value, "compute") and hasattr(value, "reset")]
    return "torchmetrics" in sys.modules or bool(kept)


def labels_of(objects: list[Any]) -> list[str]:
    """Return a variable's name for each object: that of its class."""
    labels: list[str] = []
    for value in objects:
        label = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(value).__name__.strip("_")).lower()
        if label in sys.stdlib_module_names or label in sys.modules:
            label += "_" if label.endswith("logger") else "_logger"
        labels.append(label if label not in labels else f"{label}_{len(labels) + 1}")
    return labels


def _plugin(value: object, label: str, state_name: str) -> Plugin:
    from sheer.events import EVENTS

    return Plugin(
        type(value).__name__,
        type(value).__module__,
        tuple(event.removeprefix("on_") for event in EVENTS if hasattr(value, event)),
        hasattr(value, "state_dict") and hasattr(value, "load_state_dict"),
        hasattr(value, "averages"),
        type(value).__module__.split(".")[0] == "sheer",
        label,
        state_name,
    )


def main(file: str, script: str, *arguments: str) -> int:
    """Run a script up to its call; the facts go to `file`."""
    _Observer(Path(file)).install()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except Reached:
        return REACHED
    return 0


if __name__ == "__main__":
    from sheer.eject.capture import main as captured_main

    status = captured_main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # neither workers nor exit handlers of the script are to run
