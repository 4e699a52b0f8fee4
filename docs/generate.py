"""Writes the parts of the docs that are taken from the code: `python docs/generate.py`."""

from __future__ import annotations

import inspect
import io
import tokenize
import typing
from dataclasses import MISSING, fields
from pathlib import Path

from sheer.settings import Checkpoint, Settings, describe_type

BEGIN, END = "<!-- generated from sheer/settings.py -->", "<!-- end -->"


def comments(settings: type) -> dict[str, str]:
    """Return the comment behind each field of a dataclass."""
    found, name = {}, ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(settings)).readline):
        if token.type == tokenize.NAME and token.start[1] == 4:
            name = token.string
        elif token.type == tokenize.COMMENT and name:
            found.setdefault(name, token.string.removeprefix("# "))
    return found


def table(settings: type) -> str:
    """Return a Markdown table of a dataclass: name, type, default, meaning."""
    meanings, hints = comments(settings), typing.get_type_hints(settings)
    lines = ["| name | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(settings):
        default = repr(field.default) if field.default is not MISSING else "Checkpoint()"
        kind = describe_type(hints[field.name])
        lines.append(f"| `{field.name}` | {kind} | `{default}` | {meanings[field.name]} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return the text of settings.md with its tables made anew."""
    parts = text.split(BEGIN)
    tables = [table(Settings), table(Checkpoint)]
    made = [
        f"{BEGIN}\n{made_table}\n{END}{part.split(END, 1)[1]}"
        for made_table, part in zip(tables, parts[1:], strict=True)
    ]
    return parts[0] + "".join(made)


if __name__ == "__main__":
    path = Path(__file__).with_name("settings.md")
    path.write_text(filled(path.read_text()))
