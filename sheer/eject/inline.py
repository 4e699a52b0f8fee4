"""Functions that are called once, or are one expression, written where they are called."""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping, Sequence

from sheer.eject.drop import Needless, drop
from sheer.eject.expressions import dotted, is_constant, is_pure
from sheer.eject.program import BUILTINS, Program, arguments_of, functions_of, uses_in
from sheer.eject.scope import assignments, bound_in, default_of, fresh, parameters, substituted, walk
from sheer.eject.source import Notes, notes_of, with_notes

LOOPED = frozenset({"end_step"})  # what a loop ends with: a reader looks for it there
MOST_OF_A_LOOP = 40
KEPT = frozenset(
    {
        "evaluate",
        "plain_shard",
        "repeated_blocks",
        "plain_check_on_ranks",
        "plain_prune",
        "plain_save",
        "differ_in_random_numbers",
    }
)  # functions that a reader looks for


def inline_expressions(program: Program) -> bool:
    """Write functions that are one expression where they are called. Returns whether any was."""
    changed = False
    found = {key: uses_in([node]) for key, node in program.nodes.items()}
    for name, node in list(program.nodes.items()):
        body = without_docstring(node.body) if isinstance(node, ast.FunctionDef) else []
        if (
            not isinstance(node, ast.FunctionDef)
            or len(body) != 1
            or name in program.roots | program.answered
            or node.decorator_list
        ):
            continue
        calls = [call for _, of_node in found.values() for call in of_node.get(name, [])]
        if len(calls) != sum(uses[name] for uses, _ in found.values()):
            continue  # it is used as a value, too
        if not isinstance(body[0], (ast.Return, ast.Expr)) or body[0].value is None or not calls or _is_generator(node):
            continue
        if isinstance(body[0], ast.Expr) and not _are_alone(program, calls):
            continue  # it returns nothing, and this is used
        if not (len(calls) == 1 or _is_small(body[0].value)):
            continue
        for key in [key for key, (_, of_node) in found.items() if name in of_node]:
            for function in functions_of(program.nodes[key]):
                if function is not node:
                    swap = _ExpressionCall(node, body[0].value)
                    function.body = [swap.visit(statement) for statement in function.body]
                    changed = changed or swap.changed
            found[key] = uses_in([program.nodes[key]])
    return changed


def _are_alone(program: Program, calls: list[ast.Call]) -> bool:
    """Whether each of some calls is a statement by itself."""
    alone = {id(n.value) for f in program.functions() for n in walk(f.body) if isinstance(n, ast.Expr)}
    return all(id(call) in alone for call in calls)


def _is_small(expression: ast.expr) -> bool:
    return sum(isinstance(part, ast.expr) for part in walk([expression])) <= 12


class _ExpressionCall(ast.NodeTransformer):
    def __init__(self, function: ast.FunctionDef, value: ast.expr) -> None:
        self.function, self.value, self.changed = function, value, False

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Name) and node.func.id == self.function.name):
            return node
        given = arguments_of(node, self.function)
        if given is None:
            return node
        values: dict[str, ast.expr] = {}
        uses = [part.id for part in walk([self.value]) if isinstance(part, ast.Name)]
        for parameter in parameters(self.function):
            value = given.get(parameter.arg, default_of(self.function, parameter.arg))
            if value is None or not (is_pure(value) or (uses.count(parameter.arg) == 1 and len(given) == 1)):
                return node
            if uses.count(parameter.arg) > 1 and dotted(value) is None and not is_constant(value):
                return node  # a reader would see the same expression several times
            values[parameter.arg] = value
        inner = {
            part.id for part in walk([self.value]) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }
        if inner & {part.id for value in values.values() for part in walk([value]) if isinstance(part, ast.Name)}:
            return node  # a comprehension would capture it
        self.changed = True
        statement = substituted([ast.Expr(self.value)], values)[0]
        assert isinstance(statement, ast.Expr)
        return statement.value


