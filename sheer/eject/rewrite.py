"""What becomes of the places where a script speaks of the library."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping

from sheer.eject.facts import Facts
from sheer.eject.scope import parameters
from sheer.eject.script import Script

MEDIA = ("Image", "Text", "Figure")
ARGUMENTS = ("model", "step", "train_loader", "val_loader")
PASSED = {
    "step_function": "step",
    "eval_function": "eval_step",
    "make_optimizer": "optimizer",
    "make_scheduler": "scheduler",
}


class Rewrite:
    """The call that trains, the statement that makes the trainer, and all other places; `facts` knows of all of them."""

    def __init__(self, script: Script, facts: Facts) -> None:
        self.script = script
        self.call = script.at(facts.call)
        self.trainer = script.at(facts.trainer)
        uses = [*facts.uses]
        for _, name in script.references():
            uses += ["Mean"] * (name in ("Mean", "mean")) + ["media"] * (name in MEDIA)
        self.facts = dataclasses.replace(facts, uses=tuple(dict.fromkeys(uses)))
        statement = script.statement(self.trainer)
        if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
            raise script.refusal(
                self.trainer, "the trainer needs a name: write trainer = sheer.Trainer(...) on a line of its own."
            )
        self.making, self.name = statement, statement.targets[0].id

    def classes(self) -> list[str]:
        """Return the library's definitions that the script itself uses."""
        inside = {id(node) for node in ast.walk(self.trainer)}
        names = [name for node, name in self.script.references() if id(node) not in inside]
        names += [plugin.name for plugin in (*self.facts.callbacks, *self.facts.loggers) if plugin.is_ours]
        return list(dict.fromkeys(name for name in names if name not in ("Trainer", "Checkpoint", "seed_everything")))

    def freed(self) -> set[str]:
        """Return names that the script has for the library, and will not have any more."""
        return {*self.script.modules, *self.script.imported}

    def returned(self) -> ast.expr | None:
        """Return what the call is to return: nothing where the script does not use it."""
        return (
            None
            if isinstance(self.script.statement(self.call), ast.Expr)
            else ast.parse("result(run)", mode="eval").body
        )

    def edit(self, fit: ast.FunctionDef, names: Mapping[str, str]) -> None:
        """Note all changes of the script's text."""
        script = self.script
        inside = {id(node) for node in ast.walk(self.trainer)}
        objects = self._setting_up(names)
        if objects:
            script.replace(self.making, objects)
        else:
            script.remove(self.making)
        given = self._given(names)
        wanted = [p.arg if p.arg in given else re.sub(r"(__given|_\d+)+$", "", p.arg) for p in parameters(fit)]
        missing = [name for name in wanted if name not in given]
        if missing:
            raise script.refusal(self.call, f"the call gives no {missing[0]}.")
        script.replace(self.call, f"{names['fit']}({', '.join(given[name] for name in wanted)})")
        inside |= {id(node) for node in ast.walk(self.call)}
        for node, name in script.references():
            if id(node) not in inside and not self._seeded(node, name):
                script.replace(node, names[name])
        script.remove_imports()

    def _seeded(self, node: ast.expr, name: str) -> bool:
        """Write out the seeding, where it is a statement of its own."""
        call = self.script.parents[id(node)]
        statement = self.script.parents[id(call)]
        if name != "seed_everything" or not isinstance(statement, ast.Expr) or not isinstance(call, ast.Call):
            return False
        indent = " " * statement.col_offset
        given = ", ".join(self.script.source(value) for value in call.args)
        seeds = [f"{function}({given})" for function in ("random.seed", "np.random.seed", "torch.manual_seed")]
        self.script.replace(statement, f"\n{indent}".join(seeds))
        return True

    def seeds(self) -> list[str]:
        """Return the imports that seeding needs."""
        if any(name == "seed_everything" for _, name in self.script.references()):
            return ["import random", "import numpy as np", "import torch"]
        return []

    def _setting_up(self, names: Mapping[str, str]) -> str:
        """Return the statements for the objects that the trainer was given."""
        lines = []
        keywords = {keyword.arg: keyword.value for keyword in self.trainer.keywords}
        for argument, plugins in (("callbacks", self.facts.callbacks), ("loggers", self.facts.loggers)):
            value = keywords.get(argument)
            if not plugins or value is None:
                continue
            if not isinstance(value, (ast.List, ast.Tuple)):
                labels = ", ".join(plugin.label for plugin in plugins)
                lines.append(f"({labels},) = {self.script.source(value)}")
                continue
            for plugin, item in zip(plugins, value.elts, strict=True):
                lines.append(f"{plugin.label} = {self._without_package(item, names)}")
        if self.facts.has_hparams:
            lines.append(f"hparams = {self.script.source(keywords['hparams'])}")
        indent = " " * self.making.col_offset
        return f"\n{indent}".join(lines)

    def _without_package(self, node: ast.expr, names: Mapping[str, str]) -> str:
        text = self.script.source(node)
        for reference, name in self.script.references():
            if any(part is reference for part in ast.walk(node)):
                text = text.replace(self.script.source(reference), names.get(name, name), 1)
        return text

    def _given(self, names: Mapping[str, str]) -> dict[str, str]:
        """Return what the call passes, by the names of the parameters of `fit`."""
        given = {
            name: self._without_package(value, names) for name, value in zip(ARGUMENTS, self.call.args, strict=False)
        }
        if any(isinstance(a, ast.Starred) for a in self.call.args) or any(k.arg is None for k in self.call.keywords):
            raise self.script.refusal(self.call, "* and ** hide what is passed. Write the arguments out.")
        given |= {k.arg: self._without_package(k.value, names) for k in self.call.keywords if k.arg}
        out = {**given, **{new: given[old] for new, old in PASSED.items() if old in given}}
        out |= {plugin.label: plugin.label for plugin in (*self.facts.callbacks, *self.facts.loggers)}
        return out | ({"hparams": "hparams"} if self.facts.has_hparams else {})
