"""Small programs to try passes on."""

from __future__ import annotations

import ast
import textwrap

from sheer.eject.program import Program
from sheer.eject.source import definitions, unparse


def program(text: str, *roots: str) -> Program:
    """Return the program of a module's text."""
    made = Program({d.name: d for d in definitions(textwrap.dedent(text), "module")}, set(roots))
    made.collect()
    return made


def text_of(made: Program) -> str:
    """Return a program's text, definitions apart."""
    return "\n".join(unparse([node]).strip() for node in made.nodes.values())


def same(made: Program, expected: str) -> bool:
    """Whether a program is what is expected, but for its layout."""
    return ast.dump(ast.parse(text_of(made))) == ast.dump(ast.parse(textwrap.dedent(expected)))