def inline_procedures(program: Program, most: int, records: Sequence[str] = (), looped: bool = False) -> bool:
    """Write functions of at most `most` statements that are called once, as a statement, where they are called.

    Those that return a record are written there whatever their size, so that it can be taken apart.
    """
    all_calls = program.all_calls()
    for name, node in list(program.nodes.items()):
        if (
            not isinstance(node, ast.FunctionDef)
            or name in program.roots | program.answered
            or node.decorator_list
            or _is_generator(node)
        ):
            continue
        if name in KEPT or node.args.vararg is not None or node.args.kwarg is not None:
            continue
        calls = all_calls.get(name, [])
        if size(node.body) == 0 or (size(node.body) == 1 and isinstance(node.body[-1], ast.Pass)):
            drop(program, Needless(calls=frozenset({name})))
            continue
        makes_record = node.returns is not None and any(record in ast.unparse(node.returns) for record in records)
        if calls is None or len(calls) != 1:
            continue
        if size(node.body) > (MOST_OF_A_LOOP if looped and name in LOOPED else most) and not makes_record:
            continue
        for function in program.functions():
            if function is not node and Site(function, node, calls[0]).inline():
                del program.nodes[name]
                return True
    return False


def size(body: list[ast.stmt]) -> int:
    """Count statements, those inside of others too."""
    return sum(isinstance(node, ast.stmt) for node in walk(without_docstring(body)))


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return a function's statements without its docstring."""
    first = body[0] if body else None
    return (
        body[1:]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
        else body
    )


def _is_generator(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in walk(function.body))


def _returns(body: list[ast.stmt]) -> int:
    return sum(isinstance(node, ast.Return) for node in walk(body))


def _may_stand(value: ast.expr, body: list[ast.stmt]) -> bool:
    """Whether an argument may stand wherever its parameter is read: it means the same all through the body."""
    if isinstance(value, ast.Attribute) and is_pure(value):
        stored = {n.attr for n in walk(body) if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load)}
        called = [n.func for n in walk(body) if isinstance(n, ast.Call)]
        known = all(isinstance(c, ast.Attribute) or (isinstance(c, ast.Name) and c.id in BUILTINS) for c in called)
        return known and value.attr not in stored
    return isinstance(value, (ast.Name, ast.Constant))


def _decides(statement: ast.If, body: list[ast.stmt]) -> bool:
    """Whether `if f(): break`, the last statement of a loop, could be the body of f with `break` for `return True`."""
    returned = [n for n in walk(body) if isinstance(n, ast.Return)]
    loops = [n for n in walk(body) if isinstance(n, (ast.For, ast.While))]
    return (
        len(statement.body) == 1
        and isinstance(statement.body[0], ast.Break)
        and not statement.orelse
        and is_constant(getattr(body[-1], "value", None), False)
        and all(is_constant(n.value, True) for n in returned[:-1] if n is not body[-1])
        and sum(is_constant(n.value, False) for n in returned) == 1
        and not any(isinstance(n, ast.Return) for n in walk(loops))
    )


def _left(body: list[ast.stmt]) -> list[ast.stmt]:
    """Write `break` for `return True`, and leave out the `return False` at the end."""
    return [_Leaving().visit(statement) for statement in body[:-1]]


class _Leaving(ast.NodeTransformer):
    def visit_Return(self, node: ast.Return) -> ast.stmt:
        return with_notes(ast.Break(), notes_of(node))


