"""What is known of local names and parameters goes to where they are read."""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping, Set
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from sheer.eject.expressions import dotted, is_constant, is_pure, is_value_of_torch, parsed
from sheer.eject.fold import Known, fold
from sheer.eject.program import Program, arguments_of, drop_parameter, replace_argument, replace_parameter
from sheer.eject.scope import assignments, bound_in, default_of, fresh, parameters, reads, renamed, walk


def fold_all(program: Program, known: Known) -> None:
    """Fold every function with what holds everywhere, and with what is known of its own names."""
    for function in program.functions():
        given = {p.arg for p in parameters(function)} if function.name in program.roots | program.answered else set()
        own = _shadowed(known, bound_in(function) - (given - assignments(function.body).keys()))
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
        spread = (
            [item for key, item in zip(value.keys, value.values, strict=True) if key is None]
            if isinstance(value, ast.Dict)
            else []
        )
        containers = [target.id, *(item.id for item in spread if isinstance(item, ast.Name))]
        if _is_stable(value, count) and (
            not isinstance(value, ast.List | ast.Dict | ast.Set)
            or not any(_is_changed(function, name, program) for name in containers)
        ):
            values[target.id] = value
        made = f"{dotted(value.func)}()" if isinstance(value, ast.Call) else ""
        if (
            isinstance(value, (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.JoinedStr))
            or made in known.present
            or _returns_something(value, program)
        ):
            present.add(target.id)
    return Known(values, frozenset(present))


def _is_stable(value: ast.expr, count: Mapping[str, int]) -> bool:
    """Whether an expression means the same wherever it stands in the function: constants, and names that are bound once."""
    if isinstance(value, ast.Constant) or is_value_of_torch(value):
        return True
    if isinstance(value, ast.Call):  # a context that does nothing, however often it is entered
        return dotted(value.func) == "nullcontext" and not value.args
    if isinstance(value, ast.Name):
        return count.get(value.id, 0) <= 1
    if isinstance(value, (ast.Tuple, ast.List)):
        return all(_is_stable(item, count) for item in value.elts)
    if isinstance(value, ast.Dict):
        keys = all(key is None or _is_stable(key, count) for key in value.keys)
        return keys and all(_is_stable(item, count) for item in value.values)
    return False


