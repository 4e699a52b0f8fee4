"""Writes the parts of the docs that are taken from the code: `python docs/generate.py`."""

from __future__ import annotations

import inspect
import io
import runpy
import sys
import tokenize
import typing
from dataclasses import MISSING, fields
from pathlib import Path

from sheer.settings import Checkpoint, Compile, Parallel, Rollback, Settings, describe_type

BEGIN, END = "<!-- generated from sheer/settings.py -->", "<!-- end -->"
BEGIN_WAYS = "<!-- generated from tests/distributed/features.py -->"


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
    tables = [table(Settings), table(Checkpoint), table(Rollback), table(Compile), table(Parallel)]
    made = [
        f"{BEGIN}\n{made_table}\n{END}{part.split(END, 1)[1]}"
        for made_table, part in zip(tables, parts[1:], strict=True)
    ]
    return parts[0] + "".join(made)


def table_of_ways() -> str:
    """Return a Markdown table of what the tests try under which way of dividing a run over ranks."""
    from tests.distributed.features import FEATURES, TRIED, WAYS, refusal

    lines = [f"| | {' | '.join(WAYS)} |", f"| --- |{' --- |' * len(WAYS)}"]
    for feature in FEATURES:
        cells = [
            "" if (way, feature) not in TRIED else "refused" if refusal(way, feature) is not None else "yes"
            for way in WAYS
        ]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_ways(text: str) -> str:
    """Return the text of parallel.md with its table made anew."""
    before, rest = text.split(BEGIN_WAYS)
    return f"{before}{BEGIN_WAYS}\n{table_of_ways()}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name, made_anew in (("settings.md", filled), ("parallel.md", with_ways)):
        path = Path(__file__).with_name(name)
        path.write_text(made_anew(path.read_text()))
    runpy.run_path(str(Path(__file__).parent / "tasks" / "count.py"), run_name="__main__")
