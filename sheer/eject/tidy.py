"""The last touches: names without numbers, values where they are used once, no word too many."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from sheer.eject.expressions import dotted, is_constant
from sheer.eject.program import BUILTINS, Program
from sheer.eject.records import fields_of
from sheer.eject.scope import assignments, bodies_of, bound_in, parameters, reads, renamed, substituted, walk
from sheer.eject.source import notes_of, with_notes


def tidy_names(program: Program) -> None:
    """Take the number off names that only a function inlined elsewhere, or a record, had made necessary."""
    for function in program.functions():
        for name in sorted(bound_in(function)):
            stem = re.sub(r"(_\d+|__given)+$", "", name)
            free = stem not in bound_in(function) and stem not in reads([function]) and stem not in BUILTINS
            if stem != name and free:
                for parameter in parameters(function):
                    parameter.arg = stem if parameter.arg == name else parameter.arg
                function.body = renamed(function.body, {name: stem})


def use_numbered_directly(program: Program) -> None:
    """Put a value whose name exists only because something was taken apart where it is used, if that is the next statement."""
    for function in program.functions():
        for body in bodies_of(function):
            for index in range(len(body) - 2, -1, -1):
                statement, following = body[index], body[index + 1]
                if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
                    continue
                name = statement.targets[0].id
                once = reads(function.body)[name] == assignments(function.body)[name] == reads([following])[name] == 1
                if isinstance(following, ast.If) and once and ast.unparse(following.test) == name:
                    following.test = statement.value
                    del body[index]
                elif _is_default(statement, following):
                    assert isinstance(following, ast.Assign)
                    following.value = _value_of(substituted([ast.Expr(following.value)], {name: statement.value})[0])
                    del body[index]
                elif once and isinstance(following, ast.Return) and ast.unparse(following.value or statement) == name:
                    body[index : index + 2] = [with_notes(ast.Return(statement.value), notes_of(statement))]
                elif (
                    once
                    and _comes_first(following, name)
                    and (re.search(r"_\d+$", name) or _is_alternative(following) or _is_short(statement, following))
                ):
                    swap = {name: statement.value}
                    body[index : index + 2] = [with_notes(substituted([following], swap)[0], notes_of(following))]


def _is_default(statement: ast.Assign, following: ast.stmt) -> bool:
    """Whether a statement gives a name a constant, and the next gives it something `or` that."""
    if not (isinstance(following, ast.Assign) and is_constant(statement.value)):
        return False
    same = ast.dump(statement.targets[0]) == ast.dump(following.targets[0])
    return (
        same and isinstance(following.value, ast.BoolOp) and reads([following])[ast.unparse(statement.targets[0])] == 1
    )


def _is_short(statement: ast.Assign, following: ast.stmt) -> bool:
    """Whether a value and what is made of it are read as one."""
    targets = following.targets if isinstance(following, ast.Assign) else []
    parts = [statement.value, *targets, getattr(following, "value", None) or statement.value]
    return sum(len(ast.unparse(part)) for part in parts) < 105 and notes_of(statement).behind is None


def _value_of(statement: ast.stmt) -> ast.expr:
    assert isinstance(statement, ast.Expr)
    return statement.value


def _is_alternative(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BoolOp)


def _comes_first(statement: ast.stmt, name: str) -> bool:
    """Whether a simple statement evaluates a name before it calls anything."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)) or statement.value is None:
        return False
    value = statement.value
    for part in _evaluated(value.values[0] if isinstance(value, ast.BoolOp) else value):
        if isinstance(part, ast.Name) and part.id == name:
            return True
        if isinstance(
            part, (ast.Call, ast.Subscript, ast.ListComp, ast.DictComp, ast.GeneratorExp, ast.BoolOp, ast.IfExp)
        ):
            return False
    return False


def _evaluated(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the parts of an expression in the order in which they are evaluated, the whole last."""
    if isinstance(node, (ast.BoolOp, ast.IfExp, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp, ast.Lambda)):
        yield node  # what is inside may not be evaluated, or more than once
        return
    if isinstance(node, ast.Dict):
        inner = [part for pair in zip(node.keys, node.values, strict=True) for part in pair if part is not None]
    elif isinstance(node, ast.Call):
        inner = [node.func, *node.args, *(keyword.value for keyword in node.keywords)]
    else:
        inner = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    for part in inner:
        yield from _evaluated(part)
    yield node


def drop_constants(program: Program) -> None:
    """Leave out statements that are only a constant, but for docstrings."""
    for function in program.functions():
        for body in bodies_of(function):
            if body:
                kept = [s for i, s in enumerate(body) if not _is_idle_constant(s, body is function.body and i == 0)]
                body[:] = kept or [ast.Pass()]


def _is_idle_constant(statement: ast.stmt, may_be_docstring: bool) -> bool:
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
        return False
    return not (may_be_docstring and isinstance(statement.value.value, str))


def pass_in_order(program: Program) -> None:
    """Make an object of a dataclass by position where that takes one line instead of many: each value tells its field."""
    records = {n.name: list(fields_of(n)) for n in program.nodes.values() if isinstance(n, ast.ClassDef)}
    for function in program.functions():
        for call in [node for node in walk(function.body) if isinstance(node, ast.Call)]:
            fields = records.get(dotted(call.func) or "", [])
            values = {keyword.arg: keyword.value for keyword in call.keywords}
            if call.args or not values or values.keys() - set(fields) or set(fields[: len(values)]) != values.keys():
                continue
            line = ast.Call(call.func, [values[name] for name in fields if name in values], [])
            if len(ast.unparse(call)) > 100 > len(ast.unparse(line)):
                call.args, call.keywords = line.args, []