def _is_changed(function: ast.FunctionDef, name: str, program: Program, seen: Set[str] = frozenset()) -> bool:
    """Whether a container may be changed or kept: it is used other than by being read, here and where it is passed."""
    harmless: set[int] = set()
    for node in walk(function.body):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            harmless.add(id(node.value))
        elif isinstance(node, ast.Call):
            harmless |= {id(value) for value in _only_read(node, name, program, seen | {function.name}, function)}
        elif isinstance(node, ast.Assign) and _is_kept_unchanged(function, node.targets[0], program):
            harmless.add(id(node.value))
        elif isinstance(node, (ast.For, ast.comprehension)):
            harmless.add(id(node.iter))
        elif isinstance(node, ast.BinOp):
            harmless |= {id(node.left), id(node.right)}
        elif isinstance(node, ast.BoolOp):
            harmless |= {id(value) for value in node.values}
        elif isinstance(node, (ast.If, ast.IfExp)):
            harmless.add(id(node.test))
        elif isinstance(node, ast.Starred):
            harmless.add(id(node.value))
        elif isinstance(node, ast.Dict):
            harmless |= {id(value) for key, value in zip(node.keys, node.values, strict=True) if key is None}
        elif isinstance(node, ast.Compare):
            harmless |= {id(part) for part in node.comparators}
    uses = [n for n in walk(function.body) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
    return any(id(use) not in harmless for use in uses)


def _is_kept_unchanged(method: ast.FunctionDef, target: ast.expr, program: Program) -> bool:
    """Whether a target is an attribute of an object that only reads what it holds, as no other does."""
    owner = next((n for n in program.nodes.values() if isinstance(n, ast.ClassDef) and method in n.body), None)
    if owner is None or not isinstance(target, ast.Attribute) or dotted(target.value) != "self":
        return False
    uses = [
        n
        for n in walk(program.nodes.values())
        if isinstance(n, ast.Attribute) and n.attr == target.attr and isinstance(n.ctx, ast.Load)
    ]
    read: set[int] = set()
    for node in walk([owner]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _READERS:
            read.add(id(node.func.value))
        elif isinstance(node, ast.Call) and dotted(node.func) == "len":
            read.add(id(node.args[0]))
    return all(id(use) in read and dotted(use.value) == "self" for use in uses)


_READERS = ("get", "values", "items", "keys")


def _only_read(call: ast.Call, local: str, program: Program, seen: Set[str], caller: ast.FunctionDef) -> list[ast.expr]:
    """Return which expressions that are a local name a call uses only to read what it holds."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in _READERS:
        return [call.func.value]
    if isinstance(call.func, ast.Attribute) and (methods := _methods_called(call.func, program, caller)):
        readers = [_read_by_method(call, local, method, program, seen) for method in methods]
        return [value for value in readers[0] if all(value in others for others in readers)]
    name = dotted(call.func) or ""
    if name in ("len", "sum", "list", "set", "tuple", "reversed", "enumerate"):
        return call.args[:1]
    function = program.function(name)
    given = arguments_of(call, function) if function is not None else None
    if function is None or given is None or name in seen:
        return []
    own = {p: v for p, v in given.items() if isinstance(v, ast.Name) and v.id == local}
    return [v for p, v in own.items() if not _is_changed(function, p, program, seen)]


def _methods_called(called: ast.Attribute, program: Program, caller: ast.FunctionDef) -> list[ast.FunctionDef]:
    """Return the methods of the library's classes that a call may mean; none where it may mean that of another class."""
    if any(hasattr(kind, called.attr) for kind in (dict, list, set, str, tuple, torch.Tensor, nn.Module, Optimizer)):
        return []
    classes = [node for node in program.nodes.values() if isinstance(node, ast.ClassDef)]
    types = {p.arg: dotted(p.annotation) for p in parameters(caller) if p.annotation is not None}
    kind = types.get(called.value.id) if isinstance(called.value, ast.Name) else None
    classes = [node for node in classes if node.name == kind] or classes
    return [part for node in classes for part in node.body if getattr(part, "name", "") == called.attr]  # type: ignore[misc]


def _read_by_method(
    call: ast.Call, local: str, method: ast.FunctionDef, program: Program, seen: Set[str]
) -> list[ast.expr]:
    bare = copy.copy(method)
    bare.args = copy.copy(method.args)
    bare.args.args = method.args.args[1:]
    given = arguments_of(call, bare) if method.name not in seen else None
    own = {p: v for p, v in (given or {}).items() if isinstance(v, ast.Name) and v.id == local}
    return [v for p, v in own.items() if not _is_changed(method, p, program, seen | {method.name})]


def never_none(annotation: ast.expr) -> bool:
    """Whether a type, as checked strictly, leaves no room for None."""
    if isinstance(annotation, ast.Constant):
        return isinstance(annotation.value, str) and never_none(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp):
        return never_none(annotation.left) and never_none(annotation.right)
    if isinstance(annotation, ast.Name):
        return annotation.id not in ("Any", "object", "None", "Number", "T")  # the last stands for any type
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
    all_calls = program.all_calls()
    for name, node in list(program.nodes.items()):
        if not isinstance(node, ast.FunctionDef) or name in program.roots | program.answered:
            continue
        calls = all_calls.get(name, [])
        if not calls:
            continue
        recursive = {id(call) for call in walk(node.body) if isinstance(call, ast.Call)}
        for parameter in parameters(node):
            unchanged = ast.dump(ast.Name(parameter.arg, ast.Load()))
            passed = [
                own
                for call in calls
                for own in [arguments_of(call, node)]
                if not (id(call) in recursive and own and ast.dump(own.get(parameter.arg, call)) == unchanged)
            ]
            given = [None if p is None else p.get(parameter.arg, default_of(node, parameter.arg)) for p in passed]
            first = given[0] if given else None
            if first is not None and all(value is not None and _alike(value, first) for value in given):
                if len(given) == len(calls) and not _is_changed(node, parameter.arg, program):
                    _take_apart(node, calls, parameter, [value for value in given if value is not None])
                continue
            if first is None or any(value is None or ast.dump(value) != ast.dump(first) for value in given):
                continue
            if not (_is_stable(first, {}) and (not isinstance(first, ast.Name) or first.id in known.constants)):
                continue
            if assignments(node.body)[parameter.arg]:
                continue
            node.body = fold(node.body, Known({parameter.arg: first}, constants=known.constants))
            drop_parameter(node, calls, parameter.arg)


def _alike(one: ast.expr, other: ast.expr) -> bool:
    """Whether two expressions are displays of names that differ at most in those."""
    if not isinstance(one, (ast.Tuple, ast.List, ast.Dict)) or not is_pure(one):
        return False
    return _shape(one) == _shape(other)


def _shape(display: ast.expr) -> str:
    anonymous = copy.deepcopy(display)
    for name in _names(anonymous):
        name.id = "_"
    return ast.dump(anonymous)


def _names(display: ast.AST) -> list[ast.Name]:
    return [part for part in walk([display]) if isinstance(part, ast.Name)]


def _take_apart(function: ast.FunctionDef, calls: list[ast.Call], parameter: ast.arg, given: list[ast.expr]) -> None:
    """Give a function what a display holds in place of the display."""
    if assignments(function.body)[parameter.arg]:
        return
    taken = bound_in(function)
    new: dict[str, str] = {}
    for part in _names(given[0]):
        if part.id not in new:
            new[part.id] = fresh(part.id, taken)
            taken.add(new[part.id])
    display = copy.deepcopy(given[0])
    for part in _names(display):
        part.id = new[part.id]
    function.body = fold(function.body, Known({parameter.arg: display})) or [ast.Pass()]
    for call, value in zip(calls, given, strict=True):
        firsts = dict(zip([n.id for n in _names(given[0])], [n.id for n in _names(value)], strict=True))
        passed = [ast.Name(firsts[name], ast.Load()) for name in new]
        replace_argument(call, value, list(new.values()), passed)
    replace_parameter(function, parameter.arg, [ast.arg(name, ast.Name("Any", ast.Load())) for name in new.values()])


def unused_parameters(program: Program) -> None:
    """Take parameters that are not read out of functions, with arguments whose evaluation does nothing."""
    all_calls = program.all_calls()
    for name, node in list(program.nodes.items()):
        if not isinstance(node, ast.FunctionDef) or name in program.answered:
            continue
        calls = all_calls.get(name, [])
        if calls is None:
            continue
        used = reads(node.body)
        for parameter in parameters(node):
            given = [arguments_of(call, node) for call in calls]
            if used[parameter.arg] == 0 and all(
                g is not None and (parameter.arg not in g or is_pure(g[parameter.arg])) for g in given
            ):
                drop_parameter(node, calls, parameter.arg)


def merge_parameters(program: Program) -> None:
    """Keep one of two parameters for which every call passes the same name."""
    all_calls = program.all_calls()
    for name, node in list(program.nodes.items()):
        calls = all_calls.get(name, [])
        if not isinstance(node, ast.FunctionDef) or name in program.roots | program.answered or not calls:
            continue
        assigned = assignments(node.body)
        first: dict[str, str] = {}
        for parameter in parameters(node):
            passed = [(arguments_of(call, node) or {}).get(parameter.arg) for call in calls]
            if assigned[parameter.arg] or not all(isinstance(value, ast.Name) for value in passed):
                continue
            key = ast.dump(ast.Tuple([value for value in passed if value is not None], ast.Load()))
            if key in first:
                node.body = renamed(node.body, {parameter.arg: first[key]})
                drop_parameter(node, calls, parameter.arg)
            first.setdefault(key, parameter.arg)


def narrow_parameters(program: Program) -> None:
    """Take None out of the types of parameters that never are: in each call something is passed that is there."""
    all_calls = program.all_calls()
    for name, node in list(program.nodes.items()):
        if not isinstance(node, ast.FunctionDef) or name in program.roots | program.answered:
            continue
        calls = all_calls.get(name, [])
        for parameter in parameters(node):
            optional = isinstance(parameter.annotation, ast.BinOp) and is_constant(parameter.annotation.right, None)
            if optional and calls and all(_passes_something(program, node, call, parameter.arg) for call in calls):
                assert isinstance(parameter.annotation, ast.BinOp)
                parameter.annotation = parameter.annotation.left


def _passes_something(program: Program, function: ast.FunctionDef, call: ast.Call, name: str) -> bool:
    """Whether what a call passes for a parameter is known not to be None."""
    value = (arguments_of(call, function) or {}).get(name)
    if isinstance(value, ast.Constant):
        return value.value is not None
    caller = next((f for f in program.functions() if any(n is call for n in walk(f.body))), None)
    if caller is None or not isinstance(value, ast.Name):
        return False
    return value.id in known_locals(caller, program, Known()).present


def type_parameters(program: Program) -> None:
    """Say of which class a parameter is, where all calls pass a parameter of their own that is."""
    all_calls = program.all_calls()
    callers = {id(n): f for f in program.functions() for n in walk(f.body) if isinstance(n, ast.Call)}
    for name, node in program.nodes.items():
        calls = all_calls.get(name, [])
        if not isinstance(node, ast.FunctionDef) or not calls:
            continue
        for parameter in parameters(node):
            if parameter.annotation is None or ast.unparse(parameter.annotation) != "Any":
                continue
            kinds = set()
            for call in calls:
                value = (arguments_of(call, node) or {}).get(parameter.arg)
                typed = {p.arg: p.annotation for p in parameters(callers[id(call)])}
                kind = typed.get(value.id) if isinstance(value, ast.Name) else None
                kinds.add(dotted(kind) if kind is not None else None)
            name_of_kind = kinds.pop() if len(kinds) == 1 else None
            if name_of_kind is not None and name_of_kind != "Any":
                parameter.annotation = parsed(name_of_kind)
