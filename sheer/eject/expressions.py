"""Expressions: what can be seen of them without running anything."""

from __future__ import annotations

import ast

from sheer.eject.scope import walk

_READS = (
    ast.Name, ast.Attribute, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Subscript, ast.Slice,
    ast.IfExp, ast.JoinedStr, ast.FormattedValue, ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def is_constant(node: ast.AST | None, *values: object) -> bool:
    """Whether a node is a constant; with values, whether it is one of them."""
    if not isinstance(node, ast.Constant):
        return False
    return not values or any(
        node.value is value or (type(node.value) is type(value) and node.value == value) for value in values
    )


def parsed(text: str) -> ast.expr:
    """Return an expression as a tree."""
    return ast.parse(text, mode="eval").body


def truth(node: ast.expr) -> bool | None:
    """Return whether an expression is true, where that can be seen."""
    if isinstance(node, ast.Constant):
        return bool(node.value)
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)) and not any(
        isinstance(item, ast.Starred) for item in node.elts
    ):
        return bool(node.elts) if all(is_pure(item) for item in node.elts) else None
    if isinstance(node, ast.Dict) and is_pure(node) and None not in node.keys:
        return bool(node.keys)
    return None


def is_pure(node: ast.AST) -> bool:
    """Whether an expression can be left out, or evaluated twice, without a difference: it only reads."""
    return all(isinstance(part, _READS) for part in walk([node]))


_IDLE = frozenset(
    {
        "secrets.token_hex", "set", "sum", "len", "list", "dict", "tuple", "str", "int", "float", "bool", "hasattr", "isinstance", "Path",
        "torch.device", "torch.initial_seed", "nullcontext", "Events", "id", "share", "dist.get_rank", "dist.get_world_size", "linked",
        "count_steps",
    }
)  # fmt: skip


_IDLE_METHODS = frozenset({"startswith", "get", "items", "keys", "values", "copy", "parameters", "named_parameters"})


def is_idle(node: ast.AST) -> bool:
    """Whether an expression can be left out: what it calls does nothing but return."""
    for part in walk([node]):
        if isinstance(part, ast.Call):
            method = part.func.attr if isinstance(part.func, ast.Attribute) else ""
            takes = dotted(part.func) == "next" and not isinstance(part.args[0], ast.GeneratorExp)  # from what goes on
            if takes or (dotted(part.func) not in {*_IDLE, "next"} and method not in _IDLE_METHODS):
                return False
        elif isinstance(part, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)):
            return False
    return True


def is_value_of_torch(node: ast.AST) -> bool:
    """Whether an expression is an attribute of the module torch, as `torch.float32` is."""
    return isinstance(node, ast.Attribute) and (dotted(node) or "").startswith("torch.")


def dotted(node: ast.AST) -> str | None:
    """Return `a.b.c` for such an expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner is not None else None
    return None


def item_of(display: ast.expr, key: object) -> ast.expr | None:
    """Return what a display holds under a key or index."""
    if isinstance(display, ast.Dict):
        for own, value in zip(display.keys, display.values, strict=True):
            if is_constant(own, key):
                return value
    if (
        isinstance(display, (ast.Tuple, ast.List))
        and isinstance(key, int)
        and -len(display.elts) <= key < len(display.elts)
    ):
        return display.elts[key]
    return None


def elements(node: ast.expr) -> list[ast.expr] | None:
    """Return what iterating over an expression gives, where that can be seen."""
    if isinstance(node, (ast.Tuple, ast.List)) and not any(isinstance(item, ast.Starred) for item in node.elts):
        return node.elts
    if isinstance(node, ast.Dict) and None not in node.keys:
        return [key for key in node.keys if key is not None]
    if isinstance(node, ast.Call) and dotted(node.func) == "reversed":
        items = elements(node.args[0])
        return None if items is None else items[::-1]
    return None


def bindings(target: ast.expr, value: ast.expr) -> dict[str, ast.expr] | None:
    """Return which names a loop's target binds to what, where all of that may stand in the names' place."""
    if isinstance(target, ast.Name):
        return {target.id: value} if is_pure(value) else None
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        out: dict[str, ast.expr] = {}
        for name, item in zip(target.elts, value.elts, strict=True):
            inner = bindings(name, item)
            if inner is None:
                return None
            out.update(inner)
        return out
    return None


def without_asking_again(node: ast.If) -> None:
    """Leave out an `elif` that asks what the `if` before it has asked."""
    test = node.test
    is_class = isinstance(test, ast.Call) and dotted(test.func) == "isinstance" and all(map(is_pure, test.args))
    while (is_class or is_pure(test)) and len(node.orelse) == 1:
        again = node.orelse[0]
        if not isinstance(again, ast.If) or ast.dump(again.test) != ast.dump(test):
            break
        node.orelse = again.orelse


def condition(node: ast.expr) -> ast.expr:
    """Simplify an expression of which only the truth counts."""
    if isinstance(node, ast.IfExp) and is_constant(node.body, True):
        return condition(ast.BoolOp(ast.Or(), [node.test, node.orelse]))
    if isinstance(node, ast.BoolOp):
        neutral = isinstance(node.op, ast.And)
        values = [condition(value) for value in node.values]
        values = [value for value in values if truth(value) is not neutral]
        if not values:
            return ast.Constant(neutral)
        return values[0] if len(values) == 1 else ast.BoolOp(node.op, values)
    return node


def negated(node: ast.expr) -> ast.expr:
    """Return an expression that is true where another is not."""
    opposite: dict[type[ast.cmpop], type[ast.cmpop]] = {
        ast.Is: ast.IsNot,
        ast.IsNot: ast.Is,
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
        ast.In: ast.NotIn,
        ast.NotIn: ast.In,
    }
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in opposite:
        return ast.Compare(node.left, [opposite[type(node.ops[0])]()], node.comparators)
    return ast.UnaryOp(ast.Not(), node)
