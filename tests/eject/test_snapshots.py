"""Ejected scripts as they are today: a change of what comes out is seen in review. `make snapshots` writes them anew."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from sheer.eject.check import check
from sheer.eject.eject import eject

pytestmark = pytest.mark.new_processes  # as a user would run them
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SOURCES = {
    "digits": HERE / "sources" / "digits.py",
    "digits_ddp": HERE / "sources" / "digits_ddp.py",
    "digits_fsdp": HERE / "sources" / "digits_fsdp.py",
    "design": HERE / "sources" / "design.py",
    "gpt": ROOT / "examples" / "gpt.py",
    "gan": ROOT / "examples" / "gan.py",
}
LINES = {
    "digits": 150,
    "digits_ddp": 291,
    "digits_fsdp": 345,
    "design": 645,
    "gpt": 850,
    "gan": 772,
}  # at most, in all


@pytest.mark.parametrize("name", SOURCES)
def test_what_comes_out_is_what_was_reviewed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, kept = eject(SOURCES[name]).text, HERE / "snapshots" / f"{name}_torch.py"
    if os.environ.get("SHEER_WRITE_SNAPSHOTS"):
        kept.write_text(text)
    assert text == kept.read_text(), "run `make snapshots`, and read what changed"
    assert len(text.splitlines()) <= LINES[name]


def test_the_loop_of_a_small_run_is_one_screen() -> None:
    tree = ast.parse((HERE / "snapshots" / "digits_torch.py").read_text())
    fit = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "fit")
    assert (fit.end_lineno or 0) - fit.lineno + 1 <= 45


@pytest.mark.parametrize("name", ["digits", "design"])
def test_they_do_what_their_originals_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = check(SOURCES[name], HERE / "snapshots" / f"{name}_torch.py", [], updates=1000)
    assert found.difference is None
    assert found.updates > 100 and found.logged > 4


def test_the_readme_shows_one_of_them_beside_its_original() -> None:
    readme = (ROOT / "README.md").read_text().split("## Take the loop with you")[1]
    written, made = (block.split("```")[0].strip() for block in readme.split("```py\n")[1:3])
    assert written in SOURCES["digits"].read_text() and "trainer.fit(" in written
    assert made in (HERE / "snapshots" / "digits_torch.py").read_text() and made.startswith("def fit(")
