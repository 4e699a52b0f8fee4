"""What the tests of ranks try on the CPU, tried on GPUs over NCCL: `python -m tests.gpu.ranks [ways]`, by hand, on a machine with several."""

from __future__ import annotations

import os
import sys
import tempfile
import time

import torch

from tests.distributed.features import FEATURES, WAYS, refusal, run_features, tries, within
from tests.distributed.task import assert_same
from tests.distributed.test_long_sequences import WAYS as LONG
from tests.distributed.test_long_sequences import runs
from tests.ranks import run_on_ranks


def main(names: list[str]) -> None:
    """Print for each way of dividing a run what agrees with one process."""
    count = torch.accelerator.device_count()
    print(f"{count} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    os.chdir(tempfile.mkdtemp())
    one = {name: found[name] for found in run_on_ranks(1, run_features, list(FEATURES), "auto") for name in FEATURES}
    for way, (ranks, parallel) in WAYS.items():
        if ranks > count or (names and way not in names):
            continue
        os.chdir(tempfile.mkdtemp())
        features, began = [feature for feature in FEATURES if tries(way, feature)], time.time()
        try:
            results = run_on_ranks(ranks, run_features, features, parallel, timeout=240)
        except AssertionError as error:
            print(f"{way}: {error}")
            continue
        failed = {}
        for feature in features:
            said = refusal(way, feature)
            for result in results:
                found = result[feature]
                try:
                    if said is not None:
                        assert isinstance(found, str) and said in found, found
                    else:
                        assert not isinstance(found, str), found
                        assert_same(one[feature], found, **within(feature))
                except AssertionError as error:
                    failed[feature] = (str(error) or "other lines").splitlines()[0]
        print(
            f"{way}: {len(features) - len(failed)} of {len(features)} features as on one, {time.time() - began:.0f} s"
        )
        for feature, reason in failed.items():
            print(f"    {feature}: {reason[:300]}")
    for way, (ranks, parallel) in LONG.items():
        if ranks > count or (names and way not in names):
            continue
        os.chdir(tempfile.mkdtemp())
        alone = runs("auto", "one")
        try:
            for many in run_on_ranks(ranks, runs, parallel, "many", timeout=240):
                for expected, found in zip(alone, many, strict=True):
                    assert_same(expected, found, logged=1e-10, weights=1e-8)
            print(f"{way}: as on one")
        except AssertionError as error:
            print(f"{way}: {str(error)[-600:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
