"""Trees keep the comments and empty lines of what they were read from."""

from __future__ import annotations

import textwrap

import pytest

from sheer.eject.source import definitions, parse, read_library, unparse

TEXT = textwrap.dedent(
    """\
    def f(x):
        # what comes first
        # and more of it
        a = x  # at the end

        if a:  # of a test
            return 1
        # the rest
        return [
            a,
        ]  # of several lines
    """
)


def test_comments_and_empty_lines_stay():
    assert unparse(parse(TEXT).body) == TEXT.replace("[\n        a,\n    ]", "[a]")


def test_comments_leave_with_their_statement():
    tree = parse(TEXT)
    del tree.body[0].body[0], tree.body[0].body[0]
    assert unparse(tree.body) == "def f(x):\n    # the rest\n    return [a]  # of several lines\n"


def test_marks_for_linters_are_no_comments():
    text = "import a  # noqa: F401\nb = 1  # type: ignore[x]\n"
    assert unparse(parse(text).body) == "import a\nb = 1  # type: ignore[x]\n"  # a strict checker needs it


def test_definitions_know_the_imports_of_their_module():
    text = "import torch\nfrom a.b import c as d\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from e import f\nx = 1\ndef g(): ...\nclass H: ...\n"
    found = {definition.name: definition for definition in definitions(text, "m")}
    assert list(found) == ["x", "g", "H"]
    assert found["g"].imports["d"] == "from a.b import c as d"
    assert found["g"].imports["f"] == "from e import f"
    assert found["g"].imports["torch"] == "import torch"


def test_a_name_defined_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def f(): ...\n")
    with pytest.raises(ValueError, match=r"f is defined in .*\.a and .*\.b"):
        read_library(tmp_path)