class Site:
    """A call, the function that it is in, and the one that it calls."""

    def __init__(self, caller: ast.FunctionDef, callee: ast.FunctionDef, call: ast.Call) -> None:
        self.caller, self.callee, self.call = caller, callee, call

    def inline(self) -> bool:
        """Replace the statement of the call by what is called; False where it stands in the middle of an expression."""
        return self._inline_in(self.caller.body)

    def _inline_in(self, body: list[ast.stmt], in_loop: bool = False) -> bool:
        for index, statement in enumerate(body):
            new = self._replacement(statement, in_loop and index == len(body) - 1)
            if new is not None:
                body[index : index + 1] = new
                return True
            for name in ("body", "orelse", "finalbody"):
                is_loop = isinstance(statement, (ast.For, ast.While)) and name == "body"
                if self._inline_in(getattr(statement, name, []), is_loop):
                    return True
            for part in [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]:
                if self._inline_in(part.body):
                    return True
        return False

    def _replacement(self, statement: ast.stmt, is_last: bool) -> list[ast.stmt] | None:
        """Return what stands for a statement, if the call is all of it, or what it evaluates first."""
        if self.call not in (getattr(statement, "value", None), getattr(statement, "test", None)):
            return None
        body = without_docstring(self.callee.body)
        at_end = bool(body) and isinstance(body[-1], ast.Return)
        if isinstance(statement, ast.If) and statement.test is self.call and is_last and _decides(statement, body):
            return _left(self.written_out(statement, body))
        if isinstance(statement, ast.Return) and statement.value is self.call:
            return self.written_out(statement, body)
        if _returns(body) > at_end:
            return None
        if isinstance(statement, ast.Expr) and statement.value is self.call:
            return self.written_out(statement, body[:-1] if at_end else body)
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is self.call and at_end:
            return self._with_result(statement, body)
        if isinstance(statement, ast.If) and statement.test is self.call and at_end:
            new = self.written_out(statement, body)
            last = new.pop()
            assert isinstance(last, ast.Return) and last.value is not None
            statement.test = last.value
            return [*new, with_notes(statement, Notes(notes_of(statement).above, notes_of(statement).behind, False))]
        return None

    def _with_result(self, statement: ast.Assign | ast.AnnAssign, body: list[ast.stmt]) -> list[ast.stmt]:
        new = self.written_out(statement, body)
        last = new.pop()
        assert isinstance(last, ast.Return)
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        if ast.dump(target).replace("Store", "Load") == ast.dump(last.value or ast.Constant(None)):
            return new
        statement.value = last.value or ast.Constant(None)
        return [*new, with_notes(statement, notes_of(last))]

    def written_out(
        self, statement: ast.stmt, body: list[ast.stmt], names: Mapping[str, str] | None = None
    ) -> list[ast.stmt]:
        """Return a body of the callee with arguments for its parameters and names that the caller has not taken."""
        given = arguments_of(self.call, self.callee) or {}
        taken = bound_in(self.caller) | {n.id for n in walk(self.caller.body) if isinstance(n, ast.Name)}
        assigned = assignments(body)
        values: dict[str, ast.expr] = {}
        before: list[ast.stmt] = []
        for parameter in parameters(self.callee):
            value = given.get(parameter.arg, default_of(self.callee, parameter.arg))
            if value is None:
                raise ValueError(f"{self.callee.name} is called without {parameter.arg}: {ast.unparse(self.call)}")
            if not assigned[parameter.arg] and _may_stand(value, body):
                values[parameter.arg] = value
            else:
                name = fresh(parameter.arg, taken)
                taken.add(name)
                values[parameter.arg] = ast.Name(name, ast.Load())
                before.append(ast.Assign([ast.Name(name, ast.Store())], value))
        result = self._result_name(statement, body) if names is None else names
        for local in bound_in(self.callee) - set(values):
            name = result[local] if local in result else fresh(local, taken)
            taken.add(name)
            values[local] = ast.Name(name, ast.Load())
        new = [*before, *substituted(body, values)]
        if new:
            own, notes = notes_of(new[0]), notes_of(statement)
            new[0] = with_notes(new[0], Notes((*notes.above, *own.above), own.behind, notes.spaced or own.spaced))
        return new

    def _result_name(self, statement: ast.stmt, body: list[ast.stmt]) -> Mapping[str, str]:
        """Return the caller's name for the local that is returned, so that it need not be copied."""
        if not isinstance(statement, ast.Assign) or not isinstance(body[-1], ast.Return):
            return {}
        target, value = statement.targets[0], body[-1].value
        if not (isinstance(target, ast.Name) and isinstance(value, ast.Name)):
            return {}
        in_arguments = {n.id for n in ast.walk(copy.deepcopy(self.call)) if isinstance(n, ast.Name)}
        return {} if target.id in in_arguments else {value.id: target.id}
