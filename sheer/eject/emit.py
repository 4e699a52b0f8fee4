"""From a specialised program to the text of a script."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence, Set

from sheer.eject.expressions import is_constant
from sheer.eject.program import BUILTINS, Program, Refusal, free_names
from sheer.eject.scope import bound_in, walk
from sheer.eject.source import Definition, imported, notes_of, unparse
from sheer.settings import Checkpoint, Parallel, Settings

# Settings that are records.
PARTS: dict[str, type[Checkpoint | Parallel]] = {"checkpoint": Checkpoint, "parallel": Parallel}
ERRORS = {
    "NonFiniteError": "FloatingPointError",
    "RunError": "RuntimeError",
    "DataError": "ValueError",
    "StepError": "TypeError",
    "SettingsError": "ValueError",
    "ModelError": "ValueError",
    "SheerWarning": "UserWarning",
}


def with_builtin_errors(program: Program) -> None:
    """Raise Python's own errors in place of the library's."""
    for name, own in ERRORS.items():
        program.nodes.pop(name, None)
        for node in walk(list(program.nodes.values())):
            if isinstance(node, ast.Name) and node.id == name:
                node.id = own
    program.nodes.pop("SheerError", None)


ALIASES = {
    "PlainNoData": "Any",
    "PlainLoggers": "tuple[Any, ...]",
    "PlainWatched": "list[tuple[int, str, Tensor]]",
    "StepBatch": "list[tuple[Any, int]]",
}


def without_aliases(program: Program) -> None:
    """Write types out that have a name in the library."""
    for node in program.nodes.values():
        _WrittenOut().visit(node)
    for name in ALIASES:
        program.nodes.pop(name, None)


class _WrittenOut(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id in ALIASES and len(node.args) == 1:
            node.func = ast.Name("list", ast.Load())
            given = node.args[0]
            if isinstance(given, ast.GeneratorExp):
                return self.generic_visit(ast.ListComp(given.elt, given.generators))
            if isinstance(given, ast.Call):
                return self.generic_visit(node)
            return self.generic_visit(ast.List(given.elts, ast.Load()) if isinstance(given, ast.Tuple) else given)
        return self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg == "default_factory" and isinstance(node.value, ast.Name) and node.value.id in ALIASES:
            node.value = ast.Name("list", ast.Load())
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(ALIASES[node.id], mode="eval").body if node.id in ALIASES else node


def own_names(program: Program, taken: Iterable[str]) -> dict[str, str]:
    """Return what definitions are called in the script: twins without their prefix, and nothing that is taken."""
    names: dict[str, str] = {}
    used = set(taken) | BUILTINS | {name for function in program.functions() for name in bound_in(function)}
    for name in program.nodes:
        plain = re.sub(r"^(_?)(Plain|plain_)", r"\1", name)
        new = plain if plain not in used else name if name not in used else f"sheer_{plain}".replace("sheer_", "run_")
        names[name] = new
        used.add(new)
    return names


def rename(program: Program, names: Mapping[str, str]) -> None:
    """Give definitions other names, in themselves and wherever they are used."""
    for top in program.nodes.values():
        own = bound_in(top) if isinstance(top, ast.FunctionDef) else set()
        for node in walk([top]):
            if isinstance(node, ast.Name) and node.id in names and node.id not in own:
                node.id = names[node.id]
        if isinstance(top, (ast.FunctionDef, ast.ClassDef)):
            top.name = names[top.name]
    program.nodes = {names.get(name, name): node for name, node in program.nodes.items()}


def with_short_docstrings(program: Program) -> None:
    """Keep the first paragraph of each docstring: what follows speaks of errors that are not raised here, and of parameters that are gone."""
    for node in walk(list(program.nodes.values())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)) is not None:
            node.body[0] = ast.Expr(ast.Constant(text.split("\n\n")[0]))


def with_narrow_types(program: Program) -> None:
    """Say `torch.autocast` for a context that always is one."""
    general = ast.dump(ast.parse("AbstractContextManager[Any]", mode="eval").body)
    if not any(isinstance(node, ast.Name) and node.id == "nullcontext" for node in walk(list(program.nodes.values()))):
        for node in walk(list(program.nodes.values())):
            if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation and ast.dump(node.annotation) == general:
                node.annotation = ast.parse("torch.autocast", mode="eval").body


def quote_own_names(program: Program) -> None:
    """Put the name of a class into quotes in the types inside of it, where it is not defined yet."""
    for node in [node for node in program.nodes.values() if isinstance(node, ast.ClassDef)]:
        for method in [part for part in node.body if isinstance(part, ast.FunctionDef)]:
            if isinstance(method.returns, ast.Name) and method.returns.id == node.name:
                method.returns = ast.Constant(node.name)


def in_order(program: Program, roots: Sequence[str]) -> list[ast.stmt]:
    """Return the definitions so that each stands before what uses it, the roots last."""
    done: dict[str, ast.stmt] = {}
    for root in roots:
        _place(program, root, done, ())
    return list(done.values())


def _place(program: Program, name: str, done: dict[str, ast.stmt], above: tuple[str, ...]) -> None:
    if name in done or name in above:
        return
    node = program.nodes[name]
    for used in free_names(node):
        if used in program.nodes and used != name:
            _place(program, used, done, (*above, name))
    done[name] = node


def lifted_imports(nodes: Sequence[ast.stmt], taken: Set[str]) -> list[str]:
    """Take the imports out of functions, and return them for the head of the file; those of names that are taken stay."""
    found: dict[str, None] = {}
    functions = [node for node in walk(nodes) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        others = {name for other in functions if other is not function for name in bound_in(other)}
        for part in [part for part in function.body if isinstance(part, (ast.Import, ast.ImportFrom))]:
            names = dict(imported([part]))
            if not names.keys() & (taken | others):
                function.body.remove(part)
                found |= dict.fromkeys(names.values())
    return list(found)


def imports_of(
    nodes: Sequence[ast.stmt], library: Mapping[str, Definition], known: Iterable[str], lifted: Sequence[str] = ()
) -> list[str]:
    """Return the import statements for names that definitions use and neither they nor the script have."""
    available = {name: text for text in lifted for name, _ in imported(ast.parse(text).body)}
    for definition in library.values():
        for name, statement in definition.imports.items():
            if "sheer" not in statement:
                available.setdefault(name, statement)
    available |= {"closing": "from contextlib import closing"}  # what `inline_blocks` may write
    defined = {name for node in nodes for name in _defined(node)} | set(known)
    needed = [name for node in nodes for name in free_names(node) if name not in defined and name not in BUILTINS]
    missing = [name for name in dict.fromkeys(needed) if name not in available]
    if missing:
        raise Refusal(
            f"The ejected script would use {', '.join(missing)}, which it does not define. Please report this."
        )
    return [available[name] for name in dict.fromkeys(needed)]


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def constants_of(
    nodes: Sequence[ast.stmt], settings: Mapping[str, object], comments: Mapping[str, str], script: str
) -> list[str]:
    """Return the assignments of the settings that are read, each with what it means."""
    used = {node.id for node in walk(nodes) if isinstance(node, ast.Name)}
    written_out = {name: repr(value) for name, value in settings.items()}
    if "RUN_DIR" not in settings:
        comments = {**comments, "RUN_DIR": "# the folder of the run"}
        written_out["RUN_DIR"] = f'time.strftime("runs/{script}/%Y-%m-%d_%H-%M-%S")'
    return [f"{name} = {value}  {comments[name]}" for name, value in written_out.items() if name in used]


def comments_of(library: Mapping[str, Definition], constant_name: object) -> dict[str, str]:
    """Return what is written beside each setting."""
    out: dict[str, str] = {}
    for owner, prefix in (("Settings", ""), ("Checkpoint", "checkpoint.")):
        node = library[owner].node
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                out[constant_name(prefix + part.target.id)] = notes_of(part).behind or ""  # type: ignore[operator]
    return out


def described(settings: Mapping[str, object]) -> str:
    """Return the settings that are not the defaults, as they are written."""
    defaults = dataclasses.asdict(Settings())
    said = []
    for name, value in settings.items():
        if name in PARTS and isinstance(value, dict):
            own = [f"{k}={v!r}" for k, v in value.items() if v != getattr(PARTS[name](), k)]
            said.append(f"{name}={PARTS[name].__name__}({', '.join(own)})")
        elif value != defaults[name]:
            said.append(f"{name}={'False' if name == 'checkpoint' else repr(value)}")
    return ", ".join(said)


def is_number_or_text(node: ast.stmt) -> bool:
    """Whether a definition is that of a number, a text, or a few of them."""
    value = node.value if isinstance(node, ast.Assign) else None
    return is_constant(value) or (isinstance(value, ast.Tuple) and all(map(is_constant, value.elts)))


def written(nodes: Sequence[ast.stmt]) -> str:
    """Return definitions as text, two empty lines apart."""
    return "\n\n\n".join(unparse([node]).strip() for node in nodes)


def sorted_imports(statements: Sequence[str]) -> str:
    """Return import statements sorted, those from one module together."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "I",
        "--fix",
        "--quiet",
        "--line-length",
        "120",
        "--config",
        "lint.isort.no-sections=true",
        "-",
    ]
    text = "\n".join(statements) + "\n"
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


def formatted(text: str, width: int = 120) -> str:
    """Return Python in the layout of ruff.

    Raises:
        Refusal: ruff is not installed.
    """
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", str(width), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refusal(
            f"ruff could not format what was made: {done.stderr.strip()} Install it: pip install 'sheer[eject]'."
        )
    return done.stdout
