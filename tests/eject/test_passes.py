"""The passes between folding and trimming, each on a few lines."""

from __future__ import annotations

import ast

import pytest

from sheer.eject.blocks import inline_blocks
from sheer.eject.bundle import bundle
from sheer.eject.constants import bind_methods, call_for_nothing, fold_attributes, pass_fields
from sheer.eject.drop import Needless, drop
from sheer.eject.fold import Known
from sheer.eject.normalise import normalise
from sheer.eject.propagate import bind_parameters, fold_all, narrow_parameters, type_parameters, unused_parameters
from sheer.eject.tidy import pass_in_order, tidy_names
from sheer.eject.trim import trim_results
from tests.eject.programs import program, same, text_of

NEEDLESS = Needless(
    frozenset({"check", "run.say"}),
    frozenset({"Place"}),
    frozenset({"InputError"}),
    frozenset({"torch.OutOfMemoryError"}),
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def main(x):\n    check(x)\n    go(x)", "def main(x):\n    go(x)"),
        ("def main(run):\n    run.say(1)\n    run.go(1)", "def main(run):\n    run.go(1)"),
        ("def main(x):\n    y = check(x)\n    go(y)", "def main(x):\n    y = check(x)\n    go(y)"),
        ("def main(x):\n    if x < 0:\n        raise InputError('no')\n    go(x)", "def main(x):\n    go(x)"),
        ("def main(x):\n    if x < 0:\n        raise OtherError('no')\n    go(x)",) * 2,
        (
            "def main(x):\n    if x:\n        go(x)\n    else:\n        raise InputError('no')",
            "def main(x):\n    if x:\n        go(x)",
        ),
        (
            "def main(x):\n    where = Place(x)\n    with where:\n        where.at = x\n        go(x)",
            "def main(x):\n    go(x)",
        ),
        (
            "def main(x):\n    try:\n        go(x)\n    except Exception as error:\n        error.add_note('here')\n        raise",
            "def main(x):\n    go(x)",
        ),
        ("def main(x):\n    try:\n        go(x)\n    except Exception:\n        undo(x)\n        raise",) * 2,
        (
            "def main(x):\n    try:\n        go(x)\n    except torch.OutOfMemoryError as error:\n        go_again(x, error)",
            "def main(x):\n    go(x)",
        ),
        (
            "def main(x):\n    with closing(read(x)) as rows:\n        for row in rows:\n            go(row)",
            "def main(x):\n    for row in read(x):\n        go(row)",
        ),
    ],
)
def test_drop(before: str, after: str) -> None:
    made = program(before, "main")
    drop(made, NEEDLESS)
    assert same(made, after), text_of(made)


CLASS = "class Reader:\n    def __init__(self, size, step):\n        self.size = size\n        self.step = step\n"


def test_constants_reach_methods_and_attributes() -> None:
    made = program(
        CLASS
        + "    def next_rows(self, start, extra=None):\n        if extra is not None:\n            extra()\n        return start + self.step\n"
        "def main(n):\n    r = Reader(n, 2)\n    return r.next_rows(n)",
        "main",
    )
    known = Known()
    bind_methods(made, known)
    fold_attributes(made, known)
    assert "extra" not in text_of(made)
    assert "return start + 2" in text_of(made)
    assert "Reader(n)" in text_of(made)


@pytest.mark.parametrize(
    "use",
    [
        "r = Reader(n, 2)\n    q = Reader(n, 3)\n    return r.next_rows(n), q",  # two values
        "r = Reader(n, 2)\n    r.step = 5\n    return r.next_rows(n)",  # set again
    ],
)
def test_what_changes_is_left_alone(use: str) -> None:
    made = program(
        CLASS + f"    def next_rows(self, start):\n        return start + self.step\ndef main(n):\n    {use}", "main"
    )
    bind_methods(made, Known())
    fold_attributes(made, Known())
    assert "return start + self.step" in text_of(made)


def test_the_default_of_a_field_that_is_given_by_position_is_not_taken() -> None:
    record = "@dataclass\nclass Pair:\n    one: int\n    two: bool = False\n"
    made = program(
        record
        + "def main(x):\n    pair = Pair(x, True)\n    return go(pair)\ndef go(pair: Pair):\n    return pair.two",
        "main",
    )
    fold_attributes(made, Known())
    assert "return pair.two" in text_of(made)


