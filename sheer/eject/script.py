"""The user's script: where it speaks of the library, and its text with some places changed and the rest as it was."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sheer.eject.facts import Span
from sheer.eject.program import Refusal, free_names
from sheer.eject.source import imported

PACKAGE = "sheer"
DATA = f"{PACKAGE}.data"  # the part of it that a script may name things of


@dataclass
class Script:
    """A script's text and tree, and the changes to be made."""

    path: Path
    text: str
    tree: ast.Module = field(init=False)
    parents: dict[int, ast.AST] = field(init=False)
    modules: set[str] = field(default_factory=set)  # names that the package is imported under
    imported: dict[str, str] = field(default_factory=dict)  # names from the package by those that the script calls them
    edits: list[tuple[int, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        self.parents = {id(child): node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self._lines = self.text.encode().splitlines(keepends=True)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                self.modules |= {a.asname or a.name for a in node.names if a.name == PACKAGE}
                dotted = [a.name for a in node.names if a.name.startswith(f"{PACKAGE}.")]
                if dotted:
                    raise self.refusal(node, f"import {dotted[0]} is not followed. Write `import {PACKAGE}`.")
            elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
                if any(alias.name == "*" for alias in node.names):
                    raise self.refusal(node, f"from {PACKAGE} import * hides what is used. Name what you import.")
                self.imported.update({a.asname or a.name: a.name for a in node.names})
            elif isinstance(node, ast.ImportFrom) and node.module == DATA:
                self.imported.update({a.asname or a.name: a.name for a in node.names})

    def refusal(self, node: ast.AST, why: str) -> Refusal:
        """Return the error for a place that cannot be ejected."""
        return Refusal(f"{self.path}, line {getattr(node, 'lineno', 1)}: {why}")

    def at(self, span: Span) -> ast.Call:
        """Return the call that stands at a place."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and span_of(node) == span:
                return node
        raise Refusal(f"{self.path}, line {span.line}: the call is not in the text; was the file changed while it ran?")

    def statement(self, node: ast.AST) -> ast.stmt:
        """Return the statement that an expression is in."""
        while not isinstance(node, ast.stmt):
            node = self.parents[id(node)]
        return node

    def function_of(self, node: ast.AST) -> ast.AST:
        """Return the function that a node is in, or the module."""
        while not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Module)):
            node = self.parents[id(node)]
        return node

    def references(self) -> Iterator[tuple[ast.expr, str]]:
        """Yield the expressions that name something of the package, each with its name there."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self.modules:
                outer = self.parents[id(node)]
                if node.attr == "data" and isinstance(outer, ast.Attribute):
                    yield outer, outer.attr
                else:
                    yield node, node.attr
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in self.imported:
                yield node, self.imported[node.id]

    def source(self, node: ast.expr) -> str:
        """Return the text of an expression, with the changes that were noted inside of it."""
        start, end = self._offsets(node)
        inside = [(a - start, b - start, new) for a, b, new in self.edits if start <= a and b <= end]
        return edited(self.text.encode()[start:end], inside).decode()

    def offset(self, line: int, column: int) -> int:
        """Return where a line and a column, in bytes, are in the text, in bytes."""
        return sum(len(text) for text in self._lines[: line - 1]) + column

    def _offsets(self, node: ast.AST) -> tuple[int, int]:
        span = span_of(node)
        return self.offset(span.line, span.column), self.offset(span.end_line, span.end_column)

    def remark(self, node: ast.expr) -> str:
        """Return what is said of an argument in comments of the script: above it inside of its call, and behind it."""
        first, last = node.lineno, node.end_lineno or node.lineno
        parent = self.parents[id(node)]
        if isinstance(parent, ast.keyword):
            first = parent.lineno
        while not isinstance(parent, ast.Call):
            parent = self.parents[id(parent)]
        said: list[str] = []
        while first - 1 > parent.lineno and self._is_comment(first - 1):
            first -= 1
            said.insert(0, self._lines[first - 1].decode().strip())
        _, end = self._offsets(node)
        behind = self.text.encode()[end : self.offset(last + 1, 0)].decode()
        if behind.lstrip(" ,)]").startswith("#"):
            said.append(behind.lstrip(" ,)]").strip())
        return "; ".join(comment.removeprefix("#").strip() for comment in said)

    def _is_comment(self, line: int) -> bool:
        return self._lines[line - 1].lstrip().startswith(b"#")

    def replace(self, node: ast.AST, new: str) -> None:
        """Put a text in the place of a node, and of all changes inside of it."""
        start, end = self._offsets(node)
        self.edits = [edit for edit in self.edits if not (start <= edit[0] and edit[1] <= end)]
        self.edits.append((start, end, new))

    def insert_before(self, statement: ast.stmt, lines: list[str]) -> None:
        """Put lines before a statement, as far to the right as it is."""
        start, _ = self._offsets(statement)
        text = "".join(f"{line}\n{' ' * statement.col_offset}" for line in lines)
        self.edits.append((start, start, text))

    def remove(self, statement: ast.stmt) -> None:
        """Take a statement out, with its lines if it is alone on them."""
        start, end = self._offsets(statement)
        text = self.text.encode()
        line_start, line_end = text.rfind(b"\n", 0, start) + 1, text.find(b"\n", end)
        line_end = len(text) if line_end < 0 else line_end + 1
        rest = text[end:line_end].strip()
        if not text[line_start:start].strip() and (not rest or rest.startswith(b"#")):
            start, end, new = line_start, line_end, ""
        else:
            new = "pass"
        self.edits = [edit for edit in self.edits if not (start <= edit[0] and edit[1] <= end)]
        self.edits.append((start, end, new))

    def remove_imports(self) -> None:
        """Take the package out of the import statements."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module in (PACKAGE, DATA):
                self.remove(node)
            elif isinstance(node, ast.Import) and any(alias.name == PACKAGE for alias in node.names):
                left = [alias for alias in node.names if alias.name != PACKAGE]
                if left:
                    self.replace(node, ast.unparse(ast.Import(left)))
                else:
                    self.remove(node)

    def edited(self) -> str:
        """Return the text with all changes made."""
        return edited(self.text.encode(), self.edits).decode()

    def after_imports(self) -> int:
        """Return the offset, in bytes, of the line behind the last import statement at the top."""
        last = 0
        for node in self.tree.body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not isinstance(node, (ast.Import, ast.ImportFrom)) and not is_docstring:
                break
            last = node.end_lineno or last
        return self.offset(last + 1, 0)

    def import_statements(self) -> set[str]:
        """Return what the imports at the head of the script bind, each as a statement of its own."""
        at = self.after_imports()
        head = [node for node in self.tree.body if self._offsets(node)[1] <= at]
        statements = dict(imported(head))
        nested = [a for node in head if isinstance(node, ast.Import) for a in node.names if a.asname is not None]
        same = {
            f"from {outer} import {a.asname}"
            for a in nested
            if (outer := a.name.removesuffix(f".{a.asname}")) != a.name
        }
        return {*statements.values(), *same}  # `import torch.nn as nn` is `from torch import nn`

    def with_block(self, head: str, imports: str, block: str) -> str:
        """Return the text with all changes made: a head before the imports, new imports and definitions behind them."""
        at = self.after_imports()
        blank = "\n" if self.text.encode()[at : at + 1] == b"\n" else "\n\n"
        self.edits.append((at, at, f"{imports}\n{block.strip()}\n{blank}"))
        first = self.tree.body[0]
        is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        top = self.offset((first.end_lineno or 0) + 1, 0) if is_docstring else 0
        self.edits.append((top, top, f"\n{head}" if is_docstring else head))
        return self.edited()

    def has_future_annotations(self) -> bool:
        """Whether the types in the script are not evaluated."""
        return any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in self.tree.body)

    def names(self) -> set[str]:
        """Return all names that the script uses or binds."""
        names = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}
        names |= {
            n.name for n in ast.walk(self.tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
        }
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {a.asname or a.name.split(".")[0] for a in node.names}
        return names

    def names_seen_in(self, scope: ast.AST) -> set[str]:
        """Return the names that a function, or the module, binds or reads itself, or that functions inside of it read from it."""
        names: set[str] = set()
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names |= {node.name, *free_names(node)}
            elif isinstance(node, ast.Name):
                names.add(node.id)
            else:
                names |= self.names_seen_in(node)
        return names

    def attributes(self) -> frozenset[str]:
        """Return the names of all attributes that the script reads."""
        return frozenset(node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute))


def edited(text: bytes, edits: Iterable[tuple[int, int, str]]) -> bytes:
    """Return a text with the pieces between two places each replaced."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new.encode() + text[end:]
    return text


def span_of(node: ast.AST) -> Span:
    """Return where a node stands."""
    line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0)
    return Span(line, column, getattr(node, "end_lineno", line), getattr(node, "end_col_offset", column))
