"""Constants that reach objects: arguments that are the same in all calls of a method, attributes that never change."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import nn

from sheer.eject.expressions import dotted, is_constant, is_pure
from sheer.eject.fold import Known, fold
from sheer.eject.inline import without_docstring
from sheer.eject.program import Program, arguments_of, drop_parameter, replace_argument, replace_parameter
from sheer.eject.records import fields_of, holders_of
from sheer.eject.scope import assignments, bodies_of, bound_in, default_of, parameters, reads, walk
from sheer.eject.source import notes_of, with_notes

_OTHERS = (dict, list, set, str, bytes, tuple, Path, torch.Tensor, nn.Module, torch.optim.Optimizer)


def bind_methods(program: Program, known: Known, kept: Set[str] = frozenset()) -> None:
    """Put arguments that are the same constant in all calls of a method, or of a constructor, into the method itself.

    Parameters that it does not read go. `kept` are names of attributes that the script reads, so that it may call these methods.
    """
    users = _users(program)
    for node in list(program.nodes.values()):
        if not isinstance(node, ast.ClassDef):
            continue
        out_of_reach = kept | {"__init__"} if node.name in program.roots else frozenset()
        for method in (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.decorator_list):
            calls = _calls(program, node, method, users) if method.name not in out_of_reach else None
            if calls:
                own = method.args.args.pop(0)
                _bind(method, calls, known)
                _without_unread(method, calls)
                method.args.args.insert(0, own)


def pass_fields(program: Program, records: Sequence[str], kept: Set[str]) -> None:
    """Give methods that only read fields of a record these fields, so that no object needs the record as a whole."""
    for node in [node for node in program.nodes.values() if isinstance(node, ast.ClassDef)]:
        for method in (m for m in node.body if isinstance(m, ast.FunctionDef) and m.name not in kept):
            for parameter in parameters(method)[1:]:
                record = program.nodes.get(dotted(parameter.annotation or parameter) or "")
                if isinstance(record, ast.ClassDef) and record.name in records:
                    _pass_fields_of(program, node, method, parameter, record)


def _pass_fields_of(
    program: Program, node: ast.ClassDef, method: ast.FunctionDef, parameter: ast.arg, record: ast.ClassDef
) -> None:
    uses = [n for n in walk(method.body) if isinstance(n, ast.Name) and n.id == parameter.arg]
    read = [
        n for n in walk(method.body) if isinstance(n, ast.Attribute) and n.value in uses and isinstance(n.ctx, ast.Load)
    ]
    names = [name for name in fields_of(record) if name in {n.attr for n in read}]
    calls = _calls(program, node, method, _users(program))
    if len(uses) != len(read) or {n.attr for n in read} - set(names) or set(names) & bound_in(method) or not calls:
        return
    if not _all_are_told_apart(program, node, method.name, calls):
        return
    bare = copy.copy(method)
    bare.args = copy.copy(method.args)
    bare.args.args = method.args.args[1:]
    given = [(arguments_of(call, bare) or {}).get(parameter.arg) for call in calls]
    if any(value is None or dotted(value) is None for value in given):
        return
    for call, value in zip(calls, given, strict=True):
        assert value is not None
        replace_argument(call, value, names, [ast.Attribute(copy.deepcopy(value), name, ast.Load()) for name in names])
    method.body = [_Fields(parameter.arg).visit(statement) for statement in method.body]
    new = [ast.arg(name, copy.deepcopy(fields_of(record)[name].annotation)) for name in names]
    replace_parameter(method, parameter.arg, new)


def _all_are_told_apart(program: Program, node: ast.ClassDef, name: str, calls: list[ast.Call]) -> bool:
    """Whether each method of a name that is called is one of these, or known to be that of another class."""
    known = {id(call.func) for call in calls}
    others = [part.name for part in program.nodes.values() if isinstance(part, ast.ClassDef) and part is not node]
    return all(
        id(use) in known or any(_is_of(program, function, use.value, other) for other in others)
        for function in program.functions()
        for use in walk(function.body)
        if isinstance(use, ast.Attribute) and use.attr == name
    )


class _Fields(ast.NodeTransformer):
    """Reads names in place of a record's fields."""

    def __init__(self, holder: str) -> None:
        self.holder = holder

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == self.holder:
            return ast.Name(node.attr, ast.Load())
        self.generic_visit(node)
        return node


def drop_idle_methods(program: Program, kept: Set[str]) -> None:
    """Leave out calls of methods that have nothing left to do."""
    users = _users(program)
    for node in [node for node in program.nodes.values() if isinstance(node, ast.ClassDef)]:
        for method in [part for part in node.body if isinstance(part, ast.FunctionDef) and not part.decorator_list]:
            rest = [part for part in without_docstring(method.body) if not isinstance(part, ast.Pass)]
            calls = _calls(program, node, method, users) if not rest and method.name not in kept else None
            gone = {id(call) for call in calls or []}
            for function in program.functions() if gone else ():
                function.body = [s for s in map(_Without(gone).visit, function.body) if s is not None] or [ast.Pass()]


