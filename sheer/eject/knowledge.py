"""What the ejector knows of the library: what a script's settings and objects decide, and which parts have plain twins."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sheer.eject.drop import Needless
from sheer.eject.expressions import parsed
from sheer.eject.facts import Facts, Plugin
from sheer.eject.fold import Known
from sheer.eject.ranks import (
    ALONE,
    ANSWERS_ALONE,
    HOLDERS,
    STEPPERS,
    Answer,
    answers_together,
    known_together,
    needless_together,
    twins_together,
)
from sheer.events import EVENTS
from sheer.settings import Checkpoint, Settings

RECORDS = (
    "Plugins", "Compute", "Evaluation", "Events", "RunInfo", "PlainLength", "Run", "Progress", "Settings", "PlainStepBatch", "PlainRanks",
)  # fmt: skip
INPUT_ERRORS = frozenset(
    {"unknown_name", "SettingsError", "StepError", "ModelError", "DataError", "MissingPackageError"}
)
CHECKS = frozenset(
    {
        "check_first_gradients", "refuse_closure", "refuse_other_schedulers", "refuse_another_optimizer", "refuse_differences", "refuse_other_run", "forget_copies", "note_changes", "warn_of_changes", "prepare_memory", "tell_of_save", "run.saver.open", "agree_on_parts", "collect_if_due", "report_recompilations", "run.metrics.send", "run.console.say", "run.console.expect", "let_validations_be_left", "remember",
        "run.loggers.log_media",
    }
)  # fmt: skip

# Definitions, and what an ejected script gets in their place.
TWINS = {
    "Metrics": "PlainMetrics",
    "seed_everything": "plain_seed_everything",
    "set_random_state": "plain_set_random_state",
    "eval_mode": "plain_eval_mode",
    "StopSignals": "PlainStopSignals",
    "Watch": "PlainWatched",
    "leave_if_told": "plain_leave",
    "counted_batches": "plain_counted",
    "save_and_tell": "plain_save_and_tell",
    "read_manifest": "plain_manifest",
    "stored_in": "plain_stored",
    "read_shared_state": "plain_state",
    "load_weights": "plain_load_weights",
    "optimizer_state": "plain_optimizer_state",
    "check_weights": "plain_check_weights",
    "is_among_best": "plain_is_among_best",
    "open_data": "plain_open_data",
    "encode": "plain_encode",
    "decode": "plain_decode",
    "Session": "plain_session",
    "Loggers": "PlainLoggers",
}


def constant_name(name: str) -> str:
    """Return the name of the constant for a setting: `checkpoint.every_n_steps` becomes CHECKPOINT_EVERY_N_STEPS."""
    return name.replace("checkpoint.keep", "keep").replace(".", "_").upper()


@dataclass(frozen=True)
class Knowledge:
    """What specialising starts from."""

    known: Known
    twins: Mapping[str, str]
    needless: Needless
    settings: Mapping[str, Any] = field(default_factory=dict)  # by the names of their constants


def absent_in_run(facts: Facts) -> dict[str, str]:
    """Return what the fields of a run hold that nothing was given for."""
    there = {event for callback in facts.callbacks for event in callback.events}
    scheduled = not {"scheduler", "schedulers"} & set(facts.none)
    empty = {
        "scaler": ("None", facts.settings["precision"] == "16-mixed"),
        "schedulers": ("{}", scheduled and not facts.plateau),
        "plateaus": ("{}", facts.plateau),
        "callbacks": ("{}", any(callback.has_state for callback in facts.callbacks)),
        "averaging": ("None", any(callback.averages for callback in facts.callbacks)),
        "loggers.members": ("()", bool(facts.loggers)),
        "compute.autocast": ("nullcontext()", facts.settings["precision"].endswith("-mixed")),
        "told": ("None", False),
        "ends_owed": ("False", False),
        "rewind": ("None", False),
        "compute.dtype": ("None", facts.settings["precision"] in ("bf16-true", "64-true")),
    }
    empty["info.settings"] = ("{}", False)
    absent = {name: value for name, (value, given) in empty.items() if not given}
    return absent | {
        f"events.{event.removeprefix('on_')}": "()" for event in EVENTS if event.removeprefix("on_") not in there
    }


def argument_name(setting: str) -> str:
    """Return the name of the argument for a setting that the script computes."""
    return "folder" if setting == "run_dir" else setting.replace("checkpoint.keep", "keep").replace(".", "_")


def marked(label: str) -> str:
    """Return the name that an object of the script has while its call is specialised: no local of the library's is called so."""
    return f"{label}__given"


