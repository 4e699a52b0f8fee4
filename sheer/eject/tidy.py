"""The last touches: names without numbers, values where they are used once, no word too many."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from sheer.eject.expressions import dotted, is_constant
from sheer.eject.program import BUILTINS, Program, arguments_of
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


def use_directly(program: Program) -> None:
    """Put numbers that are computed once and used once, in the same run of statements, where they are used."""
    for function in program.functions():
        for body in bodies_of(function):
            for index, statement in enumerate(body):
                if _is_computed_once(statement, function) and _moved(body, index, function):
                    break


def _is_computed_once(statement: ast.stmt, function: ast.FunctionDef) -> bool:
    """Whether a statement names a number that is made of others, by arithmetic and lengths, and means the same anywhere."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
        return False
    count = assignments(function.body)
    for part in walk([statement.value]):
        known = isinstance(
            part, (ast.BinOp, ast.UnaryOp, ast.Constant, ast.Subscript, ast.operator, ast.unaryop, ast.expr_context)
        )
        length = isinstance(part, ast.Call) and dotted(part.func) == "len"
        if not (known or length or (isinstance(part, ast.Name) and count[part.id] <= 1)):
            return False
    return isinstance(statement.value, (ast.BinOp, ast.Call)) and count[statement.targets[0].id] == 1


def _moved(body: list[ast.stmt], index: int, function: ast.FunctionDef) -> bool:
    statement = body[index]
    assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    name = statement.targets[0].id
    if reads(function.body)[name] != 1:
        return False
    for later in range(index + 1, len(body)):
        target = body[later]
        simple = isinstance(target, (ast.Assign, ast.Expr, ast.Return, ast.AugAssign))
        if (
            simple
            and not isinstance(getattr(target, "value", None), (ast.List, ast.Tuple))
            and reads([target])[name]
            and not any(isinstance(n, (ast.ListComp, ast.DictComp)) for n in walk([target]))
        ):
            body[later : later + 1] = substituted([target], {name: statement.value})
            del body[index]
            return True
    return False


def pass_directly(program: Program) -> None:
    """Write a value that the next statement passes on, and nothing else uses, where it is passed."""
    for function in program.functions():
        for body in bodies_of(function):
            for index in range(len(body) - 2, -1, -1):
                statement, following = body[index], body[index + 1]
                if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
                    continue
                name = statement.targets[0].id
                call = following.value if isinstance(following, ast.Expr) else None
                used_once = reads(function.body)[name] == 1 and assignments(function.body)[name] == 1
                if not used_once or not isinstance(call, ast.Call) or dotted(call.func) is None:
                    continue
                places = [i for i, value in enumerate(call.args) if isinstance(value, ast.Name) and value.id == name]
                if places and all(isinstance(value, ast.Name) for value in call.args[: places[0]]):
                    call.args[places[0]] = statement.value
                    del body[index]


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
    return sum(len(ast.unparse(part)) for part in parts) < 85 and notes_of(statement).behind is None


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


def _is_plain(statement: ast.Assign) -> bool:
    return len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name) and is_constant(statement.value)


def merge_zeros(program: Program) -> None:
    """Write `a = b = 0` for two such statements in a row, and `a, b = 0, None`."""
    for function in program.functions():
        for body in bodies_of(function):
            for index in range(len(body) - 2, -1, -1):
                one, other = body[index], body[index + 1]
                if not (isinstance(one, ast.Assign) and isinstance(other, ast.Assign)):
                    continue
                if is_constant(one.value, 0) and is_constant(other.value, 0):
                    one.targets += other.targets
                    del body[index + 1]
                elif _is_plain(one) and _is_plain(other):
                    pair = ast.Tuple([one.targets[0], other.targets[0]], ast.Store())
                    one.targets, one.value = [pair], ast.Tuple([one.value, other.value], ast.Load())
                    del body[index + 1]


def merge_tests(program: Program) -> None:
    """Write `if a and b` for a test that holds only another."""
    for function in program.functions():
        for node in [node for node in walk(function.body) if isinstance(node, ast.If)]:
            while (
                len(node.body) == 1 and isinstance(inner := node.body[0], ast.If) and not (inner.orelse or node.orelse)
            ):
                if isinstance(inner.test, ast.BoolOp) and isinstance(inner.test.op, ast.Or):
                    break
                node.test = ast.BoolOp(ast.And(), [node.test, inner.test])
                node.body = inner.body


def make_flags(program: Program) -> None:
    """Turn locals that are a string or None, and are only asked whether they are None, into the question itself."""
    for function in program.functions():
        given: dict[str, list[ast.Assign]] = {}
        for node in walk(function.body):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                given.setdefault(node.targets[0].id, []).append(node)
        for name, assigned in given.items():
            tests = [n for n in walk(function.body) if isinstance(n, ast.Compare) and _asks(n, name)]
            if len(assigned) == assignments(function.body)[name] == 1 and len(tests) == reads(function.body)[name]:
                value = assigned[0].value
                if isinstance(value, ast.IfExp) and is_constant(value.orelse, None) and is_constant(value.body):
                    assigned[0].value = value.test
                    function.body = [_Asked(name).visit(statement) for statement in function.body]


def _asks(node: ast.Compare, name: str) -> bool:
    return (
        isinstance(node.left, ast.Name)
        and node.left.id == name
        and isinstance(node.ops[0], (ast.Is, ast.IsNot))
        and is_constant(node.comparators[0], None)
    )


class _Asked(ast.NodeTransformer):
    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if not _asks(node, self.name):
            return node
        return node.left if isinstance(node.ops[0], ast.IsNot) else ast.UnaryOp(ast.Not(), node.left)


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


def pass_by_the_same_name(program: Program) -> None:
    """Give a parameter the name of what all calls pass for it, where that is one name and not taken."""
    for name in list(program.nodes):
        function = program.function(name)
        calls = program.calls(name) if function is not None and name not in program.roots else None
        if function is None or not calls:
            continue
        for parameter in parameters(function):
            passed = {
                ast.unparse((arguments_of(call, function) or {}).get(parameter.arg) or ast.Constant(0))
                for call in calls
            }
            new = passed.pop() if len(passed) == 1 else ""
            taken = bound_in(function) | set(reads(function.body)) | set(program.nodes)
            keywords = {keyword.arg for call in calls for keyword in call.keywords}
            if new.isidentifier() and new not in taken and new not in BUILTINS and parameter.arg not in keywords:
                function.body = renamed(function.body, {parameter.arg: new})
                parameter.arg = new


def part_long_returns(program: Program) -> None:
    """Write `if a: return x` and `return y` for a conditional expression that takes more than a line."""
    for function in program.functions():
        for body in bodies_of(function):
            value = body[-1].value if body and isinstance(body[-1], ast.Return) else None
            if isinstance(value, ast.IfExp) and len(ast.unparse(value)) > 100:
                first = with_notes(ast.If(value.test, [ast.Return(value.body)], []), notes_of(body[-1]))
                body[-1:] = [first, ast.Return(value.orelse)]


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
