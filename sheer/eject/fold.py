"""Folding: expressions whose value is known become it, and branches that are never taken go."""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from sheer.eject.expressions import (
    bindings,
    condition,
    dotted,
    elements,
    is_constant,
    is_pure,
    is_value_of_torch,
    item_of,
    negated,
    truth,
    without_asking_again,
)
from sheer.eject.source import Notes, notes_of, with_notes

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass(frozen=True)
class Known:
    """What is known where a statement stands.

    Attributes:
        values: names and dotted names with the constants or displays that they stand for.
        present: names and dotted names that are not None.
        absent: classes of which there is no object, so that `isinstance` says no.
        always: classes that all that is asked about them is of, so that `isinstance` says yes.
        answers: functions whose result is known where they are called, each with what gives it for a call.
        constants: the values of names that stay, as those of settings do.
        kinds: names with the class that they are of, and of which its subclasses are not asked about.
        tables: the library's dicts of constants.
    """

    values: Mapping[str, ast.expr] = field(default_factory=dict)
    present: Set[str] = frozenset()
    absent: Set[str] = frozenset()
    always: Set[str] = frozenset()
    answers: Mapping[str, Callable[[ast.Call], ast.expr | None]] = field(default_factory=dict)
    constants: Mapping[str, int | float | str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, ast.Dict] = field(default_factory=dict)

    def value_of(self, node: ast.expr) -> ast.expr:
        """Return the constant that a name stands for, or the node itself."""
        if isinstance(node, ast.Name) and node.id in self.constants:
            return ast.Constant(self.constants[node.id])
        return node


def fold(body: list[ast.stmt], known: Known) -> list[ast.stmt]:
    """Return statements with what is known put in, and what is never reached left out."""
    out: list[ast.stmt] = []
    for statement in body:
        new = _Folder(known).visit(statement)
        out += new if isinstance(new, list) else [new]
        if out and isinstance(out[-1], (ast.Return, ast.Raise, ast.Break, ast.Continue)):
            break
    return out


def fold_expression(expression: ast.expr, known: Known) -> ast.expr:
    """Return an expression with what is known put in."""
    folded: ast.expr = _Folder(known).visit(copy.deepcopy(expression))
    return folded


