"""Functions that are called once are written where they are called, and compute the same."""

from __future__ import annotations

import pytest

from sheer.eject.inline import inline_expressions, inline_procedures
from tests.eject.programs import program, same, text_of


def inlined(text: str, most: int = 20):
    made = program(text, "main")
    inline_expressions(made)
    while inline_procedures(made, most):
        pass
    made.collect()
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "def main(x):\n    f(x, 1)\ndef f(a, b):\n    print(a)\n    print(b)",
            "def main(x):\n    print(x)\n    print(1)",
        ),
        (  # locals of both sides stay apart
            "def main(x):\n    y = 1\n    z = f(x)\n    return y + z\ndef f(a):\n    y = a * 2\n    print(y)\n    return y",
            "def main(x):\n    y = 1\n    z = x * 2\n    print(z)\n    return y + z",
        ),
        (
            "def main(x):\n    y = 1\n    f(x)\n    return y\ndef f(a):\n    y = a * 2\n    print(y)",
            "def main(x):\n    y = 1\n    y_2 = x * 2\n    print(y_2)\n    return y",
        ),
        (  # a parameter that is assigned is a local of its own
            "def main(x):\n    f(x)\n    return x\ndef f(a):\n    a = a + 1\n    print(a)",
            "def main(x):\n    a = x\n    a = a + 1\n    print(a)\n    return x",
        ),
        (  # an argument is evaluated once, before
            "def main(x):\n    f(x.y)\ndef f(a):\n    go()\n    print(a, a)",
            "def main(x):\n    a = x.y\n    go()\n    print(a, a)",
        ),
        (  # an early return cannot be written in the middle
            "def main(x):\n    y = f(x)\n    return y + 1\ndef f(a):\n    if a:\n        return 1\n    print(a)\n    return 2",
            "def main(x):\n    y = f(x)\n    return y + 1\ndef f(a):\n    if a:\n        return 1\n    print(a)\n    return 2",
        ),
        (  # but it can at the end
            "def main(x):\n    return f(x)\ndef f(a):\n    if a:\n        return 1\n    print(a)\n    return 2",
            "def main(x):\n    if x:\n        return 1\n    print(x)\n    return 2",
        ),
        (
            "def main(x):\n    for y in x:\n        if f(y):\n            break\ndef f(a):\n    print(a)\n    return a > 1",
            "def main(x):\n    for y in x:\n        print(y)\n        if y > 1:\n            break",
        ),
        (
            "def main(x):\n    return f(x) or f(1)\ndef f(a):\n    return a > 1",
            "def main(x):\n    return x > 1 or 1 > 1",
        ),
        (  # a single statement may stand in several places, but not for a value
            "def main(x):\n    f(x)\n    f(1)\ndef f(a):\n    print(a)",
            "def main(x):\n    print(x)\n    print(1)",
        ),
        (
            "def main(x):\n    f(x)\n    return f(1)\ndef f(a):\n    print(a)",
            "def main(x):\n    f(x)\n    return f(1)\ndef f(a):\n    print(a)",
        ),
        (  # two calls of what does something stay
            "def main(x):\n    f(x)\n    f(x)\ndef f(a):\n    print(a)\n    print(a)",
            "def main(x):\n    f(x)\n    f(x)\ndef f(a):\n    print(a)\n    print(a)",
        ),
        (  # neither a generator nor what is passed on as a value
            "def main(x):\n    g(f)\n    for y in h(x):\n        print(y)\ndef f(a):\n    print(a)\ndef h(a):\n    yield a",
            "def main(x):\n    g(f)\n    for y in h(x):\n        print(y)\ndef f(a):\n    print(a)\ndef h(a):\n    yield a",
        ),
        (  # the name of a comprehension must not capture an argument
            "def main(a, p):\n    return f(p)\ndef f(b):\n    return [b for p in 'xy']",
            "def main(a, p):\n    return [p for p_2 in 'xy']",
        ),
    ],
)
def test_inlining(text, expected):
    made = inlined(text)
    assert same(made, expected), text_of(made)


def test_long_functions_stay():
    text = "def main(x):\n    f(x)\ndef f(a):\n" + "    print(a)\n" * 5
    assert "f" in inlined(text, most=4).nodes
    assert "f" not in inlined(text, most=5).nodes


def test_comments_come_along():
    text = "def main(x):\n    # why\n    f(x)\ndef f(a):\n    # what\n    print(a)  # so\n    print(2)"
    assert text_of(inlined(text)) == "def main(x):\n    # why\n    # what\n    print(x)  # so\n    print(2)"
