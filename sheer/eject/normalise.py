"""Equal code in a form that the other passes see more in."""

from __future__ import annotations

import ast

from sheer.eject.expressions import dotted, is_pure
from sheer.eject.program import Program
from sheer.eject.scope import assignments, bound_in, fresh, parameters, reads, renamed
from sheer.eject.source import Notes, notes_of, with_notes


def normalise(program: Program) -> None:
    """Split assignments of several names, give each value of a name a name of its own, and write conditional returns as expressions."""
    for function in program.functions():
        function.body = split_tuples(function.body)
        _separate(function)
        function.body = hoisted(function.body, bound_in(function))
        function.body = _conditional_return(function.body)


def split_tuples(body: list[ast.stmt]) -> list[ast.stmt]:
    """Write `a, b = x, y` as two assignments, where x is not changed by the first."""
    out: list[ast.stmt] = []
    for statement in body:
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(statement, name, None)
            if (
                isinstance(inner, list)
                and inner
                and isinstance(inner[0], ast.stmt)
                and not isinstance(statement, ast.ClassDef)
            ):
                setattr(statement, name, split_tuples(inner))
        pairs = _pairs(statement)
        for index, (target, value) in enumerate(pairs):
            new = ast.Assign([target], value)
            out.append(with_notes(new, notes_of(statement) if index == 0 else Notes()))
        if not pairs:
            out.append(statement)
    return out


def _pairs(statement: ast.stmt) -> list[tuple[ast.expr, ast.expr]]:
    """Return the assignments that one of several names stands for; none where the order matters."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return []
    target, value = statement.targets[0], statement.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)):
        return []
    written: set[str] = set()
    for name, item in zip(target.elts, value.elts, strict=True):
        if not isinstance(name, ast.Name) or written & set(reads([item])):
            return []
        written.add(name.id)
    return list(zip(target.elts, value.elts, strict=True))


def _separate(function: ast.FunctionDef) -> None:
    """Give a parameter that gets another value, in a statement that is always reached once, another name from there on."""
    own = {argument.arg for argument in parameters(function)}
    for index, statement in enumerate(function.body):
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            continue
        target = statement.targets[0]
        if not isinstance(target, ast.Name) or target.id not in own or assignments(function.body)[target.id] != 1:
            continue
        name = fresh(target.id, bound_in(function))
        statement.targets = [ast.Name(name, ast.Store())]
        function.body[index + 1 :] = renamed(function.body[index + 1 :], {target.id: name})


def hoisted(body: list[ast.stmt], taken: set[str]) -> list[ast.stmt]:
    """Give what a display holds names of its own where it does something, so that the display may stand where its name does."""
    out: list[ast.stmt] = []
    for statement in body:
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(statement, name, None)
            if isinstance(inner, list) and inner and isinstance(inner[0], ast.stmt):
                setattr(statement, name, hoisted(inner, taken))
        value = statement.value if isinstance(statement, ast.Assign) else None
        if isinstance(value, ast.List) and isinstance(statement, ast.Assign):
            for index, item in enumerate(value.elts):
                if isinstance(item, ast.Call):
                    name = fresh(ast.unparse(statement.targets[0]), taken)
                    taken.add(name)
                    out.append(ast.Assign([ast.Name(name, ast.Store())], item))
                    value.elts[index] = ast.Name(name, ast.Load())
        if (
            isinstance(value, ast.Dict)
            and isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
        ):
            for index, item in enumerate(value.values):
                key = value.keys[index]
                if isinstance(item, ast.Call) and key is not None and is_pure(key):
                    function = dotted(item.func) or ""
                    is_maker = function.startswith("make_") and function.isidentifier()
                    name = fresh(function.removeprefix("make_") if is_maker else statement.targets[0].id, taken)
                    taken.add(name)
                    out.append(ast.Assign([ast.Name(name, ast.Store())], item))
                    value.values[index] = ast.Name(name, ast.Load())
        out.append(statement)
    return out


def _conditional_return(body: list[ast.stmt]) -> list[ast.stmt]:
    """Write `if a: return x` before `return y` as one return."""
    if len(body) < 2:
        return body
    test, last = body[-2], body[-1]
    if not (isinstance(test, ast.If) and not test.orelse and len(test.body) == 1 and isinstance(last, ast.Return)):
        return body
    first = test.body[0]
    if (
        not isinstance(first, ast.Return)
        or first.value is None
        or last.value is None
        or isinstance(last.value, ast.IfExp)
    ):
        return body
    return [*body[:-2], with_notes(ast.Return(ast.IfExp(test.test, first.value, last.value)), notes_of(test))]