def test_a_method_that_another_object_may_have_is_bound_only_where_the_object_is_known() -> None:
    made = program(
        "class Sums:\n    def add(self, x, prefix):\n        self.x = prefix + x\n"
        "def main(s: Sums, others):\n    s.add(1, '')\n    others.add(2, 'a')",
        "main",
    )
    bind_methods(made, Known())
    assert "s.add()" in text_of(made) and "others.add(2, 'a')" in text_of(made)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def main(x):\n    a, b = x, 1\n    go(a, b)", "def main(x):\n    a = x\n    b = 1\n    go(a, b)"),
        ("def main(x):\n    x, y = y, x\n    go(x, y)",) * 2,
        ("def main(x):\n    if x:\n        return 1\n    return 2", "def main(x):\n    return 1 if x else 2"),
        ("def main(x):\n    x = f(x)\n    return g(x)", "def main(x):\n    x_2 = f(x)\n    return g(x_2)"),
    ],
)
def test_normalise(before: str, after: str) -> None:
    made = program(before, "main")
    normalise(made)
    assert same(made, after), text_of(made)


def test_displays_and_constants_are_passed_as_what_they_hold() -> None:
    made = program("def main(a):\n    f((a, a), 3, {'k': a})\ndef f(pair, n, by):\n    go(pair[1], n, by['k'])", "main")
    bind_parameters(made, Known())
    assert same(made, "def main(a):\n    f(a, a)\ndef f(a: Any, a_2: Any):\n    go(a, 3, a_2)"), text_of(made)


def test_a_list_that_is_changed_stays_one() -> None:
    made = program("def main(a):\n    f([a])\n    f([a])\ndef f(rows):\n    rows.append(1)\n    go(rows)", "main")
    bind_parameters(made, Known())
    assert "def f(rows)" in text_of(made)


def test_a_parameter_that_is_never_none_is_known_to_be_there() -> None:
    text = "class C:\n    pass\ndef main():\n    c = C()\n    f(c)\ndef f(c: C | None):\n    if c is not None:\n        go(c)"
    made = program(text, "main")
    narrow_parameters(made)
    fold_all(made, Known())
    assert "if" not in text_of(made)
    unknown = program(text.replace("c = C()", "c = find()"), "main")
    narrow_parameters(unknown)
    fold_all(unknown, Known())
    assert "if c is not None" in text_of(unknown)


def test_unused_parameters_go_but_not_what_their_arguments_do() -> None:
    made = program("def main(x):\n    f(x, 1)\n    g(x())\ndef f(a, b):\n    go(a)\ndef g(a):\n    go()", "main")
    unused_parameters(made)
    assert same(made, "def main(x):\n    f(x)\n    g(x())\ndef f(a):\n    go(a)\ndef g(a):\n    go()"), text_of(made)


def test_a_context_and_a_generator_are_written_where_they_are_used() -> None:
    made = program(
        "def main(x):\n    with mode(x):\n        go(x)\n    for a, b in pairs(x):\n        go(a, b)\n"
        "@contextmanager\ndef mode(m):\n    old = m.on\n    m.on = True\n    yield\n    m.on = old\n"
        "def pairs(rows):\n    for row in rows:\n        yield row, len(row)",
        "main",
    )
    while inline_blocks(made):
        pass
    assert same(
        made,
        "def main(x):\n    old = x.on\n    x.on = True\n    go(x)\n    x.on = old\n    for a in x:\n        b = len(a)\n        go(a, b)",
    ), text_of(made)


@pytest.mark.parametrize(
    "text",
    [
        "def main(x):\n    for a in rows(x):\n        go(a)\ndef rows(x):\n    for r in x:\n        yield r\n    done()",
        "def main(x):\n    for a in rows(x):\n        go(a)\ndef rows(x):\n    for r in x:\n        for q in r:\n            yield q",
    ],
)
def test_a_generator_that_goes_on_behind_its_yield_stays_one(text: str) -> None:
    made = program(text, "main")
    assert not inline_blocks(made)


def test_names_lose_the_numbers_that_nothing_needs() -> None:
    made = program("def main(x):\n    y_2 = f(x)\n    x_2 = g(x)\n    return y_2 + x_2 + x", "main")
    tidy_names(made)
    assert same(made, "def main(x):\n    y = f(x)\n    x_2 = g(x)\n    return y + x_2 + x"), text_of(made)


