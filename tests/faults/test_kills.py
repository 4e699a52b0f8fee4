"""A run that is killed anywhere, with SIGKILL, goes on and ends as the one that was never killed, bit for bit.

A failure names its seed and each kill. `python -m tests.faults.soak` kills at random, and far more often.
"""

from __future__ import annotations

import pytest

from tests.faults.killer import CALLS
from tests.faults.runs import How, Tally, at_every_label, at_random
from tests.faults.warm import Warm

pytestmark = pytest.mark.xdist_group("kills")


@pytest.fixture(scope="module")
def tallies() -> list[Tally]:
    """What all tests of this file have done."""
    return []


ONE = [How(asynchronous=False), How(asynchronous=True)]
TWO = [How(asynchronous=False, ranks=2, parallel="ddp"), How(asynchronous=True, ranks=2, parallel="fsdp")]
OTHER_TWO = [How(asynchronous=True, ranks=2, parallel="ddp"), How(asynchronous=False, ranks=2, parallel="fsdp")]


@pytest.mark.parametrize("how", [*ONE, *TWO], ids=str)
def test_at_every_call_by_which_a_save_writes(how: How, warm: Warm, tallies: list[Tally]) -> None:
    """Before it, halfway, and behind it, on each rank; with FSDP, which takes longer, at one of these."""
    tally = warm.call(at_every_label, how, 1, how.parallel != "fsdp")
    called = {label.split(" ", 1)[0] for label in tally.labels}
    # Of several ranks only what the checkpoints' folder sees: all else rank 0 does as a process alone does.
    assert called >= {name for _, name in CALLS if how.ranks == 1 or name != "write_text"}, "each kind of call is made"
    tallies.append(tally)


@pytest.mark.parametrize("how", ONE, ids=str)
def test_at_random_instants_and_calls(how: How, warm: Warm, tallies: list[Tally]) -> None:
    tallies.append(warm.call(at_random, how, 2, 40))


@pytest.mark.parametrize("how", OTHER_TWO, ids=str)
def test_at_random_instants_and_calls_on_one_of_two_ranks(how: How, warm: Warm, tallies: list[Tally]) -> None:
    tallies.append(warm.call(at_random, how, 3, 10))


def test_so_often(tallies: list[Tally]) -> None:
    """At least 100 kills; this is the last test, and counts those of all others that ran."""
    if len(tallies) < 8:
        pytest.skip("counts the kills of the other tests of this file, and not all of them ran")
    kills, checks = sum(tally.kills for tally in tallies), sum(tally.checks for tally in tallies)
    print(f"{kills} kills, {checks} runs that went on and ended as the one that was never killed")
    assert kills >= 100 and checks >= 20
