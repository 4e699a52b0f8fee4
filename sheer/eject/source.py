"""The library's definitions as syntax trees, with their comments, and how a tree becomes text again."""

from __future__ import annotations

import ast
import copy
import functools
import io
import itertools
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef
Definable = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign

_COMMENT = re.compile(r"^( *)_comment_(\d+)$")
_TRAILING = re.compile(r"^ *_trailing_(\d+)$")


@dataclass(frozen=True)
class Notes:
    """What a syntax tree leaves out of a statement's text."""

    above: tuple[str, ...] = ()  # comments on lines of their own
    behind: str | None = None  # the comment at the end of its first line
    spaced: bool = False  # whether an empty line stands before it


@dataclass(frozen=True)
class Definition:
    """A function, class or constant of the library."""

    name: str
    node: Definable
    module: str
    imports: Mapping[str, str] = field(
        default_factory=dict
    )  # names from elsewhere, each with the statement that imports it


def notes_of(statement: ast.stmt) -> Notes:
    """Return the comments of a statement; copies of a tree keep them."""
    notes: Notes = vars(statement).get("notes", Notes())
    return notes


def with_notes(statement: ast.stmt, notes: Notes) -> ast.stmt:
    """Put comments on a statement, which is returned."""
    vars(statement)["notes"] = notes
    return statement


@functools.cache
def read_library(folder: Path) -> Mapping[str, Definition]:
    """Return all top-level definitions of the package in `folder` by name: read once, and copied before they are changed.

    Raises:
        ValueError: two modules define the same name, which the ejector could not tell apart.
    """
    found: dict[str, Definition] = {}
    for path in sorted(folder.rglob("*.py")):
        if path.name == "__init__.py" or "eject" in path.relative_to(folder).parts:
            continue
        for definition in definitions(
            path.read_text(), ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        ):
            if definition.name in found:
                raise ValueError(
                    f"{definition.name} is defined in {found[definition.name].module} and {definition.module}"
                )
            found[definition.name] = definition
    return found


def definitions(text: str, module: str) -> Iterator[Definition]:
    """Yield the top-level definitions of a module's text."""
    tree = parse(text)
    imports = dict(imported(tree.body))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield Definition(node.name, node, module, imports)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield Definition(node.targets[0].id, node, module, imports)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield Definition(node.target.id, node, module, imports)


def imported(body: Iterable[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Yield the names that import statements bind, also those for type checkers only, each with a statement that binds it alone."""
    for node in body:
        if isinstance(node, ast.If):
            yield from imported(node.body)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], ast.unparse(ast.Import([alias]))
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                yield alias.asname or alias.name, ast.unparse(ast.ImportFrom(node.module, [alias], node.level))


def parse(text: str) -> ast.Module:
    """Parse a module, and put its comments on the statements that they are about."""
    tree = ast.parse(text)
    lines = text.splitlines()
    comments: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# fmt:")):
            comments[token.start[0]] = token.string.split("  # noqa")[0].rstrip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    for statement in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        above: list[str] = []
        at = first - 1
        while at in alone:
            above.insert(0, comments[at])
            at -= 1
        spaced = at > 0 and not lines[at - 1].strip()
        body = getattr(statement, "body", None)
        last = body[0].lineno - 1 if body else statement.end_lineno or first
        behind = next((comments[n] for n in range(last, first - 1, -1) if n in comments and n not in alone), None)
        with_notes(statement, Notes(tuple(above), behind, spaced))
    return tree


class _Marks:
    """Statements that stand for comments and empty lines while a tree is written as text."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def _mark(self, kind: str, text: str) -> ast.stmt:
        self.texts.append(text)
        return ast.Expr(ast.Name(f"_{kind}_{len(self.texts) - 1}"))

    def added(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Return statements with those that stand for their comments, and for the comments inside of them."""
        out: list[ast.stmt] = []
        for statement in body:
            notes = notes_of(statement)
            for part in (statement, *getattr(statement, "handlers", []), *getattr(statement, "cases", [])):
                for name in ("body", "orelse", "finalbody"):
                    if isinstance(getattr(part, name, None), list):
                        setattr(part, name, self.added(getattr(part, name)))
            if notes.spaced and out:
                out.append(self._mark("comment", ""))
            out += [self._mark("comment", text) for text in notes.above]
            out.append(statement)
            if notes.behind:
                inside: list[ast.stmt] | None = getattr(statement, "body", None)
                target = out if inside is None else inside
                target.insert(len(out) if inside is None else 0, self._mark("trailing", notes.behind))
        return out


def without_parentheses(text: str) -> str:
    """Return code without the parentheses that `ast.unparse` puts around tuples and generators, and nobody writes."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(len(line.encode()) for line in lines)]
    gone: list[int] = []
    content = text.encode()
    for node in ast.walk(tree):
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.Return, ast.Yield)) and isinstance(value, ast.Tuple) and value.elts:
            gone += [
                starts[value.lineno - 1] + value.col_offset,
                starts[(value.end_lineno or 1) - 1] + (value.end_col_offset or 0) - 1,
            ]
        if (
            isinstance(node, ast.Call)
            and len(node.args) == 1
            and not node.keywords
            and isinstance(node.args[0], ast.GeneratorExp)
        ):
            inner = node.args[0]
            first = starts[inner.lineno - 1] + inner.col_offset
            if content[first - 1 : first + 1] == b"((":
                gone += [first, starts[(inner.end_lineno or 1) - 1] + (inner.end_col_offset or 0) - 1]
    assert all(content[place : place + 1] in (b"(", b")") for place in gone)
    return b"".join(content[a + 1 : b] for a, b in itertools.pairwise([-1, *sorted(gone), len(content)])).decode()


def unparse(nodes: Iterable[ast.stmt]) -> str:
    """Write statements as text, with their comments; a formatter breaks the lines."""
    marks = _Marks()
    tree = ast.Module(body=marks.added([copy.deepcopy(node) for node in nodes]), type_ignores=[])
    lines: list[str] = []
    for line in without_parentheses(ast.unparse(ast.fix_missing_locations(tree))).splitlines():
        if trailing := _TRAILING.match(line):
            lines[-1] += f"  {marks.texts[int(trailing[1])]}"
        elif comment := _COMMENT.match(line):
            lines.append(f"{comment[1]}{marks.texts[int(comment[2])]}".rstrip())
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"
