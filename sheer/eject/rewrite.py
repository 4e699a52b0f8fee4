"""What becomes of the places where a script speaks of the library."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sheer.checkpoint.foreign import PICKLED
from sheer.eject.emit import PARTS, formatted
from sheer.eject.facts import Facts
from sheer.eject.knowledge import argument_name
from sheer.eject.scope import fresh, parameters
from sheer.eject.script import Script
from sheer.run import Result
from sheer.settings import Settings

MEDIA = ("Image", "Text", "Figure")
MEANS = ("Mean", "mean", "linear_cross_entropy")  # what is, or returns, a `Mean`
MADE_HERE = ("Trainer", "Checkpoint", "Parallel", "seed_everything")
ARGUMENTS = {
    "fit": ("model", "step", "train_loader", "val_loader"),
    "start": ("model",),
    "test": ("model", "step", "loader"),
}
PASSED = {
    "step_function": "step",
    "eval_function": "eval_step",
    "make_optimizer": "optimizer",
    "make_scheduler": "scheduler",
}
VALUES = {"rank": "0", "world_size": "1"}  # attributes of a trainer, where one process trains
VALUES_TOGETHER = {name: f'int(os.environ["{name.upper()}"])' for name in VALUES}  # where several do


@dataclass(frozen=True)
class Given:
    """A setting that the script computes: the expression, and how the ejected script gets it."""

    name: str  # as in `checkpoint.every_n_steps`
    value: ast.expr
    is_kept: bool  # as an argument; otherwise it is frozen to what it was, and an assert says so


class Rewrite:
    """The call that trains, the one that makes the trainer, and all other places; `facts` knows of all of them."""

    def __init__(self, script: Script, facts: Facts) -> None:
        self.script = script
        self.call, self.trainer = script.at(facts.call), script.at(facts.trainer)
        uses = [*facts.uses]
        for _, name in script.references():
            uses += ["Mean"] * (name in MEANS)
        self.facts = dataclasses.replace(facts, uses=tuple(dict.fromkeys(uses)))
        self.making = self._making()
        self.given = list(self._computed())
        self.others = {id(script.at(other.call)): other for other in facts.others}
        self.devices = [node for node, name in self._uses() if name == "device"]
        self.result = self._result_name()

    def _making(self) -> ast.Assign | None:
        """Return the statement that gives the trainer its name; None where the call is made on it at once."""
        statement = self.script.statement(self.trainer)
        if isinstance(self.call.func, ast.Attribute) and self.call.func.value is self.trainer:
            return None
        is_assigned = isinstance(statement, ast.Assign) and statement.value is self.trainer
        if isinstance(statement, ast.Assign) and is_assigned and isinstance(statement.targets[0], ast.Name):
            return statement
        raise self.script.refusal(
            self.trainer, "the trainer needs a name: write trainer = sheer.Trainer(...) on a line of its own."
        )

    def _uses(self) -> Iterator[tuple[ast.Attribute, str]]:
        """Yield where an attribute of the trainer is read, with its name.

        Raises:
            Refusal: the trainer is used as a value, so that not all that is done with it can be seen.
        """
        if self.making is None:
            return
        assert isinstance(self.making.targets[0], ast.Name)
        for node in ast.walk(self.script.function_of(self.making)):
            if isinstance(node, ast.Name) and node.id == self.making.targets[0].id and isinstance(node.ctx, ast.Load):
                parent = self.script.parents[id(node)]
                if not isinstance(parent, ast.Attribute):
                    raise self.script.refusal(
                        node,
                        "the trainer is passed on, and what is done with it there cannot be seen. Call its methods here.",
                    )
                yield parent, parent.attr

    def _result_name(self) -> str | None:
        """Return what the script calls the result, or will call it where another call needs it."""
        statement = self.script.statement(self.call)
        if (
            isinstance(statement, ast.Assign)
            and statement.value is self.call
            and isinstance(statement.targets[0], ast.Name)
        ):
            return statement.targets[0].id
        if not self.others and not any(name == "run_dir" for _, name in self._uses()):
            return None
        if not (isinstance(statement, ast.Expr) and statement.value is self.call):
            raise self.script.refusal(
                self.call, "the result of fit needs a name here: write result = trainer.fit(...)."
            )
        return fresh("result", self.script.names())

    def _computed(self) -> Iterator[Given]:
        """Yield the settings that the script computes, rather than write down."""
        if self.facts.settings["fast_dev_run"]:
            return
        for name, value in settings_in(self.trainer, self.script):
            captured = self._captured(name)
            number = isinstance(captured, (int, float)) and not isinstance(captured, bool)
            kept = number or (isinstance(captured, str) and name in ("run_dir", "monitor"))
            is_off = captured in (0, 1) and name in (
                "overfit_batches",
                "accumulate_grad_batches",
                "checkpoint.keep_best",
            )
            if not is_literal(value):
                yield Given(name, value, kept and not is_off and name != "max_time" and self.facts.kind == "fit")

    def _captured(self, name: str) -> Any:
        owner, _, inner = name.rpartition(".")
        return (self.facts.settings[owner] or {}).get(inner) if owner else self.facts.settings[name]

    def remarks(self) -> dict[str, str]:
        """Return what comments of the script say of the settings that it gives, by their names."""
        said = {name: self.script.remark(value) for name, value in settings_in(self.trainer, self.script)}
        whole = {k.arg: self.script.remark(k.value) for k in self.trainer.keywords if k.arg in PARTS}
        said |= {name: text for name, text in whole.items() if name is not None and text not in said.values()}
        return {name: text for name, text in said.items() if text}

    def kept(self) -> list[str]:
        """Return the names of the settings that the script hands over."""
        return [given.name for given in self.given if given.is_kept]

    def classes(self) -> list[str]:
        """Return the library's definitions that the script itself uses."""
        inside = {id(node) for node in ast.walk(self.trainer)}
        outside = [(node, name) for node, name in self.script.references() if id(node) not in inside]
        for node, name in outside:
            if name in ("Trainer", "Checkpoint", "Parallel", "Settings", "find_lr", "data", *MEDIA):
                raise self.script.refusal(
                    node, f"sheer.{name} is used here, which has no form without the library.{_WAYS_OUT.get(name, '')}"
                )
            call = self.script.parents[id(node)]
            if name == "load_weights" and isinstance(call, ast.Call):
                self._refuse_partial_loads(call)
        names = [name for _, name in outside]
        names += [plugin.name for plugin in (*self.facts.callbacks, *self.facts.loggers) if plugin.is_ours]
        return list(dict.fromkeys(name for name in names if name not in MADE_HERE))

    def _refuse_partial_loads(self, call: ast.Call) -> None:
        """Raise `Refusal` where weights are loaded in a way that the few lines of an ejected script do not know."""
        arguments = [keyword.arg for keyword in call.keywords if keyword.arg not in ("model", "source", "which")]
        if arguments:
            raise self.script.refusal(
                call,
                f"load_weights({arguments[0]}=...) has no form without the library. Use torch.nn.Module.load_state_dict.",
            )
        for value in call.args[1:2]:
            if isinstance(value, ast.Constant) and str(value.value).endswith((*PICKLED, ".index.json")):
                raise self.script.refusal(
                    call, f"load_weights of {value.value!r} has no form without the library. Give a safetensors file."
                )

    def constructions(self, name: str) -> list[ast.Call]:
        """Return where the script makes objects of a class of the library; none where it uses the class otherwise, too."""
        uses = [node for node, known in self.script.references() if known == name]
        calls = [self.script.parents[id(node)] for node in uses]
        made = [c for c, node in zip(calls, uses, strict=True) if isinstance(c, ast.Call) and c.func is node]
        return made if len(made) == len(uses) else []

    def fields_of_result(self) -> frozenset[str]:
        """Return the names of all that a result holds, where the script uses it as a whole: prints it, or hands it on."""
        if self.facts.kind != "fit":
            return frozenset()
        whole = self.result is None and not isinstance(self.script.statement(self.call), ast.Expr)
        for node in ast.walk(self.script.tree) if self.result is not None else ():
            is_read = isinstance(node, ast.Name) and node.id == self.result and isinstance(node.ctx, ast.Load)
            whole |= is_read and not isinstance(self.script.parents[id(node)], ast.Attribute)
        return frozenset(field.name for field in dataclasses.fields(Result)) if whole else frozenset()

    def freed(self) -> set[str]:
        """Return names that the script has for the library, and will not have any more."""
        return {*self.script.modules, *self.script.imported}

    def returned(self) -> ast.expr | None:
        """Return what the call is to return: nothing where the script does not use it."""
        is_used = self.result is not None or not isinstance(self.script.statement(self.call), ast.Expr)
        value = "(result_of(run), run.info)" if self.tells_loggers() else "result_of(run)"
        return ast.parse(value, mode="eval").body if is_used else None

    def tells_loggers(self) -> bool:
        """Whether loggers that must know all of the run are told of the metrics of later calls."""
        told = any(other.kind != "predict" for other in self.facts.others)
        return not all(map(self.facts.reopens, self.facts.loggers)) and told and self.facts.kind == "fit"

    def edit(self, functions: Mapping[str, ast.FunctionDef], names: Mapping[str, str]) -> None:
        """Note all changes of the script's text.

        Args:
            functions: what the script calls, by what it stands for: "fit", and the others by the ids of their calls.
            names: what the definitions of the library are called in the script.
        """
        script = self.script
        for reference, name in script.references():
            if not self._seeded(reference, name) and name in names:
                script.replace(reference, names[name])
        calls = [(self.call, ARGUMENTS[self.facts.kind], functions["fit"])]
        for node, attribute in self._uses():
            call = script.parents[id(node)]
            if id(call) in self.others and isinstance(call, ast.Call):
                calls.append((call, ARGUMENTS["test"], functions[str(id(call))]))
            elif attribute == "device":
                script.replace(node, f"{names['plain_training_device']}()")
            elif attribute == "run_dir" and node.lineno > self.call.lineno:
                script.replace(node, f"{self.result}.run_dir")
            elif attribute in VALUES:
                script.replace(node, (VALUES if self.facts.parallel is None else VALUES_TOGETHER)[attribute])
            elif call is not self.call:
                raise script.refusal(node, f"trainer.{attribute} cannot be ejected here.{_WAYS_OUT.get(attribute, '')}")
        setup = self._setting_up()
        for call, arguments, function in sorted(calls, key=lambda each: len(ast.dump(each[0]))):  # inner ones first
            self._replace_call(call, arguments, function, names)
        if self.making is not None and setup:
            script.replace(self.making, self._indented(setup, self.making))
        elif self.making is not None:
            script.remove(self.making)
        script.remove_imports()
        if self.making is None:
            script.insert_before(script.statement(self.call), setup)

    def _replace_call(
        self, call: ast.Call, arguments: tuple[str, ...], function: ast.FunctionDef, names: Mapping[str, str]
    ) -> None:
        given = self._given(call, arguments)
        wanted = [p.arg if p.arg in given else re.sub(r"(__given|_\d+)+$", "", p.arg) for p in parameters(function)]
        missing = [name for name in wanted if name not in given]
        if missing:
            raise self.script.refusal(call, f"the call gives no {missing[0]}.")
        first_named = len(function.args.args)
        own = [parameter.arg for parameter in parameters(function)]
        passed = [given[n] if i < first_named else f"{own[i]}={given[n]}" for i, n in enumerate(wanted)]
        text = f"{names[function.name]}({', '.join(passed)})"
        statement = self.script.statement(call)
        if call is self.call and self.result is not None:
            target = f"{self.result}, info" if self.tells_loggers() else self.result
            self.script.replace(statement, self._formatted(f"{target} = {text}", statement))
        elif isinstance(statement, ast.Expr) and statement.value is call:
            self.script.replace(statement, self._formatted(text, statement))
        else:
            self.script.replace(call, text)

    def _formatted(self, text: str, statement: ast.stmt) -> str:
        lines = formatted(text, 120 - statement.col_offset).splitlines()
        return self._indented(lines, statement)

    def _seeded(self, node: ast.expr, name: str) -> bool:
        """Write out the seeding, where it is a statement of its own."""
        call = self.script.parents[id(node)]
        statement = self.script.parents[id(call)]
        if name != "seed_everything" or not isinstance(statement, ast.Expr) or not isinstance(call, ast.Call):
            return False
        given = ", ".join(self.script.source(value) for value in call.args)
        seeds = [f"{function}({given})" for function in ("random.seed", "np.random.seed", "torch.manual_seed")]
        self.script.replace(statement, self._indented(seeds, statement))
        return True

    def entered(self) -> set[str]:
        """Return the methods that a `with` around the run of one's own loop calls."""
        parent = self.script.parents[id(self.call)]
        return {"__enter__", "__exit__"} if isinstance(parent, ast.withitem) else set()

    def seeds(self) -> list[str]:
        """Return the imports that seeding needs, and reading the number of a rank."""
        is_seeded = any(name == "seed_everything" for _, name in self.script.references())
        asks = self.facts.parallel is not None and any(name in VALUES_TOGETHER for _, name in self._uses())
        return ["import random", "import numpy as np", "import torch"] * is_seeded + ["import os"] * asks

    def _indented(self, lines: list[str], statement: ast.stmt) -> str:
        return f"\n{' ' * statement.col_offset}".join(lines)

    def _setting_up(self) -> list[str]:
        """Return the statements for what the trainer was given: objects, and settings that are computed."""
        lines = []
        keywords = {keyword.arg: keyword.value for keyword in self.trainer.keywords}
        for argument, plugins in (("callbacks", self.facts.callbacks), ("loggers", self.facts.loggers)):
            value = keywords.get(argument)
            if plugins and value is None:
                raise self.script.refusal(self.trainer, f"** hides the {argument}. Write {argument}=[...] out.")
            if not plugins or value is None:
                continue
            if not isinstance(value, (ast.List, ast.Tuple)) or any(isinstance(v, ast.Starred) for v in value.elts):
                labels = ", ".join(plugin.label for plugin in plugins)
                lines.append(f"[{labels}] = {self.script.source(value)}")
                continue
            for plugin, item in zip(plugins, value.elts, strict=True):
                lines.append(remarked(f"{plugin.label} = {self.script.source(item)}", self.script.remark(item)))
        if self.facts.has_hparams:
            lines.append(f"hparams = {self.script.source(keywords['hparams'])}")
        for given in self.given:
            remark = self.script.remark(given.value)
            if given.is_kept and not _is_name(given.value):
                name = argument_name(given.name)
                lines.append(remarked(f"{name} = {self.script.source(given.value)}", remark))
            elif not given.is_kept and given.name != "max_time":
                lines.append(remarked(self._assertion(given), remark))
        return lines

    def _assertion(self, given: Given) -> str:
        value, text = self._captured(given.name), self.script.source(given.value)
        if given.name == "checkpoint":
            value, text = value is not None, f"bool({text})"
        test = f"{text} is {value!r}" if value is None or isinstance(value, bool) else f"{text} == {value!r}"
        return f"assert {test}, {f'this loop was written for {given.name}={value!r}'!r}"

    def _given(self, call: ast.Call, arguments: tuple[str, ...]) -> dict[str, str]:
        """Return what a call passes, by the names of the parameters of the function that it will call."""
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            raise self.script.refusal(call, "* and ** hide what is passed. Write the arguments out.")
        given = {name: self.script.source(value) for name, value in zip(arguments, call.args, strict=False)}
        given |= {k.arg: self.script.source(k.value) for k in call.keywords if k.arg}
        out = {**given, **{new: given[old] for new, old in PASSED.items() if old in given}}
        out |= {plugin.label: plugin.label for plugin in (*self.facts.callbacks, *self.facts.loggers)}
        for setting in (setting for setting in self.given if setting.is_kept):
            name = argument_name(setting.name)
            out[name] = self.script.source(setting.value) if _is_name(setting.value) else name
        info = "info" if self.facts.kind == "fit" else f"{self.result}.run.info"
        out |= {"result": self.result, "info": info} if self.result is not None else {}
        return out | ({"hparams": "hparams"} if self.facts.has_hparams else {})


