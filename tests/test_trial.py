"""The batch of each validation loader that is tried before the first step: nothing after it shows that there was one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

import sheer
from tests.task import assert_same, dataset, loader, model, step, trainer
from tests.test_resume import StopAt, Stream


class Noisy(Dataset[Any]):
    """Draws from the process's generator, or from its own."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.data, self.noise = dataset(), generator

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + torch.randn(6, generator=self.noise), y


class NoisyStream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        data = Noisy()
        yield from (data[index] for index in range(50))


class OwnSampler(Sampler[int]):
    """Keeps its generator under a name of its own."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(4)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(100, generator=self.rng).tolist()

    def __len__(self) -> int:
        return 100


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def torchdatas(**options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Noisy(), batch_size=30, shuffle=True, **options)


def batched() -> DataLoader[Any]:
    sampler = RandomSampler(dataset(), generator=generator())
    return DataLoader(dataset(), batch_sampler=BatchSampler(sampler, 30, drop_last=False))


PERSIST: dict[str, Any] = {"num_workers": 1, "persistent_workers": True}
LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), 30, shuffle=True),
    "with a generator": lambda: DataLoader(Noisy(), 30, shuffle=True, generator=generator()),
    "with a generator, in a worker": lambda: DataLoader(
        Noisy(), 30, shuffle=True, generator=generator(), num_workers=1
    ),
    "in a worker that persists": lambda: DataLoader(Noisy(), 30, shuffle=True, **PERSIST),
    "with a generator, in a worker that persists": lambda: DataLoader(
        Noisy(), 30, shuffle=True, generator=generator(), **PERSIST
    ),
    "with a sampler": lambda: DataLoader(
        Noisy(), 30, sampler=RandomSampler(range(100), replacement=True, generator=generator())
    ),
    "with a sampler of one's own": lambda: DataLoader(Noisy(), 30, sampler=OwnSampler()),
    "with a batch sampler": batched,
    "with a generator in the dataset": lambda: DataLoader(Noisy(generator()), 30),
    "an iterable": lambda: DataLoader(NoisyStream(), 30),
    "an iterable in workers that persist": lambda: DataLoader(
        NoisyStream(), 30, num_workers=2, persistent_workers=True
    ),
    "with a state": Stream,
    "torchdata's": torchdatas,
    "torchdata's, in a worker that persists": lambda: torchdatas(**PERSIST),
    "two": lambda: {"a": loader(30, generator=generator()), "b": DataLoader(Noisy(), 30, **PERSIST)},
    "a list": lambda: [dataset()[:50]],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_validations_and_the_training_are_those_of_a_run_without_a_trial(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(trial: bool) -> tuple[list[Any], dict[str, Tensor], Tensor]:
        sheer.seed_everything(0)
        net, val, seen = model(), LOADERS[kind](), []

        def look(net: nn.Module, batch: Any) -> Any:
            seen.append(batch[0].tolist())
            return step(net, batch)

        with monkeypatch.context() as patched:
            if not trial:
                patched.setattr("sheer.loop.try_validation", lambda cfg, run, validation: None)
            trainer(max_epochs=2).fit(net, step, loader(), val, eval_step=look, optimizer=AdamW(net.parameters()))
        return seen[len(val) if isinstance(val, dict) else 1 :] if trial else seen, net.state_dict(), torch.rand(1)

    with_trial, without = fit(True), fit(False)
    assert len(without[0]) > 0 and with_trial[0] == without[0]
    assert_same(with_trial[1], without[1])
    assert torch.equal(with_trial[2], without[2])


class Measured(nn.Module):
    """Holds its metrics, as a LightningModule does; what it counts is in its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        torchmetrics = pytest.importorskip("torchmetrics")
        self.net = model()
        self.error, self.seen = torchmetrics.MeanMetric(), torchmetrics.SumMetric()
        self.both = torchmetrics.MetricCollection({"error": self.error, "seen": self.seen})
        self.both.persistent(True)

    def step(self, batch: Any) -> dict[str, Any]:
        values = step(self.net, batch)
        self.error.update(values["error"].detach(), weight=len(batch[0]))
        self.seen.update(float(len(batch[0])))
        return {"loss": values["loss"], "seen": self.seen, "mean": self.error}


def test_metrics_in_the_model_are_as_they_were_before_the_trial() -> None:
    """On a resume they hold what was counted since the last log point."""

    def lines(folder: str, stop_at: int | None = None) -> list[dict[str, Any]]:
        sheer.seed_everything(0)
        net = Measured()
        made = trainer(
            run_dir=folder, resume="auto", checkpoint=True, max_steps=14, log_every_n_steps=10,
            callbacks=[StopAt(stop_at)] if stop_at else [],
        )  # fmt: skip
        optimizer, both = AdamW(net.parameters()), dict(net.both.items(keep_base=True, copy_state=False))
        try:
            made.fit(net, Measured.step, loader(), loader(50), optimizer=optimizer)
        except SystemExit:
            assert stop_at
        assert both["seen"] is net.seen and both["error"] is net.error
        logged = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "time"} for line in logged]

    whole = lines("whole")
    assert whole[1]["train/seen"] == 100 + 3 * 16  # those of ten steps
    lines("stopped", stop_at=4)
    assert lines("stopped") == whole


def test_metrics_that_the_step_does_not_return_count_nothing_of_the_trial() -> None:
    counted = []

    class Reads:
        def on_validation_end(self, step: int, metrics: Any) -> None:
            counted.append(net.seen.compute().item())

    def step_without_them(net: Any, batch: Any) -> Tensor:
        loss: Tensor = net.step(batch)["loss"]
        return loss

    net = Measured()
    trainer(max_steps=1, callbacks=[Reads()]).fit(
        net, step_without_them, loader(), loader(50), optimizer=AdamW(net.parameters())
    )
    assert counted == [16 + 100]
