"""What is known of local names and parameters goes to where they are read."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Set
from dataclasses import replace

from sheer.eject.fold import Known, fold, is_constant, is_pure
from sheer.eject.program import Program, arguments_of, drop_parameter
from sheer.eject.scope import assignments, bound_in, default_of, parameters, reads, walk


def fold_all(program: Program, known: Known) -> None:
    """Fold every function with what holds everywhere, and with what is known of its own names."""
    for function in program.functions():
        own = _shadowed(known, bound_in(function))
        local = known_locals(function, program, own)
        merged = replace(own, values={**own.values, **local.values}, present=own.present | local.present)
        function.body = fold(function.body, merged) or [ast.Pass()]


def _shadowed(known: Known, names: Set[str]) -> Known:
    """Return what is still known where some names are bound anew; dotted names start with parameters that are marked so."""
    values = {name: value for name, value in known.values.items() if "." in name or name not in names}
    return replace(known, values=values, present=frozenset(n for n in known.present if "." in n or n not in names))


def known_locals(function: ast.FunctionDef, program: Program, known: Known) -> Known:
    """Return which local names stand for constants, for other names, or for displays of those; and which are not None."""
    count = assignments(function.body)
    for argument in parameters(function):
        count[argument.arg] += 1
    values: dict[str, ast.expr] = {}
    present = {a.arg for a in parameters(function) if a.annotation is not None and never_none(a.annotation)} - {
        name for name in count if count[name] > 1
    }
    for node in walk(function.body):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if not isinstance(target, ast.Name) or count[target.id] != 1:
            continue
        if _is_stable(value, count) and (
            not isinstance(value, ast.List | ast.Dict | ast.Set) or not _is_changed(function, target.id)
        ):
            values[target.id] = value
        if isinstance(value, (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.JoinedStr)) or _returns_something(
            value, program
        ):
            present.add(target.id)
    return Known(values, frozenset(present))


def _is_stable(value: ast.expr, count: Mapping[str, int]) -> bool:
    """Whether an expression means the same wherever it stands in the function: constants, and names that are bound once."""
    if isinstance(value, ast.Constant):
        return True
    if isinstance(value, ast.Name):
        return count.get(value.id, 0) <= 1
    if isinstance(value, (ast.Tuple, ast.List)):
        return all(_is_stable(item, count) for item in value.elts)
    if isinstance(value, ast.Dict):
        return all(key is not None and is_constant(key) for key in value.keys) and all(
            _is_stable(v, count) for v in value.values
        )
    return False


def _is_changed(function: ast.FunctionDef, name: str) -> bool:
    """Whether a container may be changed or kept: it is used other than by being read here."""
    harmless: set[int] = set()
    for node in walk(function.body):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            harmless.add(id(node.value))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("get", "values", "items", "keys")
        ):
            harmless.add(id(node.func.value))
        elif isinstance(node, (ast.For, ast.comprehension)):
            harmless.add(id(node.iter))
        elif isinstance(node, ast.BinOp):
            harmless |= {id(node.left), id(node.right)}
        elif isinstance(node, ast.Compare):
            harmless |= {id(part) for part in node.comparators}
    uses = [n for n in walk(function.body) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
    return any(id(use) not in harmless for use in uses)


def never_none(annotation: ast.expr) -> bool:
    """Whether a type, as checked strictly, leaves no room for None."""
    if isinstance(annotation, ast.Constant):
        return isinstance(annotation.value, str) and never_none(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp):
        return never_none(annotation.left) and never_none(annotation.right)
    if isinstance(annotation, ast.Name):
        return annotation.id not in ("Any", "object", "None", "Number")
    return isinstance(annotation, (ast.Attribute, ast.Subscript))


def _returns_something(value: ast.expr, program: Program) -> bool:
    """Whether an expression is a call of a class of the library, or of a function that never returns None."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name)):
        return False
    node = program.nodes.get(value.func.id)
    if isinstance(node, ast.FunctionDef):
        return node.returns is not None and never_none(node.returns)
    return isinstance(node, ast.ClassDef)


def bind_parameters(program: Program, known: Known) -> None:
    """Put arguments that are the same constant, or the same name of a constant, in all calls into the function itself."""
    for name, node in list(program.nodes.items()):
        if not isinstance(node, ast.FunctionDef) or name in program.roots or node.decorator_list:
            continue
        calls = program.calls(name)
        if not calls:
            continue
        passed = [arguments_of(call, node) for call in calls]
        for parameter in parameters(node):
            given = [None if p is None else p.get(parameter.arg, default_of(node, parameter.arg)) for p in passed]
            first = given[0]
            if first is None or any(value is None or ast.dump(value) != ast.dump(first) for value in given):
                continue
            if not (isinstance(first, ast.Constant) or (isinstance(first, ast.Name) and first.id in known.constants)):
                continue
            if assignments(node.body)[parameter.arg]:
                continue
            node.body = fold(node.body, Known({parameter.arg: first}, constants=known.constants))
            drop_parameter(node, calls, parameter.arg)


def unused_parameters(program: Program) -> None:
    """Take parameters that are not read out of functions, with arguments whose evaluation does nothing."""
    for name, node in list(program.nodes.items()):
        if not isinstance(node, ast.FunctionDef) or name in program.roots:
            continue
        calls = program.calls(name)
        if calls is None:
            continue
        used = reads(node.body)
        for parameter in parameters(node):
            given = [arguments_of(call, node) for call in calls]
            if used[parameter.arg] == 0 and all(
                g is not None and (parameter.arg not in g or is_pure(g[parameter.arg])) for g in given
            ):
                drop_parameter(node, calls, parameter.arg)