class _Folder(ast.NodeTransformer):
    def __init__(self, known: Known) -> None:
        self.known = known

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Fold statement lists as `fold` does, and expressions part by part."""
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, name, fold(value, self.known))
            elif isinstance(value, list):
                setattr(node, name, [self.visit(item) if isinstance(item, ast.AST) else item for item in value])
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        return node

    # Expressions

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._looked_up(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        found = self._looked_up(node)
        if found is node:
            self.generic_visit(node)
        return found

    def _looked_up(self, node: ast.Name | ast.Attribute) -> ast.expr:
        value = self.known.values.get(dotted(node) or "") if isinstance(node.ctx, ast.Load) else None
        return copy.deepcopy(value) if value is not None else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) != 1:
            return node
        left, op, right = self.known.value_of(node.left), node.ops[0], self.known.value_of(node.comparators[0])
        if isinstance(op, (ast.Is, ast.IsNot)) and is_constant(right, None) and self._is_present(left):
            return ast.Constant(isinstance(op, ast.IsNot))
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant) and type(op) in _COMPARE:
            return ast.Constant(_COMPARE[type(op)](left.value, right.value))
        if (
            isinstance(op, (ast.In, ast.NotIn))
            and isinstance(left, ast.Constant)
            and isinstance(right, (ast.Tuple, ast.List))
        ):
            choices = [item.value for item in right.elts if isinstance(item, ast.Constant)]
            if len(choices) == len(right.elts):
                return ast.Constant(is_constant(left, *choices) == isinstance(op, ast.In))
        return node

    def _is_present(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Constant):
            return node.value is not None
        if isinstance(node, (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.JoinedStr, ast.Lambda)):
            return is_pure(node)
        return dotted(node) in self.known.present or is_value_of_torch(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        flat = [part for value in node.values for part in _operands(value, type(node.op))]
        node.values = flat
        values: list[ast.expr] = []
        for index, value in enumerate(node.values):
            known = truth(self.known.value_of(value))
            if known is decides:
                values.append(value)
                break
            if known is None or index == len(node.values) - 1:
                values.append(value)
        if len(values) > 1 and is_constant(values[-1], not decides) and all(map(_is_bool, values[:-1])):
            values.pop()  # `a is b or False`
        if decides is False and len(values) > 1 and truth(values[-1]) is False and all(map(is_pure, values)):
            return values[-1] if is_constant(values[-1], False) else node
        return values[0] if len(values) == 1 else ast.BoolOp(node.op, values)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        known = truth(node.operand)
        return ast.Constant(not known) if isinstance(node.op, ast.Not) and known is not None else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        node.test = condition(self.visit(node.test))
        known = truth(node.test)
        if known is not None:
            branch: ast.expr = self.visit(node.body if known else node.orelse)
            return branch
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        if is_pure(node.test) and ast.dump(node.body) == ast.dump(node.orelse):
            return node.body
        if _is_bool(node.test) and is_constant(node.body, True) and is_constant(node.orelse, False):
            return node.test
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        left, right = node.left, node.right
        if isinstance(node.op, ast.Add) and (is_constant(left, "") or is_constant(right, "")):
            return right if is_constant(left, "") else left
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant) and isinstance(node.op, ast.Add):
            return ast.Constant(left.value + right.value) if type(left.value) is type(right.value) is int else node
        if (
            isinstance(node.op, ast.BitOr)
            and isinstance(left, ast.Dict)
            and isinstance(right, ast.Dict)
            and None not in left.keys
        ):
            return ast.Dict([*left.keys, *right.keys], [*left.values, *right.values])
        if isinstance(node.op, ast.Mult) and is_constant(left, 0) and isinstance(right, ast.Attribute):
            return left
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        part = node.slice if isinstance(node.slice, ast.Slice) and isinstance(node.value, ast.Call) else None
        if part is not None and part.lower is part.step is None and is_constant(part.upper, None):
            return node.value  # all of what was made here
        if isinstance(node.ctx, ast.Load) and is_pure(node.value):
            found = None
            if isinstance(node.slice, ast.Slice) and elements(node.value) == []:
                return node.value
            if isinstance(node.slice, ast.Constant):
                known = self.known.values.get(f"{dotted(node.value)}.{node.slice.value!s}")
                found = item_of(node.value, node.slice.value) if known is None else known
            elif isinstance(node.slice, ast.Name) and isinstance(node.value, ast.Dict):
                keys = [ast.unparse(key) for key in node.value.keys if key is not None]
                found = node.value.values[keys.index(node.slice.id)] if node.slice.id in keys else None
            return copy.deepcopy(found) if found is not None else node
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name, called = dotted(node.func), node.func
        if name is not None and name in self.known.answers:
            answer = self.known.answers[name](node)
            return node if answer is None else answer
        if name == "isinstance" and len(node.args) == 2:
            return self._instance(node)
        items = elements(node.args[0]) if name == "len" and is_pure(node.args[0]) else None
        if items is not None:
            return ast.Constant(len(items))
        if name == "sorted":
            node.keywords = [k for k in node.keywords if not (k.arg == "reverse" and is_constant(k.value, False))]
            return node if elements(node.args[0]) != [] else ast.List([], ast.Load())
        if name == "dict" and len(node.args) == 1 and isinstance(node.args[0], ast.Dict) and not node.keywords:
            return node.args[0]
        if name == "sum" and len(node.args) == 1 and isinstance(node.args[0], ast.List) and len(node.args[0].elts) == 1:
            return node.args[0].elts[0]
        if isinstance(called, ast.Attribute):
            owner = called.value
            table = self.known.tables.get(owner.id) if isinstance(owner, ast.Name) else owner
            if isinstance(table, ast.Dict) and is_pure(table) and not (table is not owner and called.attr != "get"):
                return self._dict_method(node, called.attr, table)
        return node

    def _instance(self, node: ast.Call) -> ast.expr:
        classes = node.args[1].elts if isinstance(node.args[1], ast.Tuple) else [node.args[1]]
        kind = self.known.kinds.get(node.args[0].id) if isinstance(node.args[0], ast.Name) else None
        if kind is not None:
            return ast.Constant(kind in [dotted(each) for each in classes])
        if is_pure(node.args[0]) and any(dotted(kind) in self.known.always for kind in classes):
            return ast.Constant(True)
        left = [kind for kind in classes if dotted(kind) not in self.known.absent]
        if not left and is_pure(node.args[0]):
            return ast.Constant(False)
        if left and len(left) < len(classes):
            node.args[1] = left[0] if len(left) == 1 else ast.Tuple(left, ast.Load())
        return node

    def _dict_method(self, node: ast.Call, method: str, display: ast.Dict) -> ast.expr:
        if None in display.keys:
            return node
        keys = [key for key in display.keys if key is not None]
        is_known = isinstance(node.args[0], ast.Constant) if node.args else False
        if method == "get" and (is_known or (not keys and is_pure(node.args[0]))) and all(map(is_constant, keys)):
            key = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            found = item_of(display, key)
            return copy.deepcopy(found) if found else node.args[1] if len(node.args) > 1 else ast.Constant(None)
        if method == "values":
            return ast.Tuple(display.values, ast.Load())
        if method == "items":
            return ast.Tuple(
                [ast.Tuple([key, value], ast.Load()) for key, value in zip(keys, display.values, strict=True)],
                ast.Load(),
            )
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.expr:
        self.generic_visit(node)
        keys: list[ast.expr | None] = []
        values: list[ast.expr] = []
        for key, value in zip(node.keys, node.values, strict=True):
            inner = key is None and isinstance(value, ast.Dict)
            keys += value.keys if inner and isinstance(value, ast.Dict) else [key]
            values += value.values if inner and isinstance(value, ast.Dict) else [value]
        return ast.Dict(keys, values)

    def visit_List(self, node: ast.List) -> ast.expr:
        self.generic_visit(node)
        return ast.List(self._spread(node.elts), node.ctx)

    def _spread(self, given: list[ast.expr]) -> list[ast.expr]:
        """Return the items of a display, those of displays in it among them."""
        items: list[ast.expr] = []
        for item in given:
            inner = elements(item.value) if isinstance(item, ast.Starred) else None
            if isinstance(item, ast.Starred) and isinstance(item.value, ast.GeneratorExp):
                inner = [] if elements(item.value.generators[0].iter) == [] else None
            items += [item] if inner is None else inner
        return items

    def visit_DictComp(self, node: ast.DictComp) -> ast.expr:
        rows = self._rows(node)
        if rows is None:
            return _copied(node) or node
        return ast.Dict(
            [fold_expression(node.key, row) for row in rows], [fold_expression(node.value, row) for row in rows]
        )

    def visit_ListComp(self, node: ast.ListComp) -> ast.expr:
        rows = self._rows(node)
        return node if rows is None else ast.List([fold_expression(node.elt, row) for row in rows], ast.Load())

    def _rows(self, node: ast.DictComp | ast.ListComp) -> list[Known] | None:
        """Fold a comprehension's parts; return what is known in each of its turns, where all of them are."""
        generator = node.generators[0]
        generator.iter = self.visit(generator.iter)
        items = elements(generator.iter)
        if items is not None and len(items) == 1 and len(node.generators) > 1 and not generator.ifs:
            bound = bindings(generator.target, items[0])
            if bound is not None:
                _Folder(replace(self.known, values=bound)).generic_visit(node)
                del node.generators[0]
                return self._rows(node)
        if items is None or len(node.generators) > 1 or generator.is_async or all(map(_is_outside, items or [node])):
            self.generic_visit(node)
            return None
        rows = []
        for item in items:
            bound = bindings(generator.target, item)
            if bound is None:
                self.generic_visit(node)
                return None
            row = replace(self.known, values={**self.known.values, **bound})
            tests = [truth(condition(fold_expression(test, row))) for test in generator.ifs]
            if None in tests:
                self.generic_visit(node)
                return None
            if all(tests):
                rows.append(row)
        return rows

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        self.generic_visit(node)
        parts: list[ast.expr] = []
        for part in node.values:
            if (
                isinstance(part, ast.FormattedValue)
                and is_constant(part.value)
                and part.conversion == -1
                and part.format_spec is None
            ):
                assert isinstance(part.value, ast.Constant)
                part = ast.Constant(str(part.value.value))
            before = parts[-1] if parts else None
            if isinstance(part, ast.Constant) and isinstance(before, ast.Constant):
                parts.pop()
                part = ast.Constant(f"{before.value!s}{part.value!s}")
            parts.append(part)
        if all(isinstance(part, ast.Constant) for part in parts) and len(parts) <= 1:
            return parts[0] if parts else ast.Constant("")
        return ast.JoinedStr(parts)

    # Statements

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        node.test = condition(self.visit(node.test))
        known = truth(node.test)
        if known is None:
            without_asking_again(node)
            node.body, node.orelse = fold(node.body, self.known), fold(node.orelse, self.known)
            if any(not isinstance(statement, ast.Pass) for statement in node.body):
                return node
            if not node.orelse:
                return [] if is_pure(node.test) else ast.Expr(node.test)
            node.test, node.body, node.orelse = negated(node.test), node.orelse, []
            return node
        return _in_place_of(node, fold(node.body if known else node.orelse, self.known))

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:
        node.iter = self.visit(node.iter)
        items = elements(node.iter)
        if items is not None and not node.orelse and not _leaves(node.body):
            turns = [bindings(node.target, item) for item in items]
            if all(turn is not None for turn in turns):
                out: list[ast.stmt] = []
                for turn in turns:
                    row = replace(self.known, values={**self.known.values, **(turn or {})})
                    out += fold([copy.deepcopy(statement) for statement in node.body], row)
                return _in_place_of(node, out)
        node.body, node.orelse = fold(node.body, self.known), fold(node.orelse, self.known)
        return node

    def visit_With(self, node: ast.With) -> ast.stmt | list[ast.stmt]:
        node.items = [self.visit(item) for item in node.items]
        node.items = [item for item in node.items if not _does_nothing(item)]
        node.body = fold(node.body, self.known)
        return node if node.items else _in_place_of(node, node.body)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call) and (dotted(node.value.func) or "").endswith(".update"):
            added = node.value.args[0] if node.value.args else None
            if isinstance(added, ast.Dict) and not added.keys:
                return []
        return [] if is_pure(node.value) and not isinstance(node.value, ast.Constant) else node

    def visit_Try(self, node: ast.Try) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        if node.handlers and all(_only_raises(statement) for statement in node.handlers[-1].body):
            node.handlers.pop()
        if not node.handlers and all(isinstance(statement, ast.Pass) for statement in node.finalbody):
            return _in_place_of(node, node.body)
        return node


