"""The function that a script will call, before it is specialised: its parameters as the script has them, and what it returns."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Sequence, Set

from sheer.eject.expressions import dotted, is_constant, parsed
from sheer.eject.facts import Facts, Other
from sheer.eject.knowledge import argument_name, data_twins, marked
from sheer.eject.rewrite import Rewrite, is_literal
from sheer.eject.scope import fresh, parameters, substituted, walk
from sheer.settings import Checkpoint, Settings

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
    with_info = isinstance(returned, ast.Tuple)
    fit.returns = parsed("None" if returned is None else "tuple[Result, RunInfo]" if with_info else "Result")
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
    if facts.parallel is not None:
        fit.body[1:1] = ast.parse(f"plain_join({facts.parallel['timeout']!r})").body
    if facts.plain_data:
        fit.body = [_PlainData(facts).visit(statement) for statement in fit.body]


TYPES_OF_SETTINGS = {"folder": "str | Path", "monitor": "str"}


def take_settings(fit: ast.FunctionDef, kept: Sequence[str]) -> ast.ClassDef:
    """Give a function the settings that the script computes, as keyword arguments.

    Returns:
        A class `Settings` that has only these.
    """
    names = [argument_name(name) for name in kept]
    kinds = {
        field.name: str(field.type).removesuffix(" | None")
        for field in (*dataclasses.fields(Settings), *dataclasses.fields(Checkpoint))
    }
    own = {setting.rpartition(".")[2]: argument_name(setting) for setting in kept}
    types = [parsed(TYPES_OF_SETTINGS.get(name, kinds[setting])) for setting, name in own.items()]
    fit.args.kwonlyargs += [ast.arg(f"{name}__given", kind) for name, kind in zip(names, types, strict=True)]
    fit.args.kw_defaults += [None] * len(names)
    fit.args.args = [argument for argument in fit.args.args if argument.arg != "cfg"]
    given = ", ".join(f"{name}={name}__given" for name in names)
    if names:
        fit.body[1:1] = ast.parse(f"cfg = Settings({given})").body
    fields = "".join(f"    {name}: {ast.unparse(kind)}\n" for name, kind in zip(names, types, strict=True))
    made = ast.parse(f"class Settings:\n    pass\n{fields}").body[0]
    assert isinstance(made, ast.ClassDef)
    return made


class _OwnSettings(ast.NodeTransformer):
    """Reads `self.cfg` from the settings that all functions have."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Name("cfg", ast.Load()) if dotted(node) == "self.cfg" else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if dotted(node.targets[0]) == "self.cfg" else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if dotted(node.func) == "PlainLoop":
            node.args.pop(0)
        return self.generic_visit(node)


def prepared_loop(
    start: ast.FunctionDef, loop: ast.ClassDef, steps: ast.FunctionDef, facts: Facts, used: Set[str]
) -> None:
    """Make `start_loop` and the class of what it returns ready to be specialised, in place; `used` are the methods that the script calls."""
    for node in (start, loop):
        _OwnSettings().visit(node)
    if "total_steps" in facts.none:
        start.body = substituted(start.body, {"total_steps": ast.Constant(None)})
    if "schedulers" in facts.none:
        start.body = substituted(start.body, {"schedulers": ast.Dict([], [])})
    methods = {method.name: method for method in loop.body if isinstance(method, ast.FunctionDef)}
    waiting, kept = [name for name in methods if name in used | {"__init__"}], set[str]()
    while waiting:
        kept.add(name := waiting.pop())
        own = {part.attr for part in walk([methods[name]]) if isinstance(part, ast.Attribute)}
        waiting += own & methods.keys() - kept
    loop.body = [part for part in loop.body if not isinstance(part, ast.FunctionDef) or part.name in kept]
    for method in (method for method in loop.body if isinstance(method, ast.FunctionDef)):
        if method.name == "__init__":
            method.args.args = [argument for argument in method.args.args if argument.arg != "cfg"]
        if method.name == "steps" and not facts.skips:
            method.args.kwonlyargs, method.args.kw_defaults = [], []
            method.body = substituted(method.body, {"resume_by_skipping": ast.Constant(False)})
        if method.name == "steps" and "train_loader" not in facts.none:
            kind = parsed("DataLoader[Any]" if facts.plain_data else "Iterable[Any]")
            method.args.defaults = []
            for function in (method, steps):
                for argument in (argument for argument in function.args.args if argument.arg == "loader"):
                    argument.annotation = kind
        if method.name == "steps" and "train_loader" in facts.none:
            method.args.args, method.args.defaults = method.args.args[:1], []
            method.body = substituted(method.body, {"loader": ast.Constant(None)})
    for plugin in (*facts.callbacks, *facts.loggers):
        kind = ast.Name(plugin.name if plugin.is_ours else "Any", ast.Load())
        start.args.args.append(ast.arg(marked(plugin.label), kind))
    if facts.has_hparams:
        start.args.args.append(ast.arg(marked("hparams"), ast.Name("Any", ast.Load())))


