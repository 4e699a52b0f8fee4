"""The docs say what is so: their code runs, their tables are those of the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if "```python" in path.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, in one namespace."""
    monkeypatch.setattr(sys, "argv", ["page.py"])
    names: dict[str, Any] = {"__name__": "page"}
    for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        line = page.read_text()[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match[1], str(page), "exec"), names)


def test_the_tables_of_settings_are_those_of_the_code() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import generate

    page = ROOT / "docs" / "settings.md"
    assert generate.filled(page.read_text()) == page.read_text(), "run `python docs/generate.py`"


def test_the_table_of_what_is_tried_on_several_ranks_is_that_of_the_tests() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import generate

    page = ROOT / "docs" / "parallel.md"
    assert generate.with_ways(page.read_text()) == page.read_text(), "run `python docs/generate.py`"


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