def knowledge_of(
    facts: Facts, library_checks: frozenset[str], tables: Mapping[str, ast.Dict], kept: Sequence[str]
) -> Knowledge:
    """Return what a script's settings and objects decide; `kept` names the settings that it computes."""
    values, settings = settings_of(facts, kept)
    saves = facts.settings["checkpoint"] is not None
    present = {f"cfg.{name}" for name in [*values, *kept, *map(argument_name, kept)]}
    plain_metrics = "computed" not in facts.uses
    answers = answers_of(facts)
    absent = {"Rollback", "Image", "Text", "Figure"}  # runs with them are refused
    absent |= {"Computed"} if "computed" not in facts.uses else set()
    absent |= {"Mean"} if "Mean" not in facts.uses else set()
    absent |= set() if facts.plateau else {"ReduceLROnPlateau"}
    always = {"Optimizer"} | ({"ReduceLROnPlateau"} if facts.plateau else set())
    kinds = {"loss": "Tensor"} if "Mean" not in facts.uses else {}
    if facts.returns:
        kinds["output"] = facts.returns
    calls = CHECKS | library_checks | ({"materialise"} if not facts.is_abstract else set())
    calls |= {"run.metrics.in_step.clear"} if plain_metrics else frozenset()
    known: dict[str, ast.expr] = {f"cfg.{name}": value for name, value in values.items()}
    known |= {f"info.settings.{name}": value for name, value in values.items()}  # as what callbacks are told has them
    known["plugins.callbacks"] = ast.Tuple([ast.Name(marked(c.label), ast.Load()) for c in facts.callbacks], ast.Load())
    known["plugins.loggers"] = ast.Tuple([ast.Name(marked(c.label), ast.Load()) for c in facts.loggers], ast.Load())
    known["plugins.hparams"] = ast.Name(marked("hparams"), ast.Load()) if facts.has_hparams else ast.Constant(None)
    if not facts.skips:
        known["resume_by_skipping"] = ast.Constant(False)
    if facts.is_training:
        known["model.training"] = ast.Constant(True)
    for holder in ("run", "self.run"):
        known[f"{holder}.loggers.members"] = parsed(f"{holder}.loggers")
        known[f"{holder}.saver.writing"] = ast.Constant(None)
        known[f"{holder}.progress.owes_validation"] = ast.Constant(False)  # `plain_state` refuses such a checkpoint
        known |= {f"{holder}.{name}": parsed(value) for name, value in absent_in_run(facts).items()}
    known |= {
        name: parsed(value) for name, value in absent_in_run(facts).items() if name.startswith(("events.", "compute."))
    }
    known |= {name: ast.Constant(None) for name in (*facts.none, "progress.micro_batch_size")}
    known |= ALONE if facts.parallel is None else known_together(facts.parallel)
    if "monitor" not in kept:
        known |= {f"info.{name}": values[name] for name in ("monitor", "monitor_mode")}
    if facts.settings["checkpoint"] is None:
        known |= {name: ast.Constant(None) for name in ("signals.received", "self.signals.received")}
        calls |= {"leave_if_told"}
    present |= {
        *(["cfg.checkpoint"] if saves else []),
        "run.data",
        "data",
        "train.steps_per_epoch",
        "data.steps_per_epoch",
        *(n for n in ("val_loader", "scheduler", "make_scheduler", "make_scheduler()") if n not in facts.none),
    }
    if facts.parallel is not None:
        present |= {*HOLDERS, *STEPPERS}
        calls |= needless_together(facts, facts.parallel)
    if facts.kind == "start":
        present -= {"run.data"}
    if facts.kind == "start" and "train_loader" in facts.none:
        known |= {"self.run.data": ast.Constant(None), "run.data": ast.Constant(None), "data": ast.Constant(None)}
        present -= {"data"}
    if facts.plain_data and facts.settings["checkpoint"] is None:
        present |= {"run.data"}
    return Knowledge(
        Known(known, frozenset(present), frozenset(absent), frozenset(always), answers, settings, kinds, tables),
        {name: twin for name, twin in TWINS.items() if plain_metrics or name != "Metrics"}
        | (twins_together(facts.parallel) if facts.parallel is not None else {})
        | batch_twins(facts)
        | {"load_model": "plain_load_model" if facts.has_extra else "plain_load_tensors"}
        | ({"TensorBoard": "PlainTensorBoard"} if facts.plain_board else {})
        | data_twins(facts),
        Needless(frozenset(calls), frozenset({"_Place"}), INPUT_ERRORS, frozenset({"torch.OutOfMemoryError"})),
        settings,
    )