def training_device() -> ast.FunctionDef:
    """Return a function that tells where the model is trained."""
    text = '''def plain_training_device() -> torch.device:
    """Return where the model is trained."""
    return resolve_device(cfg.device)'''
    made = ast.parse(text).body[0]
    assert isinstance(made, ast.FunctionDef)
    return made


def evaluations(rewrite: Rewrite) -> dict[str, ast.FunctionDef]:
    """Return the functions for the calls of `test`, `validate` and `predict`, by the ids of these; one for calls that are alike."""
    made: dict[str, ast.FunctionDef] = {}
    names = {"test": "plain_test_metrics", "validate": "plain_validation_metrics", "predict": "plain_predictions"}
    for key, other in rewrite.others.items():
        new = evaluation(other, rewrite.script.at(other.call), rewrite, names[other.kind])
        same = next((known for known in made.values() if ast.dump(known) == ast.dump(new)), new)
        same.name = same.name if same is not new else fresh(new.name, {known.name for known in made.values()})
        made[str(key)] = same
    return made


def evaluation(other: Other, call: ast.Call, rewrite: Rewrite, name: str) -> ast.FunctionDef:
    """Return the function that stands for a call of `test`, `validate` or `predict`."""
    facts, given = rewrite.facts, {keyword.arg: keyword.value for keyword in call.keywords}
    is_later = other.call.line > facts.call.line
    checkpoint, limit = given.get("checkpoint"), given.get("limit_batches")
    loads = checkpoint is not None and not is_constant(checkpoint, None)
    events = {
        event: ", ".join(marked(c.label) for c in facts.callbacks if event in c.events and not (loads and c.averages))
        for event in ("evaluation_start", "evaluation_end")
    }
    loggers = {marked(logger.label): logger for logger in facts.loggers if is_later and other.kind != "predict"}
    told = list(loggers)
    parameters = ["model: nn.Module", "step_function: Any", "loader: Any"]
    parameters += ["checkpoint: Any"] * (loads and not is_literal(checkpoint or call))
    parameters += ["limit_batches: Any"] * (limit is not None and not is_literal(limit))
    kind = "Result" if facts.kind == "fit" else "PlainLoop"
    parameters += [f"result: {kind}"] * ((is_later and other.kind != "predict") or loads)
    parameters += ["info: RunInfo"] * (not all(map(facts.reopens, loggers.values())))
    kinds = {marked(p.label): p.name if p.is_ours else "Any" for p in (*facts.callbacks, *facts.loggers)}
    plugins = dict.fromkeys([*", ".join(events.values()).split(", "), *told])
    parameters += [f"{plugin}: {kinds[plugin]}" for plugin in plugins if plugin]
    most = "None" if limit is None else ast.unparse(limit)
    which = getattr(checkpoint, "value", "")
    source = repr(which) if loads and is_literal(checkpoint or call) else "checkpoint"
    load = f"load_weights(model, {source})"
    if which in ("best", "last"):
        load = f'model.load_state_dict(load_file(result.run_dir / "checkpoints" / {which!r} / "model.safetensors"))'
    shown = ", ".join(f"{event}=({labels},)" for event, labels in events.items() if labels)
    lines = ["device = resolve_device(cfg.device)", "compute = make_compute(cfg.precision, device)"]
    lines += [load] * loads
    lines += ["place_model(model, compute)", f"events = Events({shown})"]
    if other.kind == "predict":
        step = "functools.partial(step_function, step=0)" if other.numbered else "step_function"
        lines += [f"return predict(model, {step}, loader, compute, events, {most})"]
        said, returned = "Return an iterator over what a step returns for each batch.", "Iterator[Any]"
    else:
        prefix = "test/" if other.kind == "test" else "val/"
        lines += [f"evaluation = Evaluation(step_function, loader, {prefix!r}, {most}, {other.numbered})"]
        lines += ["metrics = evaluate(model, evaluation, compute, events, 0, {})"]
        lines += ["plain_report(result, metrics)"] * is_later
        for logger in told:
            again = "start_again(result.run_dir)" if facts.reopens(loggers[logger]) else "start(info)"
            lines += [f"{logger}.{again}", f"{logger}.log(result.step, metrics)", f"{logger}.close()"]
        lines += ["return metrics"]
        said, returned = "Return the means of what a step returns, over all batches of a loader.", "dict[str, float]"
    body = "\n    ".join([f'"""{said}"""', *lines])
    made = ast.parse(f"def {name}({', '.join(parameters)}) -> {returned}:\n    {body}").body[0]
    assert isinstance(made, ast.FunctionDef)
    return made


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
        self.data = data_twins(facts)["TrainingData"]
        self.groups = facts.settings["accumulate_grad_batches"] > 1
        self.shares = facts.parallel is not None

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        if isinstance(node.value, ast.Call) and dotted(node.value.func) == "training_data":
            size = "cfg.accumulate_grad_batches"
            text = f"{self.data}(train_loader, compute.device, {size})"
            if self.data == "PlainLength":
                text = (
                    f"PlainLength(-(-len(train_loader) // {size}))" if self.groups else "PlainLength(len(train_loader))"
                )
            node.value = parsed(text)
        return node

    def visit_For(self, node: ast.For) -> ast.stmt:
        assert isinstance(node.target, ast.Name)
        node.body = [_AtEnd().visit(statement) for statement in node.body]
        if self.shares:
            return self._shared(node, node.target.id)
        text = "plain_epochs(train_loader, compute.device)"
        if self.data != "PlainLength":
            text = "train.epochs(run.progress.epoch, run.progress.batch, restore_random)"
        if self.groups:
            text = f"plain_grouped({text}, cfg.accumulate_grad_batches)"
        node.iter = parsed(text)
        node.target, name = ast.parse("batch, at_end = 0").body[0].targets[0], node.target.id  # type: ignore[attr-defined]
        if not self.groups:
            node.body = substituted(node.body, {name: parsed("[(batch, samples)]")})
            node.body.insert(0, ast.parse("samples = count_samples(batch)").body[0])
        return node

    def _shared(self, node: ast.For, name: str) -> ast.stmt:
        """Read this rank's part of each batch."""
        text, target = "plain_shared_epochs(train_loader, compute.device, ranks)", "batch, samples, all_samples, at_end"
        made = "PlainStepBatch([(batch, samples)], all_samples, [largest_share(all_samples, ranks)])"
        if self.groups:
            text, target = f"plain_grouped_shares({text}, cfg.accumulate_grad_batches)", "batch, totals, at_end"
            made = "PlainStepBatch(batch, sum(totals), [largest_share(total, ranks) for total in totals])"
        node.iter = parsed(text)
        node.target = ast.Tuple([ast.Name(name, ast.Store()) for name in target.split(", ")], ast.Store())
        node.body = [
            *ast.parse(f"step_batch = {made}").body,
            *substituted(node.body, {name: ast.Name("step_batch", ast.Load())}),
        ]
        return node


class _AtEnd(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Name("at_end", ast.Load()) if dotted(node) == "train.at_end" else node
