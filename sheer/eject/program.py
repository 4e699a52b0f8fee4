"""The definitions that a script needs, as they are made smaller: what the passes work on."""

from __future__ import annotations

import ast
import builtins
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sheer.eject.scope import parameters, walk
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

    def collect(self) -> None:
        """Add what is reached from what is there, and drop what is not."""
        reached: dict[str, Definable] = {}
        waiting = sorted(self.roots)
        while waiting:
            name = waiting.pop(0)
            if name in reached:
                continue
            reached[name] = self.nodes.get(name) or self._taken(name)
            waiting += [used for used in names_in([reached[name]]) if used in self.library or used in self.nodes]
        self.nodes = reached

    def _taken(self, name: str) -> Definable:
        node = copy.deepcopy(self.library[name].node)
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in self.twins:
                part.id = self.twins[part.id]
        return node

    def functions(self) -> Iterator[ast.FunctionDef]:
        """Yield all functions, also the methods of classes."""
        for node in self.nodes.values():
            if isinstance(node, ast.FunctionDef):
                yield node
            elif isinstance(node, ast.ClassDef):
                yield from (part for part in node.body if isinstance(part, ast.FunctionDef))

    def function(self, name: str) -> ast.FunctionDef | None:
        """Return a top-level function, or None where there is none of that name."""
        node = self.nodes.get(name)
        return node if isinstance(node, ast.FunctionDef) else None

    def calls(self, name: str) -> list[ast.Call] | None:
        """Return all calls of a function; None where it is also used as a value, so that not all calls can be seen."""
        calls = [
            n
            for n in walk(self.nodes.values())
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name
        ]
        uses = [n for n in walk(self.nodes.values()) if isinstance(n, ast.Name) and n.id == name]
        return calls if len(calls) == len(uses) else None


def names_in(nodes: Iterable[ast.AST]) -> list[str]:
    """Return the names that are read in trees, in the order of their first use; annotations given as strings included."""
    names: dict[str, None] = {}
    for node in walk(nodes):
        if isinstance(node, ast.Name):
            names[node.id] = None
    return list(names)


def arguments_of(call: ast.Call, function: ast.FunctionDef) -> dict[str, ast.expr] | None:
    """Return what a call passes for each parameter, defaults left out; None where `*` or `**` hides it."""
    names = [argument.arg for argument in parameters(function)]
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


BUILTINS = frozenset(dir(builtins))
