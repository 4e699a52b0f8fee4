"""The function that a script will call, before it is specialised: its parameters as the script has them, and what it returns."""

from __future__ import annotations

import ast
import copy

from sheer.eject.facts import Facts
from sheer.eject.fold import dotted
from sheer.eject.knowledge import marked
from sheer.eject.scope import parameters, substituted, walk

TYPES = {
    "optimizer": "Optimizer",
    "make_optimizer": "Callable[[nn.Module], Optimizer]",
    "step_function": "Any",
    "eval_function": "Any",
}


def prepared(fit: ast.FunctionDef, facts: Facts, returned: ast.expr | None = None) -> None:
    """Make `fit` ready to be specialised, in place.

    Functions that make an optimizer or a scheduler are called so; the data is read by a plain twin where there is one; what is
    returned is what the script uses of it.
    """
    for name in facts.functions:
        for parameter in parameters(fit):
            if parameter.arg == name:
                parameter.arg = f"make_{name}"
        fit.body = [_FirstRead(name).visit(statement) for statement in fit.body]
    if "eval_step" in facts.none:
        fit.body = substituted(fit.body, {"eval_function": ast.Name("step_function", ast.Load())})
    for node in walk(fit.body):
        if isinstance(node, ast.Return):
            node.value = copy.deepcopy(returned)
    fit.returns = ast.Constant(None) if returned is None else ast.Name("Result", ast.Load())
    if returned is None and isinstance(fit.body[-1], ast.Return):
        fit.body.pop()
    for parameter in parameters(fit):
        if parameter.arg in TYPES:
            parameter.annotation = ast.parse(TYPES[parameter.arg], mode="eval").body
    for plugin in (*facts.callbacks, *facts.loggers):
        fit.args.args.append(
            ast.arg(marked(plugin.label), ast.Name(plugin.name if plugin.is_ours else "Any", ast.Load()))
        )
    if facts.has_hparams:
        fit.args.args.append(ast.arg(marked("hparams"), ast.Name("Any", ast.Load())))
    if facts.plain_data:
        fit.body = [_PlainData(facts).visit(statement) for statement in fit.body]


class _FirstRead(ast.NodeTransformer):
    """Renames a parameter where a dict is made of it; later the name is given another value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Dict(self, node: ast.Dict) -> ast.expr:
        values: list[ast.expr] = [
            ast.Name(f"make_{self.name}", ast.Load())
            if isinstance(value, ast.Name) and value.id == self.name
            else value
            for value in node.values
        ]
        return ast.Dict(node.keys, values)


class _PlainData(ast.NodeTransformer):
    """Reads the training data by a plain twin: one that can only start anew, or one that goes on at any position."""

    def __init__(self, facts: Facts) -> None:
        self.goes_on = facts.settings["resume"] is not None or facts.settings["checkpoint"] is not None
        self.groups = facts.settings["accumulate_grad_batches"] > 1

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        if isinstance(node.value, ast.Call) and dotted(node.value.func) == "training_data":
            size = "cfg.accumulate_grad_batches"
            if self.goes_on:
                text = f"PlainData(train_loader, compute.device, {size})"
            else:
                text = (
                    f"PlainLength(-(-len(train_loader) // {size}))" if self.groups else "PlainLength(len(train_loader))"
                )
            node.value = _expression(text)
        return node

    def visit_For(self, node: ast.For) -> ast.stmt:
        assert isinstance(node.target, ast.Name)
        text = "plain_epochs(train_loader, compute.device)"
        if self.goes_on:
            text = "train.epochs(run.progress.epoch, run.progress.batch, restore_random)"
        if self.groups:
            text = f"plain_grouped({text}, cfg.accumulate_grad_batches)"
        node.iter = _expression(text)
        node.target, name = ast.parse("batch, at_end = 0").body[0].targets[0], node.target.id  # type: ignore[attr-defined]
        node.body = [_AtEnd().visit(statement) for statement in node.body]
        if not self.groups:
            node.body = substituted(node.body, {name: _expression("[(batch, samples)]")})
            node.body.insert(0, ast.parse("samples = count_samples(batch)").body[0])
        return node


class _AtEnd(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Name("at_end", ast.Load()) if dotted(node) == "train.at_end" else node


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
