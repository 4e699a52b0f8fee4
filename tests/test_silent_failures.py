"""Failures that other frameworks pass over without a word: here each is right, or loud.

Those of resuming are in test_resume.py, those of what a user gets wrong in tests/mistakes.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import sheer
from sheer.data.batch import move
from sheer.data.choose import make_source
from sheer.data.feed import TrainingData
from tests.task import assert_same, dataset, loader, loss_step, model, step, trainer


def smooth() -> nn.Module:
    """A model in double precision without random parts: what should be equal is, to rounding."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def positives_only(net: nn.Module, batch: Any) -> sheer.Mean:
    """The loss of padded sentences, in small: some samples of a batch count and some do not."""
    x, y = batch
    return sheer.mean((net(x) - y) ** 2, mask=y > 0.5)


def fitted(step: Any, batch_size: int, **settings: Any) -> nn.Module:
    net = smooth()
    torch.manual_seed(0)
    optimizer = SGD(net.parameters(), lr=0.1)
    trainer(precision="64-true", max_epochs=2, **settings).fit(net, step, loader(batch_size), optimizer=optimizer)
    return net


# Loss and data


@pytest.mark.parametrize("step", [loss_step, positives_only])
@pytest.mark.parametrize("parts", [{"accumulate_grad_batches": 4}, {"micro_batch_size": 4}])
def test_1_accumulation_changes_neither_loss_nor_gradient(step: Any, parts: dict[str, Any]) -> None:
    """Also in the last, shorter window, and where the micro-batches count for different weights.

    Bit for bit against hand-written loops: test_fit_equals_plain.py.
    """
    size = 4 if "accumulate_grad_batches" in parts else 16
    whole, in_parts = fitted(step, 16), fitted(step, size, **parts)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(in_parts.state_dict()[name], value, rtol=1e-12, atol=1e-13)


def test_1_the_logged_loss_is_that_of_the_whole_batch() -> None:
    for name, size, parts in (("whole", 16, 1), ("parts", 4, 4)):
        fitted(positives_only, size, accumulate_grad_batches=parts, run_dir=name, log_every_n_steps=1)
    whole, parts_ = (
        [json.loads(line)["train/loss"] for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert parts_ == pytest.approx(whole, rel=1e-12, nan_ok=True)  # the last step of an epoch has no positives


@pytest.mark.parametrize("step", [loss_step, positives_only])
def test_2_the_loss_of_an_evaluation_does_not_depend_on_its_batch_size(step: Any) -> None:
    net = smooth()
    made = trainer(precision="64-true")
    losses = [made.test(net, step, loader(size, shuffle=False))["test/loss"] for size in (1, 4, 7, 64, 100)]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-12)


def test_3_a_loss_that_is_nan_is_logged_as_nan() -> None:
    """By default it is an error (tests/mistakes); where it is to be ignored it is not prettified."""
    trainer(max_steps=2, nonfinite="ignore", run_dir="run", log_every_n_steps=1).fit(
        net := model(),
        lambda net, batch: loss_step(net, batch) * float("nan"),
        loader(),
        optimizer=SGD(net.parameters(), lr=0.1),
    )
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isnan(line["train/loss"]) for line in lines)


def test_4_nothing_is_guessed_from_names() -> None:
    """A batch reaches the step whole, and an evaluation returns what its step returns, whatever the keys are called."""
    x, y = dataset().tensors
    seen = []

    def step(net: nn.Module, batch: Any) -> dict[str, Any]:
        seen.append(sorted(batch))
        return {"loss": F.mse_loss(net(batch["weather"]), batch["harvest"])}

    batches = [{"weather": x, "harvest": y, "note": "unused by the model"}]
    net = model()
    result = trainer(max_steps=1).fit(net, step, batches, batches, optimizer=SGD(net.parameters(), lr=0.1))
    assert seen == [["harvest", "note", "weather"]] * len(seen)
    assert list(result.metrics) == ["val/loss"]


# 5, a StopIteration of the user's: tests/mistakes/test_wrong_step_functions.py and test_wrong_data.py


@pytest.mark.parametrize("micro", [None, 3, 5, 16, 1000])
def test_6_the_batch_of_a_step_is_the_loaders_whatever_the_micro_batch(micro: int | None) -> None:
    sizes: dict[int, int] = {}

    def counting(net: nn.Module, batch: Any, step: int) -> Tensor:
        sizes[step] = sizes.get(step, 0) + len(batch[0])
        return loss_step(net, batch)

    net = nn.Linear(6, 1)
    trainer(max_epochs=1, micro_batch_size=micro).fit(net, counting, loader(), optimizer=SGD(net.parameters(), lr=0.1))
    assert list(sizes.values()) == [16] * 6 + [4]