def test_many_values_become_a_record() -> None:
    names = "abcdehij"
    given, arguments = ", ".join(names), ", ".join(f"{n}: int" for n in names)
    made = program(
        f"def fit({given}):\n    for x in a:\n        f({given}, x)\ndef f({arguments}, x):\n    go(a, b, x)\n    g({given})\n"
        f"def g({arguments}):\n    go({given})",
        "fit",
    )
    bundle(made, "fit")
    text = text_of(made)
    assert "f(run, x)" in text and "g(run)" in text and "go(run.a, run.b, x)" in text
    assert "run = PlainRun(a=a, b=b" in text
    assert text.index("run = PlainRun") < text.index("for x in a")
    ast.parse(text)


def test_what_is_bound_anew_stays_out_of_the_record() -> None:
    names = "abcdehij"
    given = ", ".join(names)
    made = program(
        f"def fit({given}):\n    for x in a:\n        b = x\n        f({given})\ndef f({given}):\n    go({given})",
        "fit",
    )
    bundle(made, "fit")
    assert "f(run, b)" in text_of(made)


BOARD = """@dataclass
class Info:
    folder: str
    step: int
    other: int


class Board:
    def start(self, info: Info) -> None:
        self.folder = info.folder

    def told(self) -> None:
        self.step = 1


class Other:
    def told(self) -> str:
        return "stop"


"""


def test_a_method_gets_the_fields_that_it_reads() -> None:
    made = program(f"{BOARD}def main(board: Board, info: Info):\n    board.start(info)\n", "main")
    pass_fields(made, ["Info"], frozenset())
    assert "board.start(info.folder)" in text_of(made)
    assert "def start(self, folder: str)" in text_of(made) and "self.folder = folder" in text_of(made)


@pytest.mark.parametrize(
    "main",
    [
        "def main(board, info: Info):\n    board.start(info)\n",
        "def main(board: Board):\n    board.start(made())\n",
        "def main(board: Board, info: Info, any):\n    board.start(info)\n    any.start(info)\n",
    ],
)
def test_where_a_call_is_not_known_the_record_stays(main: str) -> None:
    made = program(BOARD + main, "main")
    before = text_of(made)
    pass_fields(made, ["Info"], frozenset())
    assert text_of(made) == before


def test_what_returns_nothing_decides_nothing() -> None:
    text = f"{BOARD}def main(board: Board, other: Other, x):\n    x = board.told() or x\n    x = other.told() or x\n"
    made = program(text, "main")
    call_for_nothing(made)
    assert "    board.told()\n    x = x\n    x = other.told() or x" in text_of(made)


def test_a_parameter_is_of_the_class_that_all_calls_pass() -> None:
    text = f"{BOARD}def go(a: Any, b: Any):\n    return a, b\ndef main(board: Board, other: Other):\n    go(board, board)\n    go(board, other)\n"
    made = program(text, "main")
    type_parameters(made)
    assert "def go(a: Board, b: Any)" in text_of(made)


def test_objects_are_made_by_position_only_where_the_class_is_known() -> None:
    long = "a_value_of_a_certain_length"
    known = f"Info(folder={long}, step={long}_2, other={long}_3)"
    text = f"{BOARD}def main():\n    {known}\n    made.init(folder={long}, step={long}_2, other={long}_3)\n    Info(folder={long}, other={long}, **{long})\n"
    made = program(text, "main")
    pass_in_order(made)
    assert f"Info({long}, {long}_2, {long}_3)" in text_of(made).replace("\n", "")
    assert f"made.init(folder={long}" in text_of(made) and f"**{long}" in text_of(made)


def test_what_no_call_uses_is_not_returned() -> None:
    text = "def go(x):\n    x.y = 1\n    return x\ndef twice(x):\n    if x:\n        return 1\n    return 2\ndef main(x):\n    go(x)\n    twice(x)\n"
    made = program(text, "main")
    trim_results(made)
    assert "def go(x) -> None:\n    x.y = 1\n" in text_of(made)
    assert "return 2" in text_of(made)


def test_a_context_that_only_closes() -> None:
    text = """@contextmanager
def opened(x):
    x.start()
    try:
        yield
    finally:
        x.close()


def main(board):
    with opened(board), signals() as given:
        go(given)
"""
    made = program(text, "main")
    assert inline_blocks(made)
    assert same(
        made, "def main(board):\n    board.start()\n    with closing(board), signals() as given:\n        go(given)"
    )
