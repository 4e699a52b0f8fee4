"""Each plain twin for several ranks against its original, on three of them: the same parts, the same numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sheer.data.choose import make_source
from sheer.data.feed import TrainingData
from sheer.distributed.gradients import mean_over_ranks
from sheer.distributed.mesh import Ranks, form_ranks
from sheer.distributed.wrap import same_on_all_ranks
from sheer.errors import NonFiniteError
from sheer.evaluation import batches_of
from sheer.metrics import Mean, Metrics
from sheer.nonfinite import Watch
from sheer.progress import Progress
from sheer.settings import Parallel
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


def test_the_twins_do_on_three_ranks_what_their_originals_do() -> None:
    assert run_on_ranks(3, compare_all) == [True] * 3


def compare_all() -> bool:
    from sheer.plain.ranks import PlainRanks

    ranks = form_ranks(Parallel(dp_replicate=-1, dp_shard=1), CPU)
    assert ranks is not None
    plain = PlainRanks(ranks.rank, ranks.world_size, ranks.data_rank, ranks.data_ranks, ranks.mesh)
    for samples, size, drop_last in ((20, 6, False), (20, 6, True), (7, 3, False), (7, 100, False)):
        compare_training(ranks, plain, samples, size, drop_last)
        compare_evaluation(ranks, plain, samples, size)
    compare_metrics(ranks)
    compare_watches(ranks)
    compare_models(ranks, plain)
    return True


def loader_of(samples: int, size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(samples)), batch_size=size, **options)


def compare_training(ranks: Ranks, plain: Any, samples: int, size: int, drop_last: bool) -> None:
    from sheer.plain.ranks import plain_grouped_shares, plain_shared_epochs

    for accumulate in (1, 2):
        torch.manual_seed(5)
        source = make_source(
            loader_of(samples, size, shuffle=True, drop_last=drop_last), seed=5, device=CPU, ranks=ranks
        )
        data, progress, wanted = TrainingData(source, device=CPU, accumulate=accumulate, ranks=ranks), Progress(), []
        for step in itertools.islice(data.steps(progress), 9):
            wanted.append(([(part[0].tolist(), own) for part, own in step], step.total, data.at_end))
            progress.batch = 0 if data.at_end else progress.batch + len(step)
            progress.epoch += data.at_end
        drawn = torch.get_rng_state()
        torch.manual_seed(5)
        epochs = plain_shared_epochs(loader_of(samples, size, shuffle=True, drop_last=drop_last), CPU, plain)
        found = []
        for parts, totals, at_end in itertools.islice(plain_grouped_shares(epochs, accumulate), 9):
            found.append(([(part[0].tolist(), own) for part, own in parts], sum(totals), at_end))
        assert found == wanted
        assert torch.equal(torch.get_rng_state(), drawn)


def compare_evaluation(ranks: Ranks, plain: Any, samples: int, size: int) -> None:
    from sheer.plain.ranks import plain_dealt

    for limit, together in itertools.product((None, 1, 2), (False, True)):
        stepper = nn.Identity() if together else None
        wanted = [(part[0].tolist(), own) for part, own in batches_of(loader_of(samples, size), limit, ranks, stepper)]
        found = [(part[0].tolist(), own) for part, own in plain_dealt(loader_of(samples, size), limit, plain, together)]
        assert found == wanted


def compare_metrics(ranks: Ranks) -> None:
    from sheer.plain.metrics import PlainMetrics, plain_read_on_ranks

    original, twin = Metrics(), PlainMetrics()
    for metrics in (original, twin):
        metrics.add({"loss": torch.tensor(0.1 * (ranks.rank + 1)), "few": 1 / 3}, 3 - ranks.rank)
        metrics.add({"mean": Mean(torch.tensor(0.7 * ranks.rank), torch.tensor(ranks.rank))}, 1)
        if ranks.rank == 1:
            metrics.add({"own": torch.tensor(2.0)}, 2)
    assert plain_read_on_ranks(twin, True) == original.read(ranks)
    assert not twin


def compare_watches(ranks: Ranks) -> None:
    from sheer.plain.ranks import plain_check_on_ranks

    original, watched = Watch(), []
    plain_check_on_ranks([(1, "loss", torch.tensor(1.0))])
    for step, value in ((1, 1.0), (2, float("nan") if ranks.rank == 2 else 1.0), (3, float("inf"))):
        original.add(step, "loss", torch.tensor(value))
        watched.append((step, "loss", torch.tensor(value)))
    with pytest.raises(NonFiniteError, match="The loss became NaN or infinite at step 2"):
        original.check(ranks)
    with pytest.raises(FloatingPointError, match="The loss became NaN or infinite at step 2"):
        plain_check_on_ranks(watched)


def compare_models(ranks: Ranks, plain: Any) -> None:
    from sheer.plain.ranks import plain_mean_over_all, plain_mean_over_ranks, plain_same_on_all_ranks

    torch.manual_seed(ranks.rank)
    one, other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    for model in (one, other):
        nn.init.constant_(model.weight, float(ranks.rank))
    same_on_all_ranks(one)
    plain_same_on_all_ranks(other)
    assert torch.equal(one.weight, other.weight) and float(other.weight[0]) == 0.0
    count = torch.tensor(0.1 + ranks.rank)
    wanted = mean_over_ranks(count, ranks)
    assert torch.equal(plain_mean_over_all(count, CPU, plain), wanted)
    assert torch.equal(plain_mean_over_ranks(count, CPU, plain, ("dp_replicate",)), wanted)