def data_twins(facts: Facts) -> dict[str, str]:
    """Return what stands for the training data."""
    twins = {"PlainSeeded": "PlainSeededTogether"} if "together" in facts.reads else {}
    if "workers" in facts.reads:
        twins |= {"PlainData": "PlainDataOfWorkers", "plain_epochs": "plain_epochs_of_workers"}
    if "train_loader" in facts.none:
        return twins | {"TrainingData": "PlainNoData"}
    if not facts.plain_data:
        return twins
    kept = facts.settings["checkpoint"] is not None or facts.settings["resume"] is not None
    return twins | {"TrainingData": "PlainSteps" if facts.kind == "start" else "PlainData" if kept else "PlainLength"}


def converts(facts: Facts) -> bool:
    """Whether batches are converted to another precision."""
    return facts.settings["precision"] in ("bf16-true", "64-true")


def batch_twins(facts: Facts) -> dict[str, str]:
    """Return what moves and counts batches of the structure that the loader gives."""
    if not facts.batch or converts(facts):
        return {}
    counts = {} if facts.own_batches else {"count_samples": f"size_of_{facts.batch}"}
    return {"move": f"moved_{facts.batch}", **counts}


def settings_of(facts: Facts, kept: Sequence[str]) -> tuple[dict[str, ast.expr], dict[str, Any]]:
    """Return what stands for each setting, and the values of the constants among them; those in `kept` come from the script."""
    values: dict[str, ast.expr] = {}
    constants: dict[str, Any] = {}
    flat = {
        f.name: facts.settings[f.name] for f in dataclasses.fields(Settings) if f.name not in ("checkpoint", "parallel")
    }
    saves = facts.settings["checkpoint"]
    values["checkpoint"] = ast.Constant(None)
    if saves is not None:
        flat |= {f"checkpoint.{f.name}": saves[f.name] for f in dataclasses.fields(Checkpoint)}
        del values["checkpoint"]
    for name, value in flat.items():
        if name in kept:
            if argument_name(name) != name:
                values[name] = parsed(f"cfg.{argument_name(name)}")
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and name != "fast_dev_run"
        is_off = value in (0, 1) and name in ("overfit_batches", "accumulate_grad_batches", "checkpoint.keep_best")
        if (is_number and not is_off) or (
            (isinstance(value, str) and name in ("monitor", "run_dir"))
            or (name == "resume" and value not in (None, "auto"))
        ):
            constants[constant_name(name)] = value
            values[name] = ast.Name(constant_name(name), ast.Load())
        else:
            values[name] = ast.Constant(value)
    return values, constants