class _Without(ast.NodeTransformer):
    def __init__(self, gone: Set[int]) -> None:
        self.gone = gone

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        return ast.Pass() if id(node.value) in self.gone else node


def call_for_nothing(program: Program) -> None:
    """Write `x = f() or y`, where f is a method that returns nothing, as two statements."""
    idle = {
        (node.name, part.name)
        for node in program.nodes.values()
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.FunctionDef) and is_constant(part.returns, None)
    }
    for function in program.functions():
        for body in bodies_of(function):
            for index in range(len(body) - 1, -1, -1):
                statement = body[index]
                value = statement.value if isinstance(statement, ast.Assign) else None
                if not (isinstance(value, ast.BoolOp) and isinstance(value.op, ast.Or)):
                    continue
                called = value.values[0]
                if isinstance(called, ast.Call) and isinstance(called.func, ast.Attribute):
                    owner, name = called.func.value, called.func.attr
                    if any(name == own and _is_of(program, function, owner, kind) for kind, own in idle):
                        rest = value.values[1] if len(value.values) == 2 else ast.BoolOp(ast.Or(), value.values[1:])
                        assert isinstance(statement, ast.Assign)
                        notes = notes_of(statement)
                        new = ast.Assign(statement.targets, rest)
                        body[index : index + 1] = [with_notes(ast.Expr(called), notes), new]


def _without_unread(method: ast.FunctionDef, calls: list[ast.Call]) -> None:
    used = reads(method.body)
    for parameter in parameters(method):
        given = [(arguments_of(call, method) or {}).get(parameter.arg) for call in calls]
        if not used[parameter.arg] and all(value is None or is_pure(value) for value in given):
            drop_parameter(method, calls, parameter.arg)