def _is_outside(item: ast.expr) -> bool:
    """Whether an item is an attribute of a module: a comprehension over such reads better than a list of what it gives."""
    return isinstance(item, ast.Attribute)


def _copied(node: ast.DictComp) -> ast.expr | None:
    """Return the mapping that a comprehension only copies."""
    generator = node.generators[0]
    source = generator.iter.func if isinstance(generator.iter, ast.Call) else None
    same = isinstance(generator.target, ast.Tuple) and [ast.unparse(node.key), ast.unparse(node.value)] == [
        ast.unparse(target) for target in generator.target.elts
    ]
    is_copy = same and len(node.generators) == 1 and not generator.ifs
    return source.value if is_copy and isinstance(source, ast.Attribute) and source.attr == "items" else None


def _does_nothing(item: ast.withitem) -> bool:
    called = item.context_expr
    return (
        isinstance(called, ast.Call)
        and dotted(called.func) == "nullcontext"
        and not called.args
        and item.optional_vars is None
    )


def _operands(value: ast.expr, kind: type[ast.boolop]) -> list[ast.expr]:
    """Return the operands of `a or b` inside of `... or c`."""
    return value.values if isinstance(value, ast.BoolOp) and isinstance(value.op, kind) else [value]


def _only_raises(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (isinstance(statement, ast.Raise) and statement.exc is None)


def _leaves(body: list[ast.stmt]) -> bool:
    """Whether a loop's body has a `break` or `continue` of its own."""
    for statement in body:
        if isinstance(statement, (ast.Break, ast.Continue)):
            return True
        if isinstance(statement, (ast.For, ast.While, ast.FunctionDef, ast.ClassDef)):
            continue
        for name in ("body", "orelse", "finalbody"):
            if _leaves(getattr(statement, name, [])):
                return True
        if any(_leaves(handler.body) for handler in getattr(statement, "handlers", [])):
            return True
    return False


def _in_place_of(gone: ast.stmt, body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements that stand for one that is gone, the first behind the same empty line."""
    if body:
        own, notes = notes_of(body[0]), notes_of(gone)
        body[0] = with_notes(body[0], Notes(own.above, own.behind, own.spaced or notes.spaced))
    return body


def _is_bool(node: ast.expr) -> bool:
    """Whether an expression is surely True or False, as a comparison of what is no array is."""
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))