def answers_of(facts: Facts) -> dict[str, Answer]:
    """Return what some calls give, as expressions."""
    events = {
        event: ", ".join(marked(c.label) for c in facts.callbacks if event in c.events)
        for event in dict.fromkeys(event for c in facts.callbacks for event in c.events)
    }
    shown = ", ".join(f"{event}=({labels},)" for event, labels in events.items())
    loggers = "".join(f"{marked(logger.label)}, " for logger in facts.loggers)
    places = ["compute.device", "compute.dtype"] if converts(facts) else ["compute.device"]
    answers: dict[str, Answer] = {
        "shuffles": lambda call: ast.Constant("shuffled" in facts.reads),
        "persists": lambda call: ast.Constant("persistent" in facts.reads),
        "takes_step_number": lambda call: ast.Constant(
            ("eval_step" if len(call.args) > 1 and "eval_step" not in facts.none else "step") in facts.numbered
        ),
        "events_of": lambda call: parsed(f"Events({shown})"),
        "holds_means": lambda call: None if "Mean" in facts.uses else ast.Constant(False),
        "end_by_callbacks": lambda call: ast.Constant(bool(facts.stops)),
        "end_anywhere": lambda call: ast.Constant(bool({"step_end", "epoch_end"} & set(facts.stops))),
        "user_level": lambda call: ast.Constant(2),  # there is no library to look beyond
        "starts_anew": lambda call: ast.Constant(False),  # no object of a script was in another run
        "named": lambda call: named_of(facts, call.args[0]),
        "taking_back": lambda call: named_of(facts, call.args[0], [c for c in facts.loggers if facts.reopens(c)]),
        "as_mapping": lambda call: None if facts.has_hparams else parsed("{}"),
        "choose_run_dir": lambda call: chosen_folder(facts),
        "find_checkpoint": lambda call: found_checkpoint(facts, call),
        "saver_of": lambda call: ast.Constant(None),
        "state_before": lambda call: ast.Constant(None),
        "run.saver.pointed_path": lambda call: parsed(f"linked(run.checkpoints / {ast.unparse(call.args[0])})"),
        "run_record": lambda call: parsed("{'id': run_id}"),
        "dataclasses.asdict": lambda call: parsed("{}") if ast.unparse(call.args[0]) == "cfg" else None,
        "loggers_of": lambda call: parsed(
            f"({loggers})" if facts.parallel is None or not loggers else f"({loggers}) if ranks.rank == 0 else ()"
        ),
        "console_of": lambda call: ast.Constant(None),
        "run.loggers.log": lambda call: ast.Call(parsed("plain_log"), [parsed("run"), *call.args], []),
        "run.console.log": lambda call: ast.Call(parsed("plain_console_log"), [call.args[0], parsed("measured")], []),
        "run.loggers.state_dict": lambda call: parsed("plain_logger_states(run)"),
        "run.loggers.load_state_dict": lambda call: ast.Call(
            parsed("plain_load_loggers"), [parsed("run"), *call.args], []
        ),
        "plain_encode": lambda call: (
            call.args[0] if isinstance(call.args[0], ast.Dict) and not call.args[0].keys else None
        ),
        "StepBatch": lambda call: call.args[0] if call.args and isinstance(call.args[0], ast.List) else None,
        "Watch": lambda call: parsed("[]"),
        "PlainWatched": lambda call: parsed("[]"),
        "run.watch.add": watched,
        "detached_number": lambda call: parsed(f"{ast.unparse(call.args[0])}.detach().clone()"),
        "run.metrics.add": lambda call: ast.Call(call.func, call.args[:3], []),
        "run.watch.check": lambda call: parsed("plain_check(run.watch)"),
        "run.metrics.take_media": lambda call: parsed("{}"),
        "metrics.take_media": lambda call: parsed("{}"),
        "run.metrics.set_aside": lambda call: None if "computed" in facts.uses else parsed("[]"),
        "compute.prepared": lambda call: ast.Call(parsed("move"), [*call.args, *map(parsed, places)], []),
        "named_loaders": lambda call: named_loaders_of(facts, call),
        "build_optimizer": lambda call: built(call.args[1], call.args[:1]),
        "build_scheduler": lambda call: built(call.args[0], call.args[1:]),
        "are_made_here": lambda call: ast.Constant("scheduler" in facts.functions),
        "averaging_of": lambda call: parsed(next((marked(c.label) for c in facts.callbacks if c.averages), "None")),
    }
    answers |= ANSWERS_ALONE if facts.parallel is None else answers_together(facts, facts.parallel)
    if not facts.has_extra:
        answers["plain_extra"] = lambda call: parsed("{}")
        answers["tensors_of"] = lambda call: ast.Call(ast.Attribute(call.args[0], "state_dict", ast.Load()), [], [])
    if facts.kind == "start":
        answers["build_optimizer"] = lambda call: made_or_given(facts, "optimizer", call.args[1], call.args[:1])
        answers["build_scheduler"] = lambda call: made_or_given(facts, "scheduler", call.args[0], call.args[1:])
        if facts.plain_data:
            answers["training_data"] = lambda call: parsed(
                "PlainSteps(loader, run.compute.device, cfg.accumulate_grad_batches)"
            )
    if not facts.loggers:
        answers["Session"] = answers["plain_session"] = lambda call: parsed("nullcontext()")
    if facts.settings["checkpoint"] is None:
        answers["StopSignals"] = answers["PlainStopSignals"] = lambda call: parsed("nullcontext()")
    return answers