def narrowed(node: ast.ClassDef, calls: list[ast.Call]) -> ast.ClassDef:
    """Return a class whose constructor takes only what one of these calls gives; the defaults of all else are put into it."""
    made = copy.deepcopy(node)
    for method in (m for m in made.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"):
        own = method.args.args.pop(0)
        passed = [arguments_of(call, method) for call in calls]
        for parameter in parameters(method):
            default = default_of(method, parameter.arg)
            if (
                default is not None
                and is_constant(default)
                and all(p is not None and parameter.arg not in p for p in passed)
            ):
                method.body = fold(method.body, Known({parameter.arg: default})) or [ast.Pass()]
                drop_parameter(method, [], parameter.arg)
        method.args.args.insert(0, own)
    return made


def _users(program: Program) -> dict[str, list[ast.FunctionDef]]:
    """Return which functions use an attribute of each name."""
    users: dict[str, list[ast.FunctionDef]] = {}
    for function in program.functions():
        for name in dict.fromkeys(n.attr for n in walk(function.body) if isinstance(n, ast.Attribute)):
            users.setdefault(name, []).append(function)
    return users


def _calls(
    program: Program, node: ast.ClassDef, method: ast.FunctionDef, users: Mapping[str, list[ast.FunctionDef]]
) -> list[ast.Call] | None:
    """Return all calls of a method; None where they cannot be told from others, or it is used as a value."""
    if method.name == "__init__":
        return [
            n
            for n in walk(program.nodes.values())
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == node.name
        ]
    if method.name.startswith("__"):
        return None
    calls: list[ast.Call] = []
    others = sum(f.name == method.name for f in program.functions()) > 1 or any(
        hasattr(k, method.name) for k in _OTHERS
    )
    names: set[str] | None = None  # found where they are asked for, which is seldom
    for function in users.get(method.name, ()):
        uses = [n for n in walk(function.body) if isinstance(n, ast.Attribute) and n.attr == method.name]
        inside = function in node.body
        own = [
            n for n in uses if _is_of(program, function, n.value, node.name) or (inside and dotted(n.value) == "self")
        ]
        if not uses:
            continue
        called = [n for n in walk(function.body) if isinstance(n, ast.Call) and any(n.func is use for use in own)]
        if len(called) != len(own) or (len(own) != len(uses) and not others):
            return None
        if len(own) != len(uses):
            names = _names_of_holders(program, node.name) if names is None else names
            if any((dotted(use.value) or "").split(".")[-1] in names for use in uses if use not in own):
                return None  # it may be one of these, too
        calls += called
    return calls


def _names_of_holders(program: Program, name: str) -> set[str]:
    """Return what parameters, locals and fields that hold an object of a class are called anywhere."""
    names = {holder for function in program.functions() for holder in holders_of(program, function, name)}
    for owner in program.nodes.values():
        for field, declared in fields_of(owner).items() if isinstance(owner, ast.ClassDef) else ():
            names |= {field} if ast.unparse(declared.annotation) == name else set()
    return names


def _is_of(program: Program, function: ast.FunctionDef, value: ast.expr, name: str) -> bool:
    """Whether an expression is an object of a class, by the types of parameters and fields."""
    if isinstance(value, ast.Name):
        return value.id in holders_of(program, function, name)
    if not isinstance(value, ast.Attribute):
        return False
    return any(
        isinstance(owner, ast.ClassDef)
        and value.attr in fields_of(owner)
        and ast.unparse(fields_of(owner)[value.attr].annotation) == name
        and _is_of(program, function, value.value, owner.name)
        for owner in program.nodes.values()
    )


def _bind(method: ast.FunctionDef, calls: list[ast.Call], known: Known) -> None:
    for parameter in parameters(method):
        passed = [arguments_of(call, method) for call in calls]
        given = [None if p is None else p.get(parameter.arg, default_of(method, parameter.arg)) for p in passed]
        first = given[0]
        if first is None or any(value is None or ast.dump(value) != ast.dump(first) for value in given):
            continue
        if assignments(method.body)[parameter.arg]:
            if not (isinstance(first, ast.Constant) and first.value is None and _only_cleared(method, parameter.arg)):
                continue
            method.body = [_Uncleared(parameter.arg).visit(statement) for statement in method.body]
        if isinstance(first, ast.Constant) or (isinstance(first, ast.Name) and first.id in known.constants):
            method.body = fold(method.body, Known({parameter.arg: first}, constants=known.constants)) or [ast.Pass()]
            drop_parameter(method, calls, parameter.arg)


def _only_cleared(method: ast.FunctionDef, name: str) -> bool:
    """Whether all that is ever assigned to a name is None."""
    cleared = [
        n
        for n in walk(method.body)
        if isinstance(n, ast.Assign) and ast.dump(n.targets[0]) == ast.dump(ast.Name(name, ast.Store()))
    ]
    return len(cleared) == assignments(method.body)[name] and all(
        isinstance(n.value, ast.Constant) and n.value.value is None for n in cleared
    )


class _Uncleared(ast.NodeTransformer):
    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        target = node.targets[0]
        return ast.Pass() if isinstance(target, ast.Name) and target.id == self.name else node


def fold_attributes(program: Program, known: Known, kept: Set[str] = frozenset()) -> None:
    """Put attributes that are given one constant, and never another, where they are read; `kept` are those that the script reads."""
    stored = Counter(
        n.attr for n in walk(program.nodes.values()) if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load)
    )
    given = Counter((name, ast.dump(value)) for name, value in _given(walk(program.nodes.values())))
    for node in list(program.nodes.values()):
        if not isinstance(node, ast.ClassDef) or _sets_by_name(node):
            continue
        candidates = [*_set_in(node), *_defaults(program, node)] if node.body else []
        for name, value in candidates:
            constant = isinstance(_without_sign(value), ast.Constant) or (
                isinstance(value, ast.Name) and value.id in known.constants
            )
            if constant and name not in kept and stored[name] == given[name, ast.dump(value)]:
                for function in program.functions():
                    for holder in holders_of(program, function, node.name) + ["self"] * (function in node.body):
                        function.body = fold(function.body, Known({f"{holder}.{name}": value})) or [ast.Pass()]


def _without_sign(value: ast.expr) -> ast.expr:
    return value.operand if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub) else value


def _sets_by_name(node: ast.ClassDef) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "setattr" for n in walk([node]))


def _set_in(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield what methods give to attributes; one that is read before it has none would be an error."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef):
            yield from _given(method.body)


def _given(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Yield what is assigned to attributes, by their names."""
    for statement in nodes:
        if isinstance(statement, ast.Assign):
            pairs = [pair for t in statement.targets for pair in zip(_parts(t), _parts(statement.value), strict=False)]
            yield from ((target.attr, value) for target, value in pairs if isinstance(target, ast.Attribute))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Attribute):
            yield statement.target.attr, statement.value or ast.Name("unknown", ast.Load())


def _parts(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _defaults(program: Program, node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield the defaults of a dataclass's fields that no call of its constructor gives."""
    if not fields_of(node):
        return
    given: set[str] = set()
    for call in walk(program.nodes.values()):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == node.name:
            given |= {keyword.arg or "" for keyword in call.keywords} | set(list(fields_of(node))[: len(call.args)])
    for name, field in fields_of(node).items():
        if field.value is not None and name not in given:
            yield name, field.value