def test_7_a_scheduler_does_not_move_on_a_step_that_the_scaler_skipped() -> None:
    def overflowing(net: nn.Module, batch: Any, step: int) -> Tensor:
        return loss_step(net, batch) * (1e34 if step in (2, 4) else 1.0)

    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 1)
    taken: list[int] = []
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    result = trainer(max_steps=7, precision="16-mixed").fit(
        net, overflowing, loader(), optimizer=optimizer, scheduler=scheduler
    )
    assert result.step == 7 and scheduler.last_epoch == len(taken) <= 5


class Augmented(Dataset[Any]):
    """Returns a sample's index, and a random number for it."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(float(index)), torch.rand(())


def drawn(workers: int) -> list[dict[float, float]]:
    """Return the random number of each sample, by epoch."""
    torch.manual_seed(0)
    epochs: list[dict[float, float]] = [{}, {}, {}]
    net = nn.Linear(1, 1)

    def collecting(net: nn.Module, batch: Any, step: int) -> Tensor:
        epochs[(step - 1) // 4].update(zip(batch[0].tolist(), batch[1].tolist(), strict=True))
        return net(batch[0][:, None]).mean()

    data = DataLoader(Augmented(), batch_size=10, shuffle=True, num_workers=workers)
    trainer(max_epochs=3).fit(net, collecting, data, optimizer=SGD(net.parameters(), lr=0.0))
    return epochs


def test_8_augmentation_differs_by_epoch_and_sample_and_not_by_worker() -> None:
    one, two = drawn(workers=1), drawn(workers=2)
    assert one == two
    values = [value for epoch in one for value in epoch.values()]
    assert len(values) == 120 and len(set(values)) == 120


def test_9_a_step_is_counted_once_however_many_optimizers_and_batches_it_takes() -> None:
    net: Any = model(dropout=0.0)
    optimizers = {"a": SGD(net[0].parameters(), lr=0.1), "b": SGD([*net[1].parameters(), *net[4].parameters()], lr=0.1)}
    run = trainer(max_steps=6, accumulate_grad_batches=2, run_dir="run", log_every_n_steps=2).start(
        net, optimizers=optimizers
    )
    updates = 0
    for batch in run.steps(loader(8)):
        for optimizer in optimizers.values():
            run.update(optimizer, loss_step, batch)
            updates += 1
    assert run.finish().step == 6 and updates == 12
    assert [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [2, 4, 6]


def test_9_logs_validations_and_saves_count_the_same_steps() -> None:
    net = model()
    trainer(
        max_steps=6, accumulate_grad_batches=3, log_every_n_steps=2, validate_every_n_steps=2, run_dir="run",
        checkpoint=sheer.Checkpoint(every_n_steps=2, keep_last=9),
    ).fit(net, step, loader(4), loader(50, shuffle=False), optimizer=SGD(net.parameters(), lr=0.1))  # fmt: skip
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4, 6]
    assert sorted(path.name[-1] for path in Path("run/checkpoints").glob("step-*")) == ["2", "4", "6"]


# Models and optimizers


def test_the_step_gets_the_very_model_so_that_all_its_methods_work() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 1)

        def encode(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net, seen = Encoder(), []

    def step(given: Any, batch: Any) -> Tensor:
        seen.append(given is net)
        return F.mse_loss(given.encode(batch[0]), batch[1])

    before = net.inner.weight.clone()
    trainer(max_steps=2).fit(net, step, loader(), loader(50), optimizer=SGD(net.parameters(), lr=0.1))
    assert all(seen) and not torch.equal(net.inner.weight, before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_an_optimizer_built_before_the_model_was_converted_still_moves_it(precision: Any) -> None:
    net = nn.Linear(6, 1)
    optimizer = SGD(net.parameters(), lr=0.5)
    before = net.weight.detach().clone()
    trainer(max_steps=3, precision=precision).fit(net, loss_step, loader(), optimizer=optimizer)
    assert not torch.equal(net.weight.float(), before)


def test_a_packed_sequence_is_moved_whole_and_numbers_stay_on_the_host() -> None:
    packed = pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    moved = move({"words": packed, "lengths": [3, 2]}, torch.device("cpu"), torch.float64)
    assert moved["words"].data.dtype is torch.float64 and moved["lengths"] == [3, 2]
    assert moved["words"].batch_sizes.device.type == "cpu"
    assert torch.equal(moved["words"].batch_sizes, packed.batch_sizes)


# Host syncs


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for a device: the value of a tensor, read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


class ReadsInSteps:
    """Counts the reads of steps 2 to 8: between two log points."""

    def __init__(self) -> None:
        self.reads = Reads()

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        if step == 2:
            self.reads.__enter__()
        elif step == 9:
            self.reads.__exit__(None, None, None)


def masked(net: nn.Module, batch: Any) -> dict[str, Any]:
    loss = positives_only(net, batch)
    return {"loss": loss, "again": loss, "scale": loss.total.detach()}


@pytest.mark.parametrize("step", [loss_step, step, masked])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"micro_batch_size": 8},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
    ],
)
def test_16_no_value_is_read_between_log_points(step: Any, settings: dict[str, Any]) -> None:
    """None beside those of the optimizer, which reads its own counters on the CPU."""
    net = model(dropout=0.0)
    optimizer = AdamW(net.parameters(), lr=1e-3)
    by_hand = Reads()
    loss_step(net, dataset()[:16]).backward()
    optimizer.step()
    with by_hand:
        for _ in range(7):
            loss_step(net, dataset()[:16]).backward()
            optimizer.step()
            optimizer.zero_grad()

    net, callback = model(dropout=0.0), ReadsInSteps()
    trainer(max_steps=10, log_every_n_steps=10, callbacks=[callback], **settings).fit(
        net, step, loader(samples=400), optimizer=AdamW(net.parameters(), lr=1e-3)
    )
    assert callback.reads.count == by_hand.count


def test_17_on_the_cpu_nothing_is_copied() -> None:
    batches = [tuple(t[:16] for t in dataset().tensors)] * 3
    seen = []

    def step(net: nn.Module, batch: Any) -> Tensor:
        seen.append(batch is batches[0])
        return loss_step(net, batch)

    net = model()
    trainer(max_steps=3).fit(net, step, batches, batches, optimizer=SGD(net.parameters(), lr=0.1))
    assert seen and all(seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_17_for_a_gpu_loaders_are_rebuilt_to_pin_their_memory_and_workers_batches_are_copied_ahead(
    workers: int,
) -> None:
    device = torch.device("cuda")
    for data in (loader(num_workers=workers), DataLoader(dataset(), sampler=list(range(100)), num_workers=workers)):
        source: Any = make_source(data, seed=0, device=device)
        assert source.loader.pin_memory and not data.pin_memory
        assert TrainingData(source, device=device).copies_ahead == (workers > 0)


def test_17_a_copy_to_a_device_does_not_wait() -> None:
    asked = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to:
                asked.append(kwargs)
            return super().__torch_function__(func, types, args, kwargs or {})

    batch = {"x": torch.zeros(2).as_subclass(Watched), "y": [torch.zeros(2).as_subclass(Watched)]}
    move(batch, torch.device("meta"))
    move(batch, torch.device("meta"), torch.bfloat16)
    assert [how["non_blocking"] for how in asked] == [True] * 4


class CountedBatches:
    """Counts the batches that were fetched."""

    def __init__(self) -> None:
        self.fetched = 0

    def __iter__(self) -> Iterator[Any]:
        for x, y in zip(*(t.split(10) for t in dataset().tensors), strict=True):
            self.fetched += 1
            yield x, y


def test_18_a_prediction_is_yielded_batch_by_batch() -> None:
    batches, net = CountedBatches(), model()
    predictions = trainer().predict(net, lambda net, batch: net(batch[0]), batches)
    assert batches.fetched == 0
    for number, prediction in enumerate(predictions, start=1):
        assert batches.fetched == number
        assert prediction.shape == (10, 1) and not prediction.requires_grad
    assert number == 10


def test_18_an_evaluation_keeps_numbers_and_no_outputs() -> None:
    """Also where a metric is a view into a large tensor."""
    alive: list[Any] = []
    most = 0

    def step(net: nn.Module, batch: Any) -> dict[str, Any]:
        nonlocal most
        output = net(batch[0]).flatten()
        alive.append(weakref.ref(output))
        most = max(most, sum(reference() is not None for reference in alive))
        return {"loss": output.mean(), "first": output[:1], "all": sheer.mean(output)}

    trainer().test(model(), step, loader(10))
    assert len(alive) == 10 and most == 1


def test_18_training_keeps_numbers_and_no_graphs_between_log_points() -> None:
    alive: list[Any] = []
    net = model()

    def step(net: nn.Module, batch: Any) -> dict[str, Any]:
        output = net(batch[0])
        alive.append(weakref.ref(output))
        assert (
            sum(reference() is not None for reference in alive) <= 2
        )  # this step's, and the last one until it is let go
        return {"loss": F.mse_loss(output, batch[1]), "mean": output.mean()}

    trainer(max_steps=7).fit(net, step, loader(), optimizer=SGD(net.parameters(), lr=0.1))
    assert len(alive) == 7


def test_a_validation_leaves_no_trace_in_the_training() -> None:
    """Neither in the random states nor in the buffers, also not the batch that is tried before the first step.

    (Iterating a DataLoader draws a number, in a hand-written loop as here; a list does not.)
    """
    nets = [model(), model()]
    for net, val in zip(nets, (None, list(loader(32, shuffle=False))), strict=True):
        torch.manual_seed(0)
        trainer(max_epochs=2).fit(net, step, loader(), val, optimizer=SGD(net.parameters(), lr=0.1))
    assert_same(nets[0].state_dict(), nets[1].state_dict())
