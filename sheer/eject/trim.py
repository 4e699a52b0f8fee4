"""What is never used goes: locals, results, fields, methods."""

from __future__ import annotations

import ast
import re
from collections.abc import Set

from sheer.eject.expressions import dotted, is_idle, is_pure
from sheer.eject.program import Program
from sheer.eject.records import fields_of, holders_of
from sheer.eject.scope import own_reads, walk
from sheer.eject.source import notes_of, with_notes

INTERNAL = (
    "Progress",
    "PlainMetrics",
    "PlainData",
    "PlainDataOfWorkers",
    "PlainSteps",
)  # no script has an object of these


def trim_locals(program: Program) -> None:
    """Leave out assignments to names that are never read; what is evaluated for them stays where it may do something."""
    for function in program.functions():
        function.body = _Unread(own_reads(function.body)).body(function.body) or [ast.Pass()]


class _Unread(ast.NodeTransformer):
    def __init__(self, used: Set[str]) -> None:
        self.used = used

    def body(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Return statements without assignments that nothing reads."""
        out: list[ast.stmt] = []
        for statement in statements:
            new = self.visit(statement)
            out += new if isinstance(new, list) else [new]
        return out

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, name, self.body(value) or ([ast.Pass()] if name == "body" else []))
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, (ast.ExceptHandler, ast.match_case)):
                        self.generic_visit(item)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        target = node.targets[0]
        if len(node.targets) == 1 and isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            return self._pairs(node, target, node.value)
        if len(node.targets) == 1 and isinstance(target, ast.Name) and target.id not in self.used:
            return self._effect(node, node.value)
        if len(node.targets) == 1 and is_pure(node.value) and ast.unparse(target) == ast.unparse(node.value):
            return []
        return node

    def _pairs(self, node: ast.Assign, target: ast.Tuple, value: ast.Tuple) -> ast.stmt | list[ast.stmt]:
        """Leave out what is unread of `a, b = x, y`; one that is left is written alone."""
        kept = [
            (name, item)
            for name, item in zip(target.elts, value.elts, strict=False)
            if not (isinstance(name, ast.Name) and name.id not in self.used and is_idle(item))
        ]
        if len(kept) == len(target.elts) or len(target.elts) != len(value.elts):
            return node
        if not kept:
            return []
        if len(kept) == 1:
            return with_notes(ast.Assign([kept[0][0]], kept[0][1]), notes_of(node))
        target.elts, value.elts = [name for name, _ in kept], [item for _, item in kept]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | list[ast.stmt]:
        if isinstance(node.target, ast.Name) and node.target.id not in self.used and node.value is not None:
            return self._effect(node, node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt | list[ast.stmt]:
        if isinstance(node.target, ast.Name) and node.target.id not in self.used and is_pure(node.value):
            return []
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | list[ast.stmt]:
        return [] if is_idle(node.value) and not isinstance(node.value, ast.Constant) else node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        node.body, node.orelse = self.body(node.body), self.body(node.orelse)
        if not node.body and not node.orelse:
            return self._effect(node, node.test)
        node.body = node.body or [ast.Pass()]
        return node

    def visit_With(self, node: ast.With) -> ast.stmt:
        for item in node.items:
            if isinstance(item.optional_vars, ast.Name) and item.optional_vars.id not in self.used:
                item.optional_vars = None
        self.generic_visit(node)
        return node

    def visit_Pass(self, node: ast.Pass) -> list[ast.stmt]:
        return []

    def _effect(self, node: ast.stmt, value: ast.expr) -> ast.stmt | list[ast.stmt]:
        return [] if is_idle(value) else with_notes(ast.Expr(value), notes_of(node))


def trim_results(program: Program) -> None:
    """Return nothing where no call uses what is returned in the end."""
    alone = {id(n.value) for f in program.functions() for n in walk(f.body) if isinstance(n, ast.Expr)}
    for name, calls in program.all_calls().items():
        node = program.function(name)
        if node is None or name in program.roots | program.answered or not calls or node.decorator_list:
            continue
        returned = [n for n in walk(node.body) if isinstance(n, ast.Return)]
        last = node.body[-1]
        if (
            all(id(call) in alone for call in calls)
            and returned == [last]
            and isinstance(last, ast.Return)
            and last.value
        ):
            node.body[-1:] = [] if is_idle(last.value) and len(node.body) > 1 else [ast.Expr(last.value)]
            node.returns = ast.Constant(None)


def trim_classes(program: Program, kept: Set[str]) -> None:
    """Leave out fields and methods whose names nothing reads; `kept` are names that the script reads."""
    used_by_any, own = _attributes_reached(program, kept), _attributes_reached(program, frozenset())
    for node in program.nodes.values():
        if isinstance(node, ast.ClassDef):
            used = used_by_any - (kept - own if node.name in INTERNAL else set())
            used = _read_of_results(program, kept) if node.name == "Result" else used
            asked = _is_asked(program, node.name)
            before = list(fields_of(node))
            node.body = [part for part in node.body if not _is_unread(part, used, asked)] or [ast.Pass()]
            _trim_constructions(program, node, before)
    for function in program.functions():
        function.body = _UnreadAttributes(program, used_by_any).body(function.body) or [ast.Pass()]


def _read_of_results(program: Program, kept: Set[str]) -> set[str]:
    """Return the fields that the script, or a function, reads of how the run ended."""
    holders = [(function, holders_of(program, function, "Result")) for function in program.functions()]
    nodes = [
        n for f, names in holders for n in walk(f.body) if isinstance(n, ast.Attribute) and dotted(n.value) in names
    ]
    return set(kept) | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _attributes_reached(program: Program, kept: Set[str]) -> set[str]:
    """Return the names of attributes that are read, in functions and in those methods that are themselves reached."""
    waiting: list[ast.AST] = [node for node in program.nodes.values() if not isinstance(node, ast.ClassDef)]
    methods: dict[str, list[ast.AST]] = {}
    inside = {
        id(part): frozenset(kept if node.name in INTERNAL else ())
        for node in program.nodes.values()
        if isinstance(node, ast.ClassDef)
        for part in node.body
    }
    for part in [part for node in program.nodes.values() if isinstance(node, ast.ClassDef) for part in node.body]:
        if (
            isinstance(part, ast.FunctionDef)
            and not part.name.startswith("__")
            and part.name not in kept - inside[id(part)]
        ):
            methods.setdefault(part.name, []).append(part)
        else:
            waiting.append(part)
    used = set(kept)
    while waiting:
        for node in ast.walk(waiting.pop()):
            name = node.attr if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else ""
            name = "close" if isinstance(node, ast.Name) and node.id == "closing" else name
            if name:
                used.add(name)
                waiting += methods.pop(name, [])
    return used


def _is_asked(program: Program, name: str) -> bool:
    """Whether the truth of an object of a class is asked for."""
    for function in program.functions():
        holders = holders_of(program, function, name)
        for node in walk(function.body):
            asked = [node.test] if isinstance(node, (ast.If, ast.IfExp, ast.While)) else []
            asked += node.values if isinstance(node, ast.BoolOp) else []
            asked += [node.operand] if isinstance(node, ast.UnaryOp) else []
            if any(
                (isinstance(part, ast.Attribute) and dotted(part) != "math.nan")
                or (isinstance(part, ast.Name) and part.id in holders)
                for part in asked
            ):
                return True
    return False


def _is_unread(part: ast.stmt, used: Set[str], asked: bool) -> bool:
    if isinstance(part, ast.FunctionDef) and part.name == "__init__" and len(part.args.args) == 1:
        return all(isinstance(statement, ast.Pass) for statement in part.body)
    if isinstance(part, ast.FunctionDef) and part.name == "__bool__":
        return not asked
    if isinstance(part, ast.FunctionDef):
        return part.name not in used and not part.name.startswith("__")
    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
        return part.target.id not in used
    return False


def _trim_constructions(program: Program, node: ast.ClassDef, before: list[str]) -> None:
    """Leave out arguments of a dataclass's constructor for fields that are gone."""
    if not any("dataclass" in ast.dump(d) for d in node.decorator_list):
        return
    fields = fields_of(node)
    for call in (n for n in walk(program.nodes.values()) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)):
        if isinstance(call.func, ast.Name) and call.func.id == node.name:
            call.keywords = [k for k in call.keywords if k.arg in fields or k.arg is None]
            call.args = [a for a, name in zip(call.args, before, strict=False) if name in fields]


