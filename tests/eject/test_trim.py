"""What nothing reads goes, and what may do something stays."""

from __future__ import annotations

import pytest

from sheer.eject.trim import trim_classes, trim_locals
from tests.eject.programs import program, same, text_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def main(x):\n    a = x\n    return x", "def main(x):\n    return x"),
        ("def main(x):\n    a = f(x)\n    return x", "def main(x):\n    f(x)\n    return x"),
        ("def main(x):\n    a, b = x, f()\n    return a", "def main(x):\n    a, b = x, f()\n    return a"),
        ("def main(x):\n    a, b = x, x.y\n    return a", "def main(x):\n    a = x\n    return a"),
        ("def main(x):\n    x = x\n    return x", "def main(x):\n    return x"),
        ("def main(x):\n    if x:\n        a = 1\n    return x", "def main(x):\n    return x"),
        ("def main(x):\n    if f(x):\n        a = 1\n    return x", "def main(x):\n    f(x)\n    return x"),
        ("def main(x):\n    a = 0\n    for b in x:\n        a += b", "def main(x):\n    for b in x:\n        pass"),
        ("def main(x):\n    a = b = f(x)\n    return b", "def main(x):\n    a = b = f(x)\n    return b"),
    ],
)
def test_locals(text, expected):
    made = program(text, "main")
    for _ in range(3):
        trim_locals(made)
    assert same(made, expected), text_of(made)


def test_fields_and_methods():
    made = program(
        "@dataclass\nclass Count:\n    a: int\n    b: int\n    c: int = 0\n    def shown(self):\n        return self.a\n    def unread(self):\n        return self.b\n"
        "    def __len__(self):\n        return self.a\n"
        "def main(x):\n    self = Count(a=1, b=2)\n    self.c = 3\n    return self.shown()\n",
        "main",
    )
    for _ in range(3):
        trim_classes(made, frozenset())
    assert same(
        made,
        "def main(x):\n    self = Count(a=1)\n    return self.shown()\n"
        "@dataclass\nclass Count:\n    a: int\n    def shown(self):\n        return self.a\n    def __len__(self):\n        return self.a",
    ), text_of(made)


def test_what_the_script_reads_stays():
    made = program(
        "@dataclass\nclass Result:\n    a: int\n    b: int\ndef main():\n    return Result(a=1, b=2)\n", "main"
    )
    trim_classes(made, frozenset({"b"}))
    assert "b: int" in text_of(made) and "a: int" not in text_of(made)
