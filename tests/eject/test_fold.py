"""What is known is put in, what is never reached is left out, and nothing else changes."""

from __future__ import annotations

import ast
import textwrap

import pytest

from sheer.eject.fold import Known, fold


def folded(text: str, known: Known) -> str:
    body = fold(ast.parse(textwrap.dedent(text)).body, known)
    return "\n".join(ast.unparse(ast.fix_missing_locations(node)) for node in body)


SETTINGS = Known(
    values={
        "cfg.precision": ast.Constant("bf16-mixed"),
        "cfg.clip": ast.Constant(None),
        "cfg.every": ast.Name("EVERY", ast.Load()),
        "cfg.on": ast.Constant(True),
        "callbacks": ast.Tuple([ast.Name("ema", ast.Load()), ast.Name("stopper", ast.Load())], ast.Load()),
        "optimizers": ast.Dict([ast.Constant("main")], [ast.Name("adam", ast.Load())]),
        "none": ast.Tuple([], ast.Load()),
    },
    present=frozenset({"validation", "EVERY"}),
    absent=frozenset({"Mean"}),
    constants={"EVERY": 1},
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = a if cfg.precision == 'bf16-mixed' else b", "x = a"),
        ("x = cfg.precision in ('16-mixed', '64-true')", "x = False"),
        ("x = cfg.clip is None", "x = True"),
        ("x = validation is not None and due()", "x = due()"),
        ("x = unknown is None", "x = unknown is None"),
        ("x = step % cfg.every == 0", "x = step % EVERY == 0"),
        ("x = cfg.every == 1 or y", "x = True"),
        ("x = cfg.every is not None and y", "x = y"),
        ("x = not cfg.on", "x = False"),
        ("x = y is None or not cfg.on", "x = y is None"),
        ("x = y > 0 and cfg.on", "x = y > 0"),
        ("x = y or not cfg.on", "x = y or False"),
        ("x = z if y else z", "x = z"),
        ("x = z if y() else z", "x = z if y() else z"),
        ("x = y or cfg.on", "x = y or True"),  # the value may be y's own
        ("x = cfg.on or y", "x = True"),
        ("x = y and cfg.on and z", "x = y and z"),  # y's value if it is false, else z's, as before
        ("x = isinstance(y, Mean)", "x = False"),
        ("x = isinstance(y, (Tensor, Mean))", "x = isinstance(y, Tensor)"),
        ("x = isinstance(f(), Mean)", "x = isinstance(f(), Mean)"),  # f may do something
        ("x = optimizers['main']", "x = adam"),
        ("x = optimizers.get('main')", "x = adam"),
        ("x = optimizers.get('other')", "x = None"),
        ("x = {n: f(o) for n, o in optimizers.items()}", "x = {'main': f(adam)}"),
        ("x = [c for c in callbacks if cfg.on]", "x = [ema, stopper]"),
        ("x = [c for c in callbacks if c.ready]", "x = [c for c in (ema, stopper) if c.ready]"),
        ("x = f'{cfg.precision}: {y}'", "x = f'bf16-mixed: {y}'"),
        ("x = len(none)", "x = 0"),
        ("cfg.on = y", "cfg.on = y"),  # assigned, not read
    ],
)
def test_expressions(text, expected):
    assert folded(text, SETTINGS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("if cfg.on:\n    a()\nelse:\n    b()", "a()"),
        ("if not cfg.on:\n    a()", ""),
        ("if y:\n    pass\nelif cfg.on:\n    a()\nelse:\n    b()", "if not y:\n    a()"),
        ("if y and cfg.on:\n    a()", "if y:\n    a()"),
        ("if y and cfg.on:\n    a()\nelif y:\n    b()\nelse:\n    c()", "if y:\n    a()\nelse:\n    c()"),
        ("if y():\n    a()\nelif y():\n    b()", "if y():\n    a()\nelif y():\n    b()"),  # may answer otherwise
        ("if isinstance(y, Z):\n    a()\nelif isinstance(y, Z):\n    b()", "if isinstance(y, Z):\n    a()"),
        ("for c in callbacks:\n    c.go(step)", "ema.go(step)\nstopper.go(step)"),
        ("for c in none:\n    c.go()", ""),
        (
            "for c in callbacks:\n    if c.go():\n        break",
            "for c in (ema, stopper):\n    if c.go():\n        break",
        ),
        (
            "for c in callbacks:\n    for x in y:\n        break\n    c.go()",
            "for x in y:\n    break\nema.go()\nfor x in y:\n    break\nstopper.go()",
        ),
        ("with nullcontext():\n    a()", "a()"),
        ("with nullcontext(), b() as x:\n    a()", "with b() as x:\n    a()"),
        ("return x\na()", "return x"),
        ("def f():\n    if cfg.on:\n        return 1\n    return 2", "def f():\n    return 1"),
    ],
)
def test_statements(text, expected):
    assert folded(text, SETTINGS) == expected
