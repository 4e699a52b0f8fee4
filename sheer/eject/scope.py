"""Which names a function binds and reads, and how they are renamed or replaced."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """Return a function's parameters in order, keyword-only ones last."""
    arguments = function.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def default_of(function: ast.FunctionDef, name: str) -> ast.expr | None:
    """Return the default of a parameter, or None where it has none."""
    positional = [*function.args.posonlyargs, *function.args.args]
    with_default = positional[len(positional) - len(function.args.defaults) :]
    for argument, value in zip(with_default, function.args.defaults, strict=True):
        if argument.arg == name:
            return value
    for argument, keyword_value in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if argument.arg == name:
            return keyword_value
    return None


def walk(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield all nodes of several trees, each before what is in it; contexts and operators, which hold nothing, are left out."""
    waiting = list(nodes)
    waiting.reverse()
    while waiting:
        node = waiting.pop()
        yield node
        kind = node.__class__
        if kind in _HOLD_NOTHING:
            continue
        fields = _FIELDS.get(kind)
        if fields is None:
            fields = _FIELDS[kind] = tuple(name for name in node._fields[::-1] if name not in _LEAVES)
        for name in fields:
            value = getattr(node, name, None)
            if value is None:
                continue
            if value.__class__ is not list:
                waiting.append(value)
            elif value:
                waiting += [part for part in value[::-1] if part is not None]


# Fields that hold no nodes.
_LEAVES = frozenset(
    (
        "ctx", "op", "ops", "id", "attr", "arg", "asname", "conversion", "is_async", "kind", "kwd_attrs", "level", "module", "name", "rest", "simple", "type_comment",
    )
)  # fmt: skip
_HOLD_NOTHING = frozenset(
    {ast.Name, ast.Constant, ast.Global, ast.Nonlocal, ast.Pass, ast.Break, ast.Continue, ast.MatchSingleton}
)
# Of each other kind of node the fields that may hold others, the last first.
_FIELDS: dict[type[ast.AST], tuple[str, ...]] = {}


def statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield statements, and those inside of them, with handlers and cases, each before what is in it; no expressions."""
    for part in body:
        yield part
        for name in ("body", "handlers", "cases", "orelse", "finalbody"):
            inner = getattr(part, name, None)
            if isinstance(inner, list):
                yield from statements(inner)


def _targets(node: ast.AST) -> set[str]:
    return {part.id for part in walk([node]) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def assignments(body: Iterable[ast.stmt]) -> Counter[str]:
    """Count how often each local name is bound in statements; those of comprehensions are their own."""
    count: Counter[str] = Counter()
    nodes = list(walk(body))
    inner = {
        id(part)
        for node in nodes
        if isinstance(node, _COMPREHENSIONS)
        for g in node.generators
        for part in walk([g.target])
    }
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)) and id(node) not in inner:
            count[node.id] += 1
        elif isinstance(node, ast.ExceptHandler) and node.name:
            count[node.name] += 1
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            count.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
            count[node.name] += 1
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            count[node.target.id] += 1
    return count


def reads(nodes: Iterable[ast.AST]) -> Counter[str]:
    """Count how often each name is read, annotations included."""
    return Counter(node.id for node in walk(nodes) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))


def own_reads(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that are read, but for those that a comprehension reads of its own."""
    names: set[str] = set()
    for node in nodes:
        inner = own_reads(ast.iter_child_nodes(node))
        if isinstance(node, _COMPREHENSIONS):
            inner -= {name for generator in node.generators for name in _targets(generator.target)}
        names |= inner
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
    return names


def bound_in(function: ast.FunctionDef) -> set[str]:
    """Return all names that are local to a function, those of its comprehensions too."""
    names = {argument.arg for argument in parameters(function)} | set(assignments(function.body))
    names |= {argument.arg for argument in (function.args.vararg, function.args.kwarg) if argument is not None}
    for node in walk(function.body):
        if isinstance(node, _COMPREHENSIONS):
            for generator in node.generators:
                names |= _targets(generator.target)
    return names


class _Replaced(ast.NodeTransformer):
    def __init__(self, replace: Callable[[ast.Name], ast.expr | None]) -> None:
        self.replace = replace

    def visit_Name(self, node: ast.Name) -> ast.expr:
        new = self.replace(node)
        return node if new is None else new

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        if node.name:
            new = self.replace(ast.Name(node.name, ast.Store()))
            node.name = new.id if isinstance(new, ast.Name) else node.name
        return self.generic_visit(node)


def substituted(body: Iterable[ast.stmt], values: Mapping[str, ast.expr]) -> list[ast.stmt]:
    """Return copies of statements with names replaced by expressions; a name that is assigned must be replaced by a name."""

    transformer = _Replaced(_Substitution(values).of)
    return [transformer.visit(copy.deepcopy(statement)) for statement in body]


class _Substitution:
    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self.values = values

    def of(self, node: ast.Name) -> ast.expr | None:
        value = self.values.get(node.id)
        if value is None:
            return None
        if isinstance(value, ast.Name):
            return ast.Name(value.id, node.ctx)
        return copy.deepcopy(value)


def renamed(body: Iterable[ast.stmt], names: Mapping[str, str]) -> list[ast.stmt]:
    """Return copies of statements with local names renamed."""
    return substituted(body, {old: ast.Name(new, ast.Load()) for old, new in names.items()})


def fresh(name: str, taken: set[str]) -> str:
    """Return a name that is not taken: the name itself, or with a number."""
    if name not in taken:
        return name
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def bodies_of(function: ast.FunctionDef) -> list[list[ast.stmt]]:
    """Return all lists of statements in a function, its own first."""
    found = [getattr(node, field, None) for node in statements([function]) for field in ("body", "orelse", "finalbody")]
    return [body for body in found if isinstance(body, list)]
