"""Values that many functions pass along, put into one record: what a person would do who wrote them by hand."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Set

from sheer.eject.expressions import dotted
from sheer.eject.program import Program, arguments_of, drop_parameter, free_names
from sheer.eject.scope import assignments, bound_in, fresh, parameters, substituted, walk

MOST = 7  # parameters of a function that a reader keeps apart


def bundle(program: Program, root: str) -> None:
    """Put what functions with many parameters share into a dataclass, which `root` makes and they pass along."""
    fit = program.function(root)
    largest = max(_functions(program, root), key=lambda f: len(parameters(f)), default=None)
    if fit is None or largest is None or len(parameters(largest)) <= MOST:
        return
    group = _shared(program, fit, largest)
    members = _members(program, root, group)
    if len(group) < 4 or not members:
        return
    types = {p.arg: p.annotation for name in members for p in parameters(_function(program, name)) if p.arg in group}
    holder = fresh("run", {name for member in members for name in bound_in(_function(program, member))} | bound_in(fit))
    for name in members:
        _take_in(program, name, group, holder)
    _pass_on(program, fit, members, group, holder)
    made = _made_anew(program, fit, types)
    _make(fit, [name for name in types if name not in made], holder)
    _read_from(fit, made, holder)
    program.nodes["PlainRun"] = _record(types, made)
    program.nodes = {"PlainRun": program.nodes.pop("PlainRun"), **program.nodes}


def _functions(program: Program, root: str) -> list[ast.FunctionDef]:
    """Return the functions that only `root` leads to."""
    others = reached_from(program, program.roots - {root})
    return [
        n for name, n in program.nodes.items() if isinstance(n, ast.FunctionDef) and name not in others and name != root
    ]


def reached_from(program: Program, names: Iterable[str]) -> set[str]:
    """Return these definitions, and all that they use."""
    reached: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in reached and name in program.nodes:
            reached.add(name)
            waiting += free_names(program.nodes[name])
    return reached


def _function(program: Program, name: str) -> ast.FunctionDef:
    function = program.function(name)
    assert function is not None
    return function


def _shared(program: Program, fit: ast.FunctionDef, largest: ast.FunctionDef) -> set[str]:
    """Return the parameters of a function that are one value all through: bound once in `fit`, passed on by its name everywhere."""
    count, own = assignments(fit.body), {p.arg for p in parameters(fit)}
    first = assignments([s for s in fit.body if isinstance(s, (ast.Assign, ast.AnnAssign))])
    group = {p.arg for p in parameters(largest) if count[p.arg] == first[p.arg] and count[p.arg] + (p.arg in own) == 1}
    for function in _functions(program, fit.name):
        for parameter in parameters(function):
            for call in program.calls(function.name) or []:
                value = (arguments_of(call, function) or {}).get(parameter.arg)
                if parameter.arg in group and not (isinstance(value, ast.Name) and value.id == parameter.arg):
                    group.discard(parameter.arg)
    return group


def _members(program: Program, root: str, group: Set[str]) -> list[str]:
    """Return the functions that get the record: those that need four of what is in it, and those that call one of them."""
    return [
        f.name
        for f in _functions(program, root)
        if sum(p.arg in group for p in parameters(f)) >= 4 and program.calls(f.name) and not f.decorator_list
    ]


def _take_in(program: Program, name: str, group: Set[str], holder: str) -> None:
    """Give a function the record in place of what is in it."""
    function = _function(program, name)
    calls = program.calls(name) or []
    mine = [p.arg for p in parameters(function) if p.arg in group]
    for parameter in mine:
        drop_parameter(function, calls, parameter)
    function.args.args.insert(0, ast.arg(holder, ast.Name("PlainRun", ast.Load())))
    for call in calls:
        call.args.insert(0, ast.Name(holder, ast.Load()))
    function.body = substituted(
        function.body, {n: ast.Attribute(ast.Name(holder, ast.Load()), n, ast.Load()) for n in mine}
    )


def _pass_on(program: Program, fit: ast.FunctionDef, members: list[str], group: Set[str], holder: str) -> None:
    """See that every function that passes the record on has it."""
    changed = True
    while changed:
        changed = False
        for function in _functions(program, fit.name):
            uses = any(isinstance(n, ast.Name) and n.id == holder for n in walk(function.body))
            if uses and holder not in [p.arg for p in parameters(function)]:
                _take_in(program, function.name, group, holder)
                members.append(function.name)
                changed = True


def _made_anew(program: Program, fit: ast.FunctionDef, names: Iterable[str]) -> dict[str, ast.expr]:
    """Return what the record can make itself, as nothing is needed for it, and leave it out of `fit`."""
    made: dict[str, ast.expr] = {}
    for statement in list(fit.body):
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value, name = getattr(statement, "value", None), target.id if isinstance(target, ast.Name) else ""
        if name not in names:
            continue
        if isinstance(value, (ast.List, ast.Dict)) and not ast.unparse(value).strip("[]{}"):
            made[name] = ast.Name("list" if isinstance(value, ast.List) else "dict", ast.Load())
        elif isinstance(value, ast.Call) and not (value.args or value.keywords):
            made |= {name: value.func} if dotted(value.func) in (*program.nodes, "time.monotonic") else {}
        if name in made:
            fit.body.remove(statement)
    return made


def _read_from(fit: ast.FunctionDef, made: Iterable[str], holder: str) -> None:
    """Read what the record makes from it."""
    values: dict[str, ast.expr] = {n: ast.Attribute(ast.Name(holder, ast.Load()), n, ast.Load()) for n in made}
    fit.body = substituted(fit.body, values)


def _make(fit: ast.FunctionDef, names: list[str], holder: str) -> None:
    """Make the record in `fit`, behind the last of what is in it."""
    own = {p.arg for p in parameters(fit)}
    last = max(
        (i for i, s in enumerate(fit.body) if set(assignments([s])) & (set(names) - own)),
        default=-1,
    )
    keywords = [ast.keyword(name, ast.Name(name, ast.Load())) for name in names]
    fit.body.insert(
        last + 1, ast.Assign([ast.Name(holder, ast.Store())], ast.Call(ast.Name("PlainRun", ast.Load()), [], keywords))
    )


def _record(types: dict[str, ast.expr | None], made: Mapping[str, ast.expr]) -> ast.ClassDef:
    fields: list[ast.stmt] = []
    for name in sorted(types, key=made.__contains__):  # those with defaults come last
        default = None
        if name in made:
            default = ast.Call(ast.Name("field", ast.Load()), [], [ast.keyword("default_factory", made[name])])
        kind = types[name] or ast.Name("Any", ast.Load())
        fields.append(ast.AnnAssign(ast.Name(name, ast.Store()), kind, default, 1))
    docstring = ast.Expr(ast.Constant("What the functions below work on."))
    return ast.ClassDef("PlainRun", [], [], [docstring, *fields], [ast.Name("dataclass", ast.Load())])