def chosen_folder(facts: Facts) -> ast.expr:
    """Return the folder of the run."""
    goes_on, saves = facts.settings["resume"] == "auto", facts.settings["checkpoint"] is not None
    return parsed(
        f"plain_folder(Path({'RUN_DIR' if facts.settings['run_dir'] is None else 'cfg.run_dir'}), {goes_on}, {saves})"
    )


def found_checkpoint(facts: Facts, call: ast.Call) -> ast.expr:
    """Return the checkpoint that the run goes on from."""
    resume, disk = facts.settings["resume"], call.args[1]
    if resume is None or not isinstance(disk, ast.Call):
        return ast.Constant(None)
    if resume == "auto":
        return ast.Call(parsed("plain_newest_good"), [disk.args[1]], [])
    return parsed("plain_checkpoint_in(Path(cfg.resume))")


def watched(call: ast.Call) -> ast.expr:
    """Return what keeps a loss or a norm to be tested."""
    step, what, value = call.args
    return parsed(f"run.watch.append(({ast.unparse(step)}, {ast.unparse(what)}, {ast.unparse(value)}))")


def built(made: ast.expr, arguments: list[ast.expr]) -> ast.expr | None:
    """Return what a user passed: an object, or what a function makes."""
    name = made.id if isinstance(made, ast.Name) else ""
    if name.startswith("make_"):
        return ast.Call(made, arguments, [])
    return made if name in ("optimizer", "scheduler") else None


def named_of(facts: Facts, plugins: ast.expr, but: Sequence[Plugin] = ()) -> ast.expr | None:
    """Return callbacks or loggers that have a state, by the names that it is saved under; None where they are not written out.

    `but` are those that need none.
    """
    if not isinstance(plugins, ast.Tuple):
        return None
    stateful = [plugin for plugin in (*facts.callbacks, *facts.loggers) if plugin.has_state and plugin not in but]
    there = {marked(plugin.label): plugin for plugin in stateful}
    labels = [re.sub(r"_\d+$", "", item.id) if isinstance(item, ast.Name) else "" for item in plugins.elts]
    kept = [(there[label].state_name, item) for label, item in zip(labels, plugins.elts, strict=True) if label in there]
    return ast.Dict([ast.Constant(name) for name, _ in kept], [item for _, item in kept])


def made_or_given(facts: Facts, what: str, value: ast.expr, arguments: list[ast.expr]) -> ast.expr:
    """Return the optimizer or scheduler of one's own loop: they all are objects, or functions that make them."""
    return ast.Call(value, arguments, []) if what in facts.functions else value


def named_loaders_of(facts: Facts, call: ast.Call) -> ast.expr:
    """Return the loaders of a validation with the parts of a name that they add."""
    loaders = ast.unparse(call.args[0])
    if facts.val_names is None:
        return parsed(f"[('', {loaders})]")
    pairs = [f"({f'{name}/'!r}, {loaders}[{name!r}])" for name in facts.val_names]
    return parsed(f"[{', '.join(pairs)}]")
