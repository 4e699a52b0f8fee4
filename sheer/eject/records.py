"""Records taken apart: where an object only carries others, its fields become names and parameters of their own."""

from __future__ import annotations

import ast
import copy
from collections.abc import Set

from sheer.eject.expressions import dotted
from sheer.eject.program import Program, Refusal, arguments_of, replace_argument, replace_parameter
from sheer.eject.scope import assignments, bound_in, fresh, parameters, statements, substituted, walk


def fields_of(record: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    """Return the fields of a dataclass by name."""
    return {n.target.id: n for n in record.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def explode(program: Program, record: str) -> bool:
    """Take all objects of a record class apart. Returns whether it could be done: not where one is kept as a whole.

    Properties of one expression are put where they are read.
    """
    node = program.nodes.get(record)
    if not isinstance(node, ast.ClassDef):
        return False
    inline_properties(program, node)
    fields = fields_of(node)
    stored = {
        n.attr for n in walk(program.nodes.values()) if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load)
    }
    for function in program.functions():
        for holder in holders_of(program, function, record):
            _drop_aliases(function, holder, fields.keys() - stored)
    holders = {id(f): holders_of(program, f, record) for f in program.functions()}
    needs: dict[tuple[str, str], set[str]] = {}
    if not _find_needs(program, fields, holders, needs):
        return False
    own = {(f.name, p.arg) for f in program.functions() if f.name in program.roots for p in parameters(f)}
    if any(needs[taker] for taker in own & needs.keys()):
        return False  # the script passes it, as a whole
    for function in list(program.functions()):
        for name in holders[id(function)]:
            _explode_in(program, function, name, record, fields, needs)
    for function_name, parameter in needs:
        taken_apart = program.function(function_name)
        if taken_apart is not None:
            locals_of: dict[str, str] = vars(taken_apart).get("exploded", {}).get(parameter, {})
            new = [ast.arg(name, copy.deepcopy(fields[field].annotation)) for field, name in locals_of.items()]
            replace_parameter(taken_apart, parameter, new)
    return True


def _drop_aliases(function: ast.FunctionDef, holder: str, fields: Set[str]) -> None:
    """Read a record's field where a local name stands for it."""
    for index, statement in enumerate(function.body):
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name, value = statement.targets[0].id, statement.value
        is_field = (
            isinstance(value, ast.Attribute)
            and isinstance(value.value, ast.Name)
            and value.value.id == holder
            and value.attr in fields
        )
        if is_field and assignments(function.body)[name] == 1 and name not in [p.arg for p in parameters(function)]:
            function.body[index:] = substituted(function.body[index + 1 :], {name: value})
            return _drop_aliases(function, holder, fields)
    return None


def holders_of(program: Program, function: ast.FunctionDef, record: str) -> list[str]:
    """Return the names in a function that hold an object of a record class: parameters that say so, and what one is assigned to."""
    names = [p.arg for p in parameters(function) if p.annotation is not None and _names_type(p.annotation, record)]
    for statement in statements(function.body):
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and _makes(statement.value, record)
        ):
            names.append(statement.targets[0].id)
    return names


def _names_type(annotation: ast.expr, record: str) -> bool:
    if isinstance(annotation, ast.Constant):
        return annotation.value == record
    return isinstance(annotation, ast.Name) and annotation.id == record


def _makes(value: ast.expr, record: str) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == record


def inline_properties(program: Program, node: ast.ClassDef) -> None:
    """Put properties that return one expression where they are read, and take them out of the class."""
    for method in [m for m in node.body if isinstance(m, ast.FunctionDef)]:
        body = [s for s in method.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        is_property = any(dotted(d) == "property" for d in method.decorator_list)
        if not is_property or len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
            continue
        for function in program.functions():
            for holder in holders_of(program, function, node.name):
                swap = _Property(holder, method.name, body[0].value)
                function.body = [swap.visit(statement) for statement in function.body]
        node.body.remove(method)


class _Property(ast.NodeTransformer):
    def __init__(self, holder: str, name: str, value: ast.expr) -> None:
        self.holder, self.name, self.value = holder, name, value

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if node.attr == self.name and isinstance(node.value, ast.Name) and node.value.id == self.holder:
            new = copy.deepcopy(self.value)
            for part in walk([new]):
                if isinstance(part, ast.Name) and part.id == "self":
                    part.id = self.holder
            return new
        self.generic_visit(node)
        return node


def _find_needs(
    program: Program,
    fields: dict[str, ast.AnnAssign],
    holders: dict[int, list[str]],
    needs: dict[tuple[str, str], set[str]],
) -> bool:
    """Find which fields each function needs of a record that it is given; False where a record is used as a whole."""
    passes: list[tuple[tuple[str, str], tuple[str, str]]] = []
    for function in program.functions():
        for name in holders[id(function)]:
            own = (function.name, name)
            is_parameter = name in [p.arg for p in parameters(function)]
            if is_parameter and program.function(function.name) is not function:
                return False  # a method: the object outlives the call
            needs.setdefault(own, set())
            seen = 0
            for node in walk(function.body):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name:
                    if node.attr not in fields:
                        return False
                    if isinstance(node.ctx, ast.Store) and is_parameter:
                        return False
                    needs[own].add(node.attr)
                    seen += 1
                elif (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and program.function(node.func.id) is not None
                ):
                    callee = program.function(node.func.id)
                    given = arguments_of(node, callee) if callee is not None else None
                    for parameter, value in (given or {}).items():
                        if isinstance(value, ast.Name) and value.id == name:
                            passes.append((own, (node.func.id, parameter)))
                            seen += 1
            uses = [
                n
                for n in walk(function.body)
                if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)
            ]
            if len(uses) != seen:
                return False
    if not all(_all_pass_one(program, taker, holders) for taker in needs):
        return False
    changed = True
    while changed:
        changed = False
        for giver, taker in passes:
            if taker not in needs:
                return False
            if not needs[taker] <= needs[giver]:
                needs[giver] |= needs[taker]
                changed = True
    return True