class _UnreadAttributes(_Unread):
    """Leaves out assignments to attributes of the library's objects that nothing reads."""

    def __init__(self, program: Program, used: Set[str]) -> None:
        self.attributes = used
        super().__init__(frozenset())

    def _gone(self, target: ast.expr) -> bool:
        return isinstance(target, ast.Attribute) and target.attr not in self.attributes and _is_own(target)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        target = node.targets[0]
        if len(node.targets) == 1 and self._gone(target):
            return self._effect(node, node.value)
        if len(node.targets) == 1 and isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = [
                (n, v) for n, v in zip(target.elts, node.value.elts, strict=False) if not (self._gone(n) and is_idle(v))
            ]
            if len(pairs) == len(target.elts):
                return node
            if not pairs:
                return []
            if len(pairs) == 1:
                return with_notes(ast.Assign([pairs[0][0]], pairs[0][1]), notes_of(node))
            target.elts, node.value.elts = [n for n, _ in pairs], [v for _, v in pairs]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | list[ast.stmt]:
        return self._effect(node, node.value) if self._gone(node.target) and node.value is not None else node

    def visit_With(self, node: ast.With) -> ast.stmt:
        self.generic_visit(node)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt | list[ast.stmt]:
        return self._effect(node, node.value) if self._gone(node.target) else node


def _is_own(target: ast.Attribute) -> bool:
    """Whether an attribute is one of the library's objects, not of the model, an optimizer or a loader."""
    name = re.sub(r"_\d+\b", "", dotted(target.value) or "")  # however it was renamed where names met
    return name in ("self", "progress", "run", "run.progress", "self.run", "self.run.progress")
