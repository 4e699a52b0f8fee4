"""Records that only carry others are taken apart; what is kept as a whole is not."""

from __future__ import annotations

from sheer.eject.records import explode
from tests.eject.programs import program, same, text_of

RUN = """
@dataclass
class Run:
    model: Module
    count: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    unused: int = 0

    @property
    def last(self) -> int:
        return self.count.steps - 1
"""


def test_fields_become_names_and_parameters():
    made = program(
        RUN
        + "def main(model, batch):\n    run = Run(model=model)\n    for x in batch:\n        step(run, x)\n    return run.last\n"
        "def step(run: Run, x: int):\n    run.count.steps += 1\n    deeper(x, run)\n"
        "def deeper(x: int, run: Run):\n    print(run.model, x)\n",
        "main",
    )
    assert explode(made, "Run")
    made.collect()
    assert same(
        made,
        "def main(model, batch):\n    model_2 = model\n    count = Counter()\n    for x in batch:\n        step(model_2, count, x)\n"
        "    return count.steps - 1\n"
        "def step(model: Module, count: Counter, x: int):\n    count.steps += 1\n    deeper(x, model)\n"
        "def deeper(x: int, model: Module):\n    print(model, x)",
    ), text_of(made)


def test_names_that_are_taken_are_left_alone():
    made = program(RUN + "def main(m):\n    count = 1\n    run = Run(model=m)\n    print(run.count, count)\n", "main")
    assert explode(made, "Run")
    assert "print(count_2, count)" in text_of(made)


def test_what_is_kept_stays_whole():
    for use in ("keep.append(run)", "return run", "Session(run)", "run.count = 1"):
        made = program(RUN + f"def main(m):\n    f(Run(model=m))\ndef f(run: Run):\n    {use}\n", "main")
        assert not explode(made, "Run"), use


def test_an_argument_that_does_something_is_still_evaluated():
    made = program(RUN + "def main(m):\n    run = Run(model=m, unused=count())\n    return run.model\n", "main")
    assert explode(made, "Run")
    assert "count()" in text_of(made)
