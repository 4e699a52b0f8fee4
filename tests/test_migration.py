"""The pages for those who come from elsewhere leave out no name of theirs, and name nothing of ours that is not there."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import sheer

DOCS = Path(__file__).parents[1] / "docs"


def checked(name: str, version: str) -> ModuleType:
    """Import a library of the version that the pages were written for; other versions have other names."""
    module = pytest.importorskip(name)
    if not module.__version__.startswith(f"{version}."):
        pytest.skip(f"the page was written for {name} {version}, and this is {module.__version__}")
    return module


def missing(names: list[str], page: str) -> list[str]:
    text = (DOCS / page).read_text()
    return [name for name in names if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", text)]


def test_every_argument_of_lightnings_trainer_is_on_the_page() -> None:
    lightning = checked("lightning", "2.6")
    names = list(inspect.signature(lightning.Trainer.__init__).parameters)[1:]
    assert missing(names, "from-lightning.md") == []


def test_every_callback_of_lightning_is_on_the_page() -> None:
    callbacks = checked("lightning", "2.6").pytorch.callbacks
    bases = {"Callback", "Checkpoint", "ProgressBar", "TQDMProgressBar", "RichProgressBar", "RichModelSummary"}
    names = [name for name in callbacks.__all__ if name not in {*bases, "WeightAveraging"}]
    assert missing(names, "from-lightning.md") == []


def test_every_training_argument_of_transformers_is_on_the_page() -> None:
    transformers = checked("transformers", "5.24")
    names = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
    assert missing(names, "from-transformers.md") == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("from-*.md")), ids=lambda page: page.name)
def test_what_a_page_says_of_sheer_is_there(page: Path) -> None:
    for name in re.findall(r"\bsheer\.([A-Za-z_]+)", page.read_text()):
        assert hasattr(sheer, name), f"{page.name} names sheer.{name}"
