"""A run that is stopped and resumed equals one that was never stopped: weights, optimizer, logged lines."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import sheer
from sheer.checkpoint.optimizer import optimizer_state
from tests.task import assert_same, dataset, loader, model, step, trainer


class StopAt:
    """Asks the process to stop, as a cluster does, during the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_gradients(self, step: int, model: nn.Module) -> None:
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)


def run(
    folder: str,
    stop_at: int | None = None,
    make_loader: Callable[[], Any] = loader,
    make_scheduler: Any = None,
    step: Any = step,
    make_callbacks: Callable[[], list[Any]] = list,
    fit: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit in `folder`, all objects new, as in a process of its own; return all that a run leaves."""
    sheer.seed_everything(0)
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    settings = {"log_every_n_steps": 4, "max_epochs": 3, "checkpoint": sheer.Checkpoint(), **settings}
    made = trainer(
        run_dir=folder,
        resume="auto",
        callbacks=[*make_callbacks(), *([StopAt(stop_at)] if stop_at else [])],
        **settings,
    )
    train = make_loader()
    valid = loader(32, shuffle=False)
    if stop_at is not None:
        with pytest.raises(SystemExit) as left:
            made.fit(net, step, train, valid, optimizer=optimizer, scheduler=scheduler, **(fit or {}))
        assert left.value.code == 85
        return {}
    made.fit(net, step, train, valid, optimizer=optimizer, scheduler=scheduler, **(fit or {}))
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return {
        "weights": net.state_dict(),
        "optimizer": optimizer_state(optimizer, net),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "lines": lines,
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[union-attr]
    }


def assert_equal(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}/{index}")
    else:
        assert a == b, path


def assert_resumes_exactly(*stops: int, **how: Any) -> None:
    """Stop at each of `stops` in turn, resume, and compare with the run that was not stopped."""
    shutil.rmtree("whole", ignore_errors=True)
    shutil.rmtree("stopped", ignore_errors=True)
    whole = run("whole", **how)
    for stop in stops:
        run("stopped", stop_at=stop, **how)
    assert_equal(run("stopped", **how), whole)


@pytest.mark.parametrize("stop", [1, 5, 7, 8, 14, 20])
def test_at_any_step_in_the_middle_and_at_the_end_of_an_epoch(stop: int) -> None:
    assert_resumes_exactly(stop)


def test_several_times() -> None:
    assert_resumes_exactly(3, 4, 11, 14)


def test_with_micro_batches_accumulation_clipping_and_autocast() -> None:
    assert_resumes_exactly(
        2, 5, accumulate_grad_batches=2, micro_batch_size=6, gradient_clip_val=0.5, precision="bf16-mixed"
    )


@pytest.mark.parametrize(
    ("make_scheduler", "settings"),
    [
        (lambda optimizer: OneCycleLR(optimizer, max_lr=0.05, total_steps=21), {}),
        (lambda optimizer: StepLR(optimizer, 1, gamma=0.5), {"scheduler_interval": "epoch"}),
        (lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0), {"monitor": "val/loss"}),
    ],
)
def test_with_schedulers(make_scheduler: Any, settings: dict[str, Any]) -> None:
    assert_resumes_exactly(9, 14, make_scheduler=make_scheduler, **settings)


def test_with_a_scaler_whose_factor_moved() -> None:
    def sometimes(net: nn.Module, batch: Any, step: int) -> Tensor:
        x, y = batch
        return ((net(x) - y) ** 2).mean() * (1e34 if step in (3, 9) else 1.0)

    assert_resumes_exactly(5, step=sometimes, precision="16-mixed")


class Augmented(Dataset[Any]):
    """Draws from all three generators for every sample."""

    def __init__(self) -> None:
        self.x, self.y = dataset().tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        noise = torch.randn(6) * 0.1 + random.random() * 0.1 + np.random.rand() * 0.1
        return self.x[index] + noise, self.y[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_with_augmentation(workers: int) -> None:
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    assert_resumes_exactly(
        5, 14, make_loader=lambda: DataLoader(Augmented(), batch_size=16, shuffle=True, **options), max_epochs=3
    )


@pytest.mark.filterwarnings("ignore:.*seed")
@pytest.mark.parametrize("sampler", [None, WeightedRandomSampler])
def test_with_augmentation_in_workers_and_another_seed_in_the_next_process(sampler: Any) -> None:
    how = {"shuffle": True} if sampler is None else {"sampler": sampler(torch.ones(100), 100)}
    seeds = iter([0, 0, 1])  # of the whole run, the one that is stopped, and the one that goes on

    def make() -> DataLoader[Any]:
        torch.manual_seed(next(seeds))
        return DataLoader(Augmented(), batch_size=16, num_workers=1, **how)

    whole = run("whole", make_loader=make)
    run("stopped", 5, make_loader=make)
    assert_equal(run("stopped", make_loader=make), whole)


def test_with_samplers_that_draw_their_own_indices() -> None:
    def weighted() -> DataLoader[Any]:
        weights = torch.arange(1.0, 101.0)
        return DataLoader(dataset(), batch_size=16, sampler=WeightedRandomSampler(weights, 100))

    def with_own_generator() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        sampler = RandomSampler(dataset(), replacement=True, generator=generator)
        return DataLoader(dataset(), batch_sampler=BatchSampler(sampler, 16, drop_last=False))

    for make in (weighted, with_own_generator):
        assert_resumes_exactly(5, 7, 16, make_loader=make)


@pytest.mark.parametrize("stop", [5, 7, 12])
@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_generator_that_the_sampler_shares_with_its_loader(stop: int, workers: int) -> None:
    def make() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        sampler = WeightedRandomSampler(torch.arange(1.0, 101.0), 100, generator=generator)
        return DataLoader(dataset(), batch_size=16, sampler=sampler, generator=generator, num_workers=workers)

    assert_resumes_exactly(stop, make_loader=make)


@pytest.mark.parametrize("stop", [5, 7, 14])
def test_with_workers_that_persist_and_a_sampler_of_its_own(stop: int) -> None:
    def make() -> DataLoader[Any]:
        sampler = WeightedRandomSampler(torch.arange(1.0, 101.0), 100)
        return DataLoader(dataset(), batch_size=16, sampler=sampler, num_workers=1, persistent_workers=True)

    assert_resumes_exactly(stop, make_loader=make)


class CountedReads(Dataset[Any]):
    """Counts how often a sample is read."""

    def __init__(self) -> None:
        self.data, self.reads = dataset(), 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.data[index]


@pytest.mark.parametrize("own_sampler", [False, True])
def test_no_sample_that_was_used_is_read_again(own_sampler: bool) -> None:
    reads = []

    def make() -> DataLoader[Any]:
        data = CountedReads()
        reads.append(data)
        sampler = {"sampler": WeightedRandomSampler(torch.ones(100), 100)} if own_sampler else {"shuffle": True}
        return DataLoader(data, batch_size=16, **sampler)  # type: ignore[arg-type]

    run("run", stop_at=5, make_loader=make, max_epochs=1)
    run("run", make_loader=make, max_epochs=1)
    assert [data.reads for data in reads] == [80, 20]


class Stream(IterableDataset[Any]):
    """Batches without a length, with a state."""

    def __init__(self, batches: int = 7) -> None:
        self.data, self.batches = dataset(), batches
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.at = (0, 0) if self.at == self.batches else (self.at, self.at)
        for self.at in range(start + 1, self.batches + 1):  # noqa: B020
            rows = slice(16 * (self.at - 1), min(16 * self.at, 100))
            x, y = self.data[rows]
            yield x + 0.1 * torch.randn_like(x), y

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("stop", [5, 7, 13])
def test_with_a_loader_that_has_a_state_and_no_length(stop: int) -> None:
    assert_resumes_exactly(stop, make_loader=Stream)


@pytest.mark.parametrize("workers", [0, 1])
def test_with_torchdatas_stateful_loader(workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make() -> Any:
        return StatefulDataLoader(dataset(), batch_size=16, shuffle=True, num_workers=workers)

    whole, resumed = run("whole", make_loader=make), run("stopped", stop_at=5, make_loader=make)
    resumed = run("stopped", make_loader=make)
    assert_equal(resumed["weights"], whole["weights"])
    assert_equal(resumed["lines"], whole["lines"])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("stop", "limit"), [(7, None), (14, None), (3, 3), (4, 3), (6, 3)])
def test_with_torchdatas_stateful_loader_at_the_end_of_an_epoch(stop: int, limit: int | None, shuffle: bool) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make() -> Any:
        return StatefulDataLoader(dataset(), batch_size=16, shuffle=shuffle)

    whole = run("whole", make_loader=make, limit_train_batches=limit)
    run("stopped", stop_at=stop, make_loader=make, limit_train_batches=limit)
    resumed = run("stopped", make_loader=make, limit_train_batches=limit)
    assert_equal(resumed["lines"], whole["lines"])
    assert_equal(resumed["weights"], whole["weights"])


class CountsItsEpochs:
    """A loader with a length and a state, which says behind its last batch that an epoch is over."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Any]:
        x, y = dataset().tensors
        yield from zip((x + self.epoch).split(16), y.split(16), strict=True)
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


def test_a_loader_with_a_state_is_brought_to_its_end_as_a_for_loop_does() -> None:
    made = []

    def make() -> Any:
        made.append(CountsItsEpochs())
        return made[-1]

    assert_resumes_exactly(7, 14, make_loader=make)
    assert made[0].epoch == 3 and made[-1].epoch == 3


def test_with_a_list_of_batches() -> None:
    x, y = dataset().tensors
    assert_resumes_exactly(5, 9, make_loader=lambda: list(zip(x.split(16), y.split(16), strict=True)))


def test_with_several_loaders_at_once() -> None:
    def both(net: nn.Module, batches: Any) -> Tensor:
        if not isinstance(batches, dict):  # the validation has one loader
            return step(net, batches)["loss"]
        return step(net, batches["a"])["loss"] + step(net, batches["b"])["loss"]

    assert_resumes_exactly(5, 7, 12, make_loader=lambda: {"a": loader(16), "b": loader(30)}, step=both)


def test_loaders_in_a_dict_have_orders_of_their_own() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(net: nn.Module, batches: Any) -> Tensor:
        seen.append((batches["a"][0], batches["b"][0]))
        return step(net, batches["a"])["loss"]

    net = model()
    trainer(max_epochs=1).fit(net, look, {"a": loader(), "b": loader()}, optimizer=AdamW(net.parameters()))
    assert not any(torch.equal(a, b) for a, b in seen)


@pytest.mark.parametrize("stop", [5, 7, 12])
def test_with_several_loaders_of_which_a_shorter_one_draws_its_own_indices(stop: int) -> None:
    def first(net: nn.Module, batches: Any) -> Tensor:
        if not isinstance(batches, dict):
            return step(net, batches)["loss"]
        return step(net, batches["a"])["loss"] + step(net, batches["b"])["loss"]

    def make() -> Any:
        sampler = WeightedRandomSampler(torch.arange(1.0, 101.0), 100)
        return {"a": loader(16), "b": DataLoader(dataset(), batch_size=30, sampler=sampler)}

    assert_resumes_exactly(stop, make_loader=make, step=first)


def test_a_shorter_loader_goes_on_with_the_indices_it_has_drawn_when_the_longest_starts_anew() -> None:
    seen: list[int] = []

    def keep(net: nn.Module, batches: Any) -> Tensor:
        seen.extend(batches["b"].tolist())
        return net(batches["a"][0]).mean()

    sampler = SubsetRandomSampler(range(4))
    short = DataLoader(torch.arange(4), batch_size=1, sampler=sampler)  # type: ignore[arg-type]
    net = model()
    trainer(max_epochs=2).fit(net, keep, {"a": loader(17), "b": short}, optimizer=AdamW(net.parameters()))
    assert [sorted(seen[at : at + 4]) for at in (0, 4, 8)] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("stop", [3, 4, 5, 9])
def test_without_a_length_with_accumulation_and_validation_by_steps(stop: int) -> None:
    settings = {"accumulate_grad_batches": 2, "micro_batch_size": 6, "validate_every_n_steps": 3}
    assert_resumes_exactly(stop, make_loader=Stream, **settings)
    assert_resumes_exactly(stop, make_loader=generated, fit={"resume_by_skipping": True}, **settings)


@pytest.mark.parametrize("stop", [5, 7, 10])
def test_with_averages_a_plateau_and_early_stopping(stop: int) -> None:
    assert_resumes_exactly(
        stop,
        make_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
        make_callbacks=lambda: [sheer.EMA(0.9, start_step=6), sheer.EarlyStopping(patience=4)],
        monitor="val/loss",
        validate_every_n_steps=3,
    )


def generated() -> Any:
    class Batches:
        def __iter__(self) -> Iterator[Any]:
            x, y = dataset().tensors
            yield from zip(x.split(16), y.split(16), strict=True)

    return Batches()


def test_an_iterable_without_state_is_refused_in_the_middle_of_an_epoch_unless_skipping_is_allowed() -> None:
    run("run", stop_at=5, make_loader=generated)
    with pytest.raises(sheer.DataError, match="resume_by_skipping=True"):
        run("run", make_loader=generated)
    assert_resumes_exactly(5, 7, make_loader=generated, fit={"resume_by_skipping": True})


class Shuffled(IterableDataset[Any]):
    """Draws its order at the start of each pass: from its own generator, or from that of the process it is in."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.data, self.generator = dataset(), generator

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in torch.randperm(100, generator=self.generator).tolist():
            if index % workers == first:
                yield self.data[index]


@pytest.mark.parametrize("stop", [5, 7, 12])
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_that_draws_its_order_is_skipped_into_in_that_order(
    workers: int, own_generator: bool, stop: int
) -> None:
    def make() -> DataLoader[Any]:
        if workers:
            generator = torch.Generator().manual_seed(3) if own_generator else None
            return DataLoader(Shuffled(None), batch_size=16, num_workers=2, generator=generator)
        return DataLoader(Shuffled(torch.Generator().manual_seed(3) if own_generator else None), batch_size=16)

    assert_resumes_exactly(stop, make_loader=make, fit={"resume_by_skipping": True})


def test_an_iterable_dataset_is_told_the_epoch() -> None:
    class Told(Shuffled):
        def set_epoch(self, epoch: int) -> None:
            self.generator = torch.Generator().manual_seed(epoch)

    def make(workers: int = 2) -> DataLoader[Any]:
        return DataLoader(Told(None), batch_size=16, num_workers=workers)

    assert_resumes_exactly(3, 9, make_loader=make, fit={"resume_by_skipping": True})
    seen: list[Tensor] = []

    def look(net: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0])
        return step(net, batch)["loss"]

    net = model()
    trainer(max_epochs=2).fit(net, look, make(0), optimizer=AdamW(net.parameters()))
    by_hand = [dataset()[torch.randperm(100, generator=torch.Generator().manual_seed(epoch))][0] for epoch in (0, 1)]
    assert torch.equal(torch.cat(seen), torch.cat(by_hand))


@pytest.mark.parametrize("own_sampler", [False, True])
def test_a_generator_that_the_dataset_holds_is_saved(own_sampler: bool) -> None:
    class Noisy(Augmented):
        def __init__(self) -> None:
            super().__init__()
            self.noise = torch.Generator().manual_seed(3)

        def __getitem__(self, index: int) -> Any:
            return self.x[index] + torch.randn(6, generator=self.noise), self.y[index]

    def make() -> DataLoader[Any]:
        sampler = {"sampler": WeightedRandomSampler(torch.ones(100), 100)} if own_sampler else {"shuffle": True}
        return DataLoader(Noisy(), batch_size=16, **sampler)  # type: ignore[arg-type]

    assert_resumes_exactly(5, 7, make_loader=make)


def test_a_finished_run_returns_its_result_and_a_longer_one_goes_on() -> None:
    whole = run("whole")
    before = Path("whole/metrics.jsonl").read_text()
    again = run("whole")
    assert Path("whole/metrics.jsonl").read_text() == before
    assert_equal(again["weights"], whole["weights"])
    longer = run("whole", max_epochs=4)
    assert longer["lines"][-1]["step"] == 28


def test_lines_behind_the_last_checkpoint_are_cut_off() -> None:
    whole = run("whole")
    run("stopped", stop_at=5)
    with Path("stopped/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "train/loss": 1.0}\n')
    assert_equal(run("stopped")["lines"], whole["lines"])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken() -> None:
    checkpoint = sheer.Checkpoint(every_n_steps=3, keep_last=2)
    whole = run("whole", checkpoint=checkpoint)
    run("stopped", stop_at=8, checkpoint=checkpoint)
    newest = Path("stopped/checkpoints/last").resolve()
    assert newest.name == "step-00000008"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with pytest.warns(sheer.SheerWarning, match=r"model\.safetensors is damaged"):
        resumed = run("stopped", checkpoint=checkpoint)
    assert_equal(resumed, whole)


def test_a_damaged_checkpoint_counts_for_nothing_when_the_run_goes_on_from_an_older_one() -> None:
    """It is of a later step than those that are saved next, which must not be deleted in its favour."""
    run("run", stop_at=12, checkpoint=sheer.Checkpoint(every_n_steps=6, keep_last=2))
    newest = Path("run/checkpoints/step-00000012")
    (newest / "model.safetensors").write_bytes(b"damaged")
    with pytest.warns(sheer.SheerWarning, match=r"model\.safetensors"):
        run("run", stop_at=9, checkpoint=sheer.Checkpoint(keep_last=1))
    assert Path("run/checkpoints/last").readlink().name == "step-00000009"
    assert not newest.exists()
    assert run("run")["lines"][-1]["step"] == 21


def test_settings_that_change_the_steps_are_refused_with_the_list_of_them() -> None:
    run("run", stop_at=5)
    with pytest.raises(sheer.RunError, match=r"gradient_clip_val: None then, 1.0 now") as error:
        run("run", gradient_clip_val=1.0, precision="bf16-mixed")
    assert "precision: '32-true' then, 'bf16-mixed' now" in str(error.value)
    run("run", log_every_n_steps=3, max_epochs=4, checkpoint=sheer.Checkpoint(keep_last=2))


def test_other_data_is_refused() -> None:
    run("run", stop_at=5)
    with pytest.raises(sheer.DataError, match="100 samples in the training data, and now there are 90"):
        run("run", make_loader=lambda: loader(samples=90))
    with pytest.raises(sheer.DataError, match="16 samples in a batch of the loader, and now there are 8"):
        run("run", make_loader=lambda: loader(8))


def test_an_existing_run_is_not_overwritten() -> None:
    run("run", max_epochs=1)
    with pytest.raises(sheer.RunError, match='resume="auto"'):
        trainer(run_dir="run").fit(model(), step, loader(), optimizer=lambda net: AdamW(net.parameters()))


def test_from_a_checkpoint_of_another_run() -> None:
    whole = run("whole")
    run("stopped", stop_at=9)
    sheer.seed_everything(0)
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    trainer(run_dir="new", resume="stopped/checkpoints/last", log_every_n_steps=4, checkpoint=True).fit(
        net, step, loader(), loader(32, shuffle=False), optimizer=optimizer
    )
    assert_same(net.state_dict(), whole["weights"])
    assert json.loads(Path("new/metrics.jsonl").read_text().splitlines()[0])["step"] == 12


def test_the_weights_alone_serve_without_sheer() -> None:
    from safetensors.torch import load_file

    whole = run("whole")
    net = model()
    net.load_state_dict(load_file("whole/checkpoints/last/model.safetensors"))
    assert_same(net.state_dict(), whole["weights"])


def test_the_time_of_earlier_sessions_counts() -> None:
    class Slow:
        def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
            if step == 20:
                time.sleep(0.3)

    def seconds() -> float:
        return json.loads(Path("run/checkpoints/last/state.json").read_text())["progress"]["seconds"]

    run("run", stop_at=20, make_callbacks=lambda: [Slow()])
    before = seconds()
    run("run")
    assert seconds() > before >= 0.3


def test_from_a_checkpoint_of_another_run_the_loggers_start_anew() -> None:
    class Kept:
        def __init__(self) -> None:
            self.loaded: list[dict[str, Any]] = []

        def start(self, info: Any) -> None: ...

        def log(self, step: int, metrics: Any) -> None: ...

        def close(self) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"id": "the first run's"}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded.append(state)

    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    for settings, loaded in (
        ({"run_dir": "run"}, []),
        ({"run_dir": "run", "resume": "auto", "max_epochs": 4}, [{"id": "the first run's"}]),
        ({"run_dir": "new", "resume": "run", "max_epochs": 5}, []),
    ):
        logger = Kept()
        made = trainer(loggers=[logger], checkpoint=True, **settings)  # type: ignore[arg-type]
        made.fit(net, step, loader(), optimizer=optimizer)
        assert logger.loaded == loaded