def _all_pass_one(program: Program, taker: tuple[str, str], holders: dict[int, list[str]]) -> bool:
    """Whether all calls of a function pass, for one of its parameters, what is known to be the record."""
    callee = program.function(taker[0])
    if callee is None or taker[1] not in [p.arg for p in parameters(callee)]:
        return True
    for function in program.functions():
        for node in walk(function.body):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == callee.name:
                value = (arguments_of(node, callee) or {}).get(taker[1])
                if not isinstance(value, ast.Name) or value.id not in holders[id(function)]:
                    return False
    return True


def _explode_in(
    program: Program,
    function: ast.FunctionDef,
    name: str,
    record: str,
    fields: dict[str, ast.AnnAssign],
    needs: dict[tuple[str, str], set[str]],
) -> None:
    """Replace a record in a function by local names, one for each field that is needed."""
    taken = bound_in(function) - {name}
    locals_of: dict[str, str] = {}
    for field in fields:
        if field in needs[function.name, name]:
            locals_of[field] = fresh(field, taken)
            taken.add(locals_of[field])
    is_parameter = name in [p.arg for p in parameters(function)]
    if is_parameter:
        vars(function).setdefault("exploded", {})[name] = locals_of
    swap = _Exploded(program, name, record, fields, locals_of, needs)
    body: list[ast.stmt] = []
    for statement in function.body:
        new = swap.visit(statement)
        body += new if isinstance(new, list) else [new]
    function.body = body


class _Exploded(ast.NodeTransformer):
    def __init__(
        self,
        program: Program,
        name: str,
        record: str,
        fields: dict[str, ast.AnnAssign],
        locals_of: dict[str, str],
        needs: dict[tuple[str, str], set[str]],
    ) -> None:
        self.program, self.name, self.record = program, name, record
        self.fields, self.locals_of, self.needs = fields, locals_of, needs

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == self.name:
            return ast.Name(self.locals_of[node.attr], node.ctx)
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        callee = self.program.function(node.func.id) if isinstance(node.func, ast.Name) else None
        given = arguments_of(node, callee) if callee is not None else None
        if callee is None or given is None:
            return node
        for parameter, value in given.items():
            if isinstance(value, ast.Name) and value.id == self.name:
                used = [field for field in self.fields if field in self.needs[callee.name, parameter]]
                names = [ast.Name(self.locals_of[field], ast.Load()) for field in used]
                replace_argument(node, value, used, names)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == self.name and _makes(node.value, self.record):
            assert isinstance(node.value, ast.Call)
            return self._made(node.value)
        self.generic_visit(node)
        return node

    def _made(self, call: ast.Call) -> list[ast.stmt]:
        """Return one assignment for each field that is needed, in the order in which a constructor would evaluate them."""
        given = dict(zip(self.fields, call.args, strict=False))
        given.update({k.arg: k.value for k in call.keywords if k.arg is not None})
        if any(k.arg is None for k in call.keywords):
            raise Refusal(f"{self.record}(**...) hides its fields.")
        out: list[ast.stmt] = []
        for field in [*given, *(f for f in self.fields if f not in given)]:
            value = given.get(field) or default_value(self.fields[field])
            if field in self.locals_of:
                name = ast.Name(self.locals_of[field], ast.Store())
                empty = isinstance(value, (ast.List, ast.Dict)) and not ast.unparse(value).strip("[]{}")
                kind = copy.deepcopy(self.fields[field].annotation)
                alias = isinstance(value, ast.Call) and isinstance(
                    self.program.nodes.get(dotted(value.func) or ""), ast.Assign
                )
                out.append(ast.AnnAssign(name, kind, value, 1) if empty or alias else ast.Assign([name], value))
            elif any(isinstance(part, ast.Call) for part in walk([value])):
                out.append(ast.Expr(value))  # it may do something
        return [ast.copy_location(statement, call) for statement in out]


def default_value(field: ast.AnnAssign) -> ast.expr:
    """Return the expression that makes a field's default."""
    value = field.value
    if isinstance(value, ast.Call) and dotted(value.func) == "field":
        for keyword in value.keywords:
            if keyword.arg == "default_factory":
                factory = dotted(keyword.value)
                if factory in ("dict", "list"):
                    return ast.Dict([], []) if factory == "dict" else ast.List([], ast.Load())
                return ast.Call(copy.deepcopy(keyword.value), [], [])
            if keyword.arg == "default":
                return copy.deepcopy(keyword.value)
    if value is None:
        raise Refusal(f"{dotted(field.target)} is not given, and has no default.")
    return copy.deepcopy(value)
