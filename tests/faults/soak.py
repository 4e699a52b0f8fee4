"""Kills runs at random, thousands of times: `make soak`, or `python -m tests.faults.soak --kills 2000 --seed 1`.

Each line is a seed: where one fails, `--seed` with it and `--only` do that one again.
"""

from __future__ import annotations

import argparse
import time

from tests.faults.runs import HOWS, Tally, at_random
from tests.faults.warm import Warm


def main() -> None:
    """Read the command line, and kill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000 * 1000)
    parser.add_argument("--only", action="store_true", help="this seed, and no other")
    given = parser.parse_args()
    warm, tally, seed, failed = Warm(), Tally(), given.seed, list[int]()
    while tally.kills < given.kills:
        how = HOWS[seed % len(HOWS)]
        try:
            done = warm.call(at_random, how, seed, 20)
            tally += done
            print(f"seed {seed}, {how}: {done.kills} kills, {done.checks} checks; {tally.kills} in all", flush=True)
        except AssertionError as error:
            failed.append(seed)
            print(f"seed {seed}, {how}: FAILED\n{error}", flush=True)
        if given.only:
            break
        seed += 1
    warm.close()
    print(f"{tally.kills} kills and {tally.checks} checks from seed {given.seed} on; failed: {failed or 'none'}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
