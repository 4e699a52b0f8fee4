"""The definitions that a script needs, as they are made smaller: what the passes work on."""

from __future__ import annotations

import ast
import builtins
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sheer.eject.scope import bound_in, parameters, walk
from sheer.eject.source import Definable, Definition


class Refusal(Exception):
    """Something cannot be ejected; the message says what, where, and how to make it possible."""


@dataclass
class Program:
    """Definitions by name, and the names of those that the script itself uses."""

    library: Mapping[str, Definition]
    roots: set[str]
    twins: Mapping[str, str] = field(default_factory=dict)  # definitions by the names of those that they stand for
    nodes: dict[str, Definable] = field(default_factory=dict)
    answered: frozenset[str] = (
        frozenset()
    )  # functions whose calls will be answered, and must stay as they are until then

    def collect(self) -> None:
        """Add what is reached from what is there, and drop what is not."""
        reached: dict[str, Definable] = {}
        waiting = sorted(self.roots)
        while waiting:
            name = waiting.pop(0)
            if name in reached:
                continue
            reached[name] = self._with_twins(self.nodes.get(name) or copy.deepcopy(self.library[name].node))
            waiting += [used for used in free_names(reached[name]) if used in self.library or used in self.nodes]
        self.nodes = reached

    def _with_twins(self, node: Definable) -> Definable:
        for part in walk([node]):
            if isinstance(part, ast.Name) and part.id in self.twins:
                part.id = self.twins[part.id]
        return node

    def functions(self) -> Iterator[ast.FunctionDef]:
        """Yield all functions, also the methods of classes."""
        for node in self.nodes.values():
            yield from functions_of(node)

    def function(self, name: str) -> ast.FunctionDef | None:
        """Return a top-level function, or None where there is none of that name."""
        node = self.nodes.get(name)
        return node if isinstance(node, ast.FunctionDef) else None

    def calls(self, name: str) -> list[ast.Call] | None:
        """Return all calls of a function; None where it is also used as a value, so that not all calls can be seen."""
        return self.all_calls().get(name, [])

    def all_calls(self) -> dict[str, list[ast.Call] | None]:
        """Return what `calls` does for all names that are used."""
        uses, calls = uses_in(self.nodes.values())
        return {name: found if len(found := calls.get(name, [])) == count else None for name, count in uses.items()}


def functions_of(node: ast.AST) -> list[ast.FunctionDef]:
    """Return a function, or the methods of a class; nothing else has any."""
    parts = node.body if isinstance(node, ast.ClassDef) else [node]
    return [part for part in parts if isinstance(part, ast.FunctionDef)]


def uses_in(nodes: Iterable[ast.AST]) -> tuple[Counter[str], dict[str, list[ast.Call]]]:
    """Count how often each name stands in some trees, and find where it is called."""
    calls: dict[str, list[ast.Call]] = {}
    uses: Counter[str] = Counter()
    for node in walk(nodes):
        if isinstance(node, ast.Name):
            uses[node.id] += 1
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            calls.setdefault(node.func.id, []).append(node)
    return uses, calls


def free_names(node: ast.AST) -> list[str]:
    """Return the names that a definition reads and does not bind itself, in the order of their first use."""
    names: dict[str, None] = {}
    for part in node.body if isinstance(node, ast.ClassDef) else [node]:
        own = bound_in(part) if isinstance(part, ast.FunctionDef) else set()
        read = [n.id for n in walk([part]) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        names.update({name: None for name in read if name not in own})
    if isinstance(node, ast.ClassDef):
        outside = [*node.bases, *node.keywords, *node.decorator_list]
        names.update({n.id: None for n in walk(outside) if isinstance(n, ast.Name)})
    return list(names)


def arguments_of(call: ast.Call, function: ast.FunctionDef) -> dict[str, ast.expr] | None:
    """Return what a call passes for each parameter, defaults left out; None where `*` or `**` hides it."""
    names = [argument.arg for argument in parameters(function)]
    if function.args.vararg is not None or function.args.kwarg is not None:
        return None
    if any(isinstance(a, ast.Starred) for a in call.args) or any(keyword.arg is None for keyword in call.keywords):
        return None
    out = dict(zip(names, call.args, strict=False))
    out.update({keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None})
    return out


def drop_parameter(function: ast.FunctionDef, calls: Iterable[ast.Call], name: str) -> None:
    """Take a parameter out of a function, and its argument out of the calls."""
    for call in calls:
        positional = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]]
        if name in positional and positional.index(name) < len(call.args):
            del call.args[positional.index(name)]
        call.keywords = [keyword for keyword in call.keywords if keyword.arg != name]
    arguments = function.args
    for index, argument in enumerate(arguments.args):
        if argument.arg == name:
            from_end = len(arguments.args) - index
            if from_end <= len(arguments.defaults):
                del arguments.defaults[len(arguments.defaults) - from_end]
            del arguments.args[index]
            return
    for index, argument in enumerate(arguments.kwonlyargs):
        if argument.arg == name:
            del arguments.kwonlyargs[index]
            del arguments.kw_defaults[index]
            return


def replace_argument(call: ast.Call, value: ast.expr, names: Sequence[str], values: Sequence[ast.expr]) -> None:
    """Pass several arguments, for the parameters of these names, in place of one."""
    for index, argument in enumerate(call.args):
        if argument is value:
            call.args[index : index + 1] = values
            return
    for index, keyword in enumerate(call.keywords):
        if keyword.value is value:
            call.keywords[index : index + 1] = [ast.keyword(n, v) for n, v in zip(names, values, strict=True)]
            return


def replace_parameter(function: ast.FunctionDef, name: str, new: Sequence[ast.arg]) -> None:
    """Put several parameters in the place of one."""
    for arguments in (function.args.posonlyargs, function.args.args, function.args.kwonlyargs):
        for index, argument in enumerate(arguments):
            if argument.arg == name:
                from_end = len(arguments) - index
                if arguments is function.args.args and from_end <= len(function.args.defaults):  # all calls pass it
                    del function.args.defaults[len(function.args.defaults) - from_end]
                arguments[index : index + 1] = new
                return


BUILTINS = frozenset(dir(builtins))
