"""What a script can do without: checks of what was found right, notes on errors, and what only they need."""

from __future__ import annotations

import ast
from collections.abc import Set
from dataclasses import dataclass

from sheer.eject.expressions import dotted
from sheer.eject.program import Program
from sheer.eject.scope import walk
from sheer.eject.source import Notes, notes_of, with_notes


@dataclass(frozen=True)
class Needless:
    """What is left out.

    Attributes:
        calls: functions whose calls are left out, where they are statements.
        classes: classes whose objects are left out, with all that is done with them.
        errors: of wrong input; what raises them has been passed when a script is captured.
        handled: errors that only the library deals with; a script lets them through.
    """

    calls: Set[str] = frozenset()
    classes: Set[str] = frozenset()
    errors: Set[str] = frozenset()
    handled: Set[str] = frozenset()


def drop(program: Program, needless: Needless) -> None:
    """Leave out of all functions what is needless."""
    for function in program.functions():
        function.body = _Dropper(needless, _held(function, needless.classes)).body(function.body) or [ast.Pass()]


def _held(function: ast.FunctionDef, classes: Set[str]) -> set[str]:
    """Return the names that objects of some classes are given in a function."""
    if not classes:
        return set()
    return {
        node.targets[0].id
        for node in walk(function.body)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _makes(node.value, classes)
    }


def _makes(value: ast.expr, classes: Set[str]) -> bool:
    return isinstance(value, ast.Call) and dotted(value.func) in classes


class _Dropper:
    def __init__(self, needless: Needless, held: Set[str]) -> None:
        self.needless, self.held = needless, held

    def body(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Return what is left of statements."""
        out: list[ast.stmt] = []
        for statement in statements:
            out += self._left(statement)
        return out

    def _left(self, statement: ast.stmt) -> list[ast.stmt]:
        self._inside(statement)
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            return [] if dotted(statement.value.func) in self.needless.calls else [statement]
        if isinstance(statement, ast.Assign):
            return [] if self._is_needless(statement.value) or self._is_part(statement.targets[0]) else [statement]
        if isinstance(statement, ast.If):
            return self._without_refusals(statement)
        if isinstance(statement, ast.Try):
            return self._without_notes(statement)
        if isinstance(statement, ast.With):
            return self._opened(statement)
        return [statement]

    def _inside(self, statement: ast.stmt) -> None:
        for part in (statement, *getattr(statement, "handlers", []), *getattr(statement, "cases", [])):
            for name in ("body", "orelse", "finalbody"):
                inner = getattr(part, name, None)
                if isinstance(inner, list) and inner and isinstance(inner[0], ast.stmt):
                    setattr(part, name, self.body(inner) or ([ast.Pass()] if name == "body" else []))

    def _is_needless(self, value: ast.expr) -> bool:
        return _makes(value, self.needless.classes) or (isinstance(value, ast.Name) and value.id in self.held)

    def _is_part(self, target: ast.expr) -> bool:
        return isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in self.held

    def _refuses(self, body: list[ast.stmt]) -> bool:
        raised = body[0].exc if len(body) == 1 and isinstance(body[0], ast.Raise) else None
        return isinstance(raised, ast.Call) and dotted(raised.func) in self.needless.errors

    def _without_refusals(self, statement: ast.If) -> list[ast.stmt]:
        """Leave out `if ...: raise` of wrong input, and such an `else`."""
        if self._refuses(statement.orelse):
            statement.orelse = []
        return statement.orelse if self._refuses(statement.body) else [statement]

    def _without_notes(self, statement: ast.Try) -> list[ast.stmt]:
        """Leave out handlers that only say more of an error, and those of errors that a script lets through."""
        statement.handlers = [
            handler
            for handler in statement.handlers
            if not _only_raises(handler.body)
            and not (handler.type is not None and dotted(handler.type) in self.needless.handled)
        ]
        return [statement] if statement.handlers or statement.finalbody else [*statement.body, *statement.orelse]

    def _opened(self, statement: ast.With) -> list[ast.stmt]:
        """Leave out contexts that are needless, and `closing` of a generator, which the end of the script does, too."""
        kept = []
        for item in statement.items:
            value = item.context_expr
            if self._is_needless(value):
                continue
            if (
                isinstance(value, ast.Call)
                and dotted(value.func) == "closing"
                and isinstance(item.optional_vars, ast.Name)
            ):
                _put(statement.body, item.optional_vars.id, value.args[0])
                continue
            kept.append(item)
        if kept:
            statement.items = kept
            return [statement]
        if statement.body:
            with_notes(statement.body[0], Notes(spaced=notes_of(statement).spaced))
        return statement.body


def _only_raises(body: list[ast.stmt]) -> bool:
    """Whether a handler ends in `raise`, and what comes before that only builds what is raised or noted."""
    *before, last = body
    harmless = all(
        isinstance(s, ast.Assign) or (isinstance(s, ast.Expr) and "add_note" in ast.dump(s.value)) for s in before
    )
    return isinstance(last, ast.Raise) and harmless


def _put(body: list[ast.stmt], name: str, value: ast.expr) -> None:
    """Put an expression in the place of the only loop that iterates over a name."""
    for node in walk(body):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Name) and node.iter.id == name:
            node.iter = value
