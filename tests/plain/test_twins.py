"""Each plain twin against its original: the same numbers, and files that the other reads."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sheer.checkpoint.codec import decode, encode
from sheer.checkpoint.disk import Disk
from sheer.checkpoint.read import stored_in
from sheer.checkpoint.store import Content, Retention, committed, prune, read_manifest, verify, write_checkpoint
from sheer.data.batch import count_samples, move
from sheer.data.choose import make_source
from sheer.data.feed import TrainingData
from sheer.evaluation import eval_mode
from sheer.events import Events
from sheer.metrics import Mean, Metrics
from sheer.plain.checkpoint import (
    plain_committed,
    plain_decode,
    plain_encode,
    plain_newest_good,
    plain_prune,
    plain_write,
)
from sheer.plain.data import (
    PlainData,
    PlainDataOfWorkers,
    moved_dict,
    moved_list,
    moved_tensor,
    moved_tuple,
    plain_epochs,
    plain_epochs_of_workers,
    plain_grouped,
    size_of_dict,
    size_of_list,
    size_of_tensor,
    size_of_tuple,
)
from sheer.plain.logs import plain_eval_mode
from sheer.plain.metrics import PlainMetrics, plain_check
from sheer.progress import Progress
from sheer.random import random_state

CPU = torch.device("cpu")
numbers = st.floats(-1e6, 1e6, width=32)
scalars = st.one_of(numbers, numbers.map(torch.tensor))
means = st.builds(Mean, numbers.map(torch.tensor), st.integers(0, 9))


@given(st.lists(st.tuples(scalars, means, st.integers(1, 64)), min_size=1, max_size=9), st.integers(0, 9))
def test_metrics(rows: list[tuple[Any, Mean, int]], saved_after: int) -> None:
    original, twin = Metrics(), PlainMetrics()
    for index, (value, mean, samples) in enumerate(rows):
        for metrics in (original, twin):
            metrics.add({"loss": value, "mean": mean}, samples, "a/")
            metrics.add(torch.tensor(float(index)), samples)
        if index == saved_after:  # each goes on with what the other saved
            states = original.state_dict(), twin.state_dict()
            original, twin = Metrics(), PlainMetrics()
            original.load_state_dict(states[1])
            twin.load_state_dict(states[0])
    assert bool(original) is bool(twin) is True
    read, read_too = original.read(), twin.read()
    assert list(read) == list(read_too) or set(read) == set(read_too)
    for name, value in read.items():
        assert read_too[name] == value or (math.isnan(value) and math.isnan(read_too[name]))
    assert bool(original) is bool(twin) is False


def test_a_value_that_is_not_finite_is_named() -> None:
    watched = [(1, "loss", torch.tensor(1.0)), (2, "loss", torch.tensor(math.inf)), (3, "loss", torch.tensor(math.nan))]
    with pytest.raises(FloatingPointError, match="at step 2"):
        plain_check(watched)
    plain_check(fine := watched[:1])
    assert fine == []


def loader(size: int, **options: Any) -> DataLoader[Any]:
    x = torch.arange(size)
    return DataLoader(TensorDataset(x, x * 2), batch_size=4, **options)


@pytest.mark.parametrize(
    ("accumulate", "options"),
    [
        (1, {"shuffle": True}),
        (1, {"shuffle": True, "drop_last": True}),
        (3, {"shuffle": True}),
        (1, {"shuffle": False}),
        (1, {"shuffle": True, "num_workers": 1, "drop_last": True}),
        (2, {"shuffle": False, "num_workers": 1, "persistent_workers": True}),
    ],
)
def test_the_batches_and_the_random_states_between_them(accumulate: int, options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    progress = Progress()
    source = make_source(loader(22, **options), seed=torch.initial_seed(), device=CPU)
    original = TrainingData(source, device=CPU, accumulate=accumulate)
    seen = []
    for batch, _ in zip(original.steps(progress), range(12), strict=False):
        seen.append(([part for part, _ in batch], original.at_end, torch.rand(1)))
        progress.batch += len(batch)
        if original.at_end:
            progress.epoch, progress.batch = progress.epoch + 1, 0
    twins: tuple[Any, Any] = (PlainData, plain_epochs)
    if "num_workers" in options:
        twins = PlainDataOfWorkers, plain_epochs_of_workers
    for twin in ("fresh", "going on"):
        torch.manual_seed(5)
        data = twins[0](own := loader(22, **options), CPU, accumulate)
        batches = twins[1](own, CPU) if twin == "fresh" else data.epochs(0, 0, None)
        steps = plain_grouped(batches, accumulate) if accumulate > 1 else (([(b, 4)], e) for b, e in batches)
        for (parts, at_end, drawn), (group, ends) in zip(seen, steps, strict=False):
            assert ends is at_end
            assert torch.equal(torch.rand(1), drawn)
            for part, (same, _) in zip(parts, group, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(part, same, strict=True))
    assert data.state_dict() == original.state_dict()
    assert data.steps_per_epoch == original.steps_per_epoch


class Drawn(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(1) + index


def test_what_workers_draw_goes_on_under_the_seed_of_the_run() -> None:
    def drawn(seed: int, state: dict[str, Any] | None, kind: str) -> tuple[list[list[float]], dict[str, Any]]:
        torch.manual_seed(seed)
        own: DataLoader[Any] = DataLoader(Drawn(), 4, shuffle=True, num_workers=1)
        data: Any = PlainDataOfWorkers(own, CPU, 1)
        if kind == "library":
            data = TrainingData(make_source(own, seed=seed, device=CPU), device=CPU)
        if state is not None:
            data.load_state_dict(state)
        progress = Progress(epoch=1, batch=1)
        found = data.steps(progress) if kind == "library" else ([pair] for pair in data.epochs(1, 1, None))
        return [step[0][0].tolist() for _, step in zip(range(2), found, strict=False)], data.state_dict()

    first, state = drawn(5, None, "library")
    for kind in ("library", "script"):
        assert drawn(6, None, kind)[0] != first
        assert drawn(6, state, kind)[0] == first


def test_batches_move_and_count_as_they_do() -> None:
    pair = [torch.rand(3, 2), torch.rand(3)]
    for batch, moved, size in (
        (pair, moved_list, size_of_list),
        ({"a": pair[0], "b": pair[1]}, moved_dict, size_of_dict),
        (tuple(pair), moved_tuple, size_of_tuple),
        (pair[0], moved_tensor, size_of_tensor),
    ):
        one, other = move(batch, CPU), moved(batch, CPU)  # type: ignore[operator]
        assert type(one) is type(other) and str(one) == str(other)
        assert size(batch) == count_samples(batch) == 3  # type: ignore[operator]


def test_eval_mode_leaves_each_part_as_it_was() -> None:
    for mode in (eval_mode, plain_eval_mode):
        net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
        net[1].eval()
        before = [module.training for module in net.modules()]
        with mode(net, Events()):
            assert not any(module.training for module in net.modules())
        assert [module.training for module in net.modules()] == before


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.text(max_size=3), numbers.map(torch.tensor)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(0, 9), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(values)
def test_state_is_written_alike_and_read_by_the_other(value: Any) -> None:
    one: dict[str, torch.Tensor] = {}
    other: dict[str, torch.Tensor] = {}
    assert repr(decode(plain_encode(value, one), one)) == repr(value)
    assert repr(plain_decode(encode(value, other), other)) == repr(value)


def test_the_random_state_passes_through_either() -> None:
    state, tensors = random_state(), {}
    again = decode(plain_encode(state, tensors), tensors)
    assert again["python"] == state["python"]
    assert torch.equal(again["torch"], state["torch"])
    assert again["numpy"][1].tolist() == state["numpy"][1].tolist()


def save(folder: Path, step: int, loss: float) -> Path:
    content = Content(
        step, 0, 1, True, {"model": {"w": torch.tensor([float(step)])}}, {}, True, {"state": [step]}, facts_of(loss)
    )
    disk = Disk(folder)
    saved = write_checkpoint(disk, disk.unused(step), content, 0.0, Event())
    assert saved is not None
    prune(disk, committed(disk), Retention(last=2, best=1, every=5, monitor="l"))
    return saved.path


def plain_saved(folder: Path, step: int, loss: float) -> Path:
    path = plain_write(folder, step, {"model": {"w": torch.tensor([float(step)])}}, [step], "r", {"l": loss})
    plain_prune(folder, step, keep_last=2, keep_best=1, every=5, monitor="l", mode="min")
    return path


def facts_of(loss: float) -> dict[str, Any]:
    return {"run_id": "r", "metrics": {"l": loss}, "settings": {}}


def test_checkpoints_are_read_and_pruned_by_the_other(tmp_path: Path) -> None:
    folders = tmp_path / "original", tmp_path / "twin"
    losses = (0.5, 0.1, 0.7, 0.6, 0.4, 0.4, 0.4, 0.4)
    for number, loss in enumerate(losses, start=1):
        for folder, write in zip(folders, (save, plain_saved), strict=True):
            verify(write(folder, number, loss))
    verify(save(folders[0], 8, 0.3))
    verify(plain_saved(folders[1], 8, 0.3))
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    stay = ["step-00000002", "step-00000005", "step-00000007", "step-00000008-2"]
    assert names[0] == names[1] == ["best", "last", *stay]
    for folder in folders:
        assert (folder / "best").resolve().name == "step-00000002"
        assert (folder / "last").resolve().name == "step-00000008-2"
        assert [(s.step, s.metrics) for s in committed(Disk(folder))] == [
            (manifest["step"], manifest["metrics"]) for manifest in plain_committed(folder).values()
        ]
        assert stored_in(folder / "last", read_manifest(folder / "last"), "model")["w"].tolist() == [8.0]
        newest = plain_newest_good(folder)
        assert newest is not None and newest.name == "step-00000008-2"
        (newest / "model.safetensors").write_bytes(b"damaged")
        older = plain_newest_good(folder)
        assert older is not None and older.name == "step-00000007"


def test_where_nothing_was_saved_the_log_begins_anew(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 4}\n')  # a run was killed before its first save
    assert plain_newest_good(tmp_path / "checkpoints") is None
    assert log.read_text() == ""