_WAYS_OUT = {
    "fit": " Eject a script for each call that trains.",
    "start": " Eject a script for each call that trains.",
    "run_dir": " Read it from the result, behind fit.",
    "Settings": " Give the settings in the call of Trainer.",
    "Checkpoint": " Write it in the call of Trainer.",
    "Parallel": " Write it in the call of Trainer.",
    **dict.fromkeys(MEDIA, " Hand it to your logger in a callback, or leave it out."),
}


def remarked(line: str, remark: str) -> str:
    """Return a line with a comment behind it, if there is one."""
    return f"{line}  # {remark}" if remark else line


def settings_in(trainer: ast.Call, script: Script) -> Iterator[tuple[str, ast.expr]]:
    """Yield the settings that a call of Trainer gives, those of its checkpoint and of its ranks by dotted names."""
    known = {field.name for field in dataclasses.fields(Settings)}
    references = {id(node): name for node, name in script.references()}
    for keyword in trainer.keywords:
        value = keyword.value
        kind = PARTS.get(keyword.arg or "")
        if kind is not None and isinstance(value, ast.Call) and references.get(id(value.func)) == kind.__name__:
            fields = [field.name for field in dataclasses.fields(kind)]
            given = dict(zip(fields, value.args, strict=False)) | {k.arg: k.value for k in value.keywords if k.arg}
            yield from ((f"{keyword.arg}.{name}", inner) for name, inner in given.items())
        elif keyword.arg in known:
            yield keyword.arg, value


def is_literal(value: ast.expr) -> bool:
    """Whether an expression is a value written down."""
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True


def _is_name(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) or (isinstance(value, ast.Attribute) and _is_name(value.value))
