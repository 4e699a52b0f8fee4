"""Generators and context managers that are used once, written where they are used."""

from __future__ import annotations

import ast

from sheer.eject.expressions import dotted
from sheer.eject.inline import Site, without_docstring
from sheer.eject.program import Program
from sheer.eject.scope import statements, walk
from sheer.eject.source import Notes, notes_of, with_notes


def inline_blocks(program: Program) -> bool:
    """Write one context manager or generator where it is used, if it is used once and simple enough. Returns whether one was."""
    all_calls = program.all_calls()
    for name, node in list(program.nodes.items()):
        if not isinstance(node, ast.FunctionDef) or name in program.roots | program.answered:
            continue
        calls = all_calls.get(name, [])
        if calls is None or len(calls) != 1:
            continue
        is_context = [dotted(decorator) for decorator in node.decorator_list] == ["contextmanager"]
        for function in program.functions():
            if function is node:
                continue
            block = _Block(Site(function, node, calls[0]))
            if (is_context and block.inline(ast.With)) or (not node.decorator_list and block.inline(ast.For)):
                del program.nodes[name]
                return True
    return False


class _Block:
    def __init__(self, site: Site) -> None:
        self.site = site

    def inline(self, kind: type[ast.With | ast.For]) -> bool:
        """Replace the statement that uses the call; False where there is none that can be."""
        for node in statements([self.site.caller]):
            for field in ("body", "orelse", "finalbody"):
                body = getattr(node, field, None)
                for index, statement in enumerate(body if isinstance(body, list) else []):
                    if isinstance(statement, kind) and (new := self._new(statement)) is not None:
                        assert isinstance(body, list)
                        body[index : index + 1] = new
                        return True
        return False

    def _new(self, statement: ast.stmt) -> list[ast.stmt] | None:
        body = without_docstring(self.site.callee.body)
        item = statement.items[0] if isinstance(statement, ast.With) and len(statement.items) == 1 else None
        if item is not None and item.context_expr is self.site.call and item.optional_vars is None:
            assert isinstance(statement, ast.With)
            return self._entered(statement, body) or self._closed(statement, body)
        if isinstance(statement, ast.With) and statement.items[0].context_expr is self.site.call:
            return self._closed(statement, body)
        if isinstance(statement, ast.For) and statement.iter is self.site.call:
            return self._iterated(statement, body)
        return None

    def _entered(self, statement: ast.With, body: list[ast.stmt]) -> list[ast.stmt] | None:
        """Write what comes before the only `yield`, the block, and what comes behind."""
        places = [index for index, part in enumerate(body) if _yielded(part) is not None]
        if len(places) != 1 or sum(isinstance(n, ast.Yield) for n in walk(body)) != 1:
            return None
        new = self.site.written_out(statement, body)
        at = next(index for index, part in enumerate(new) if _yielded(part) is not None)
        with_notes(statement.body[0], Notes(notes_of(statement).above, None, False))
        return [*new[:at], *statement.body, *new[at + 1 :]]

    def _closed(self, statement: ast.With, body: list[ast.stmt]) -> list[ast.stmt] | None:
        """Write `with closing(x)` for a context manager that only closes x in the end, behind what comes before its `yield`."""
        last = body[-1]
        if not isinstance(last, ast.Try) or last.handlers or statement.items[0].optional_vars is not None:
            return None
        closed = [
            part.value for part in last.finalbody if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call)
        ]
        if len(last.body) != 1 or _yielded(last.body[0]) is None or len(closed) != 1 or len(last.finalbody) != 1:
            return None
        if not isinstance(closed[0].func, ast.Attribute) or closed[0].func.attr != "close" or closed[0].args:
            return None
        *before, end = self.site.written_out(statement, body)
        assert isinstance(end, ast.Try) and isinstance(end.finalbody[0], ast.Expr)
        call = end.finalbody[0].value
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        statement.items[0].context_expr = ast.Call(ast.Name("closing", ast.Load()), [call.func.value], [])
        return [*before, with_notes(statement, Notes((), None, not before))]

    def _iterated(self, statement: ast.For, body: list[ast.stmt]) -> list[ast.stmt] | None:
        """Write the generator's loop, which ends in its only `yield`, with the block behind."""
        last = body[-1]
        if not isinstance(last, ast.For) or last.orelse or sum(isinstance(n, ast.Yield) for n in walk(body)) != 1:
            return None
        value = _yielded(last.body[-1])
        if value is None or len(_parts(statement.target)) != len(_parts(value)):
            return None
        new = self.site.written_out(statement, body, _named_alike(statement.target, value))
        loop = new[-1]
        assert isinstance(loop, ast.For)
        given = _yielded(loop.body.pop())
        assert given is not None
        targets, values = _parts(statement.target), _parts(given)
        for target, part in zip(targets, values, strict=True):
            if not (isinstance(target, ast.Name) and isinstance(part, ast.Name) and target.id == part.id):
                loop.body.append(ast.Assign([target], part))
        loop.body += statement.body
        return new


def _yielded(statement: ast.stmt) -> ast.expr | None:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield):
        return statement.value.value or ast.Constant(None)
    return None


def _parts(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _named_alike(target: ast.expr, value: ast.expr) -> dict[str, str]:
    """Return the names that a block has for locals that the generator yields."""
    pairs = zip(_parts(target), _parts(value), strict=True)
    return {v.id: t.id for t, v in pairs if isinstance(t, ast.Name) and isinstance(v, ast.Name)}
