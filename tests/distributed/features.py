"""What is tried under every way of dividing a run over ranks: the table in docs/parallel.md is made from these."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, WeightedRandomSampler

import sheer
from tests.distributed.task import CLASSES, mean_step, step, tensor_plan, train

WAYS: dict[str, tuple[int, Any]] = {
    "DDP": (2, "ddp"),
    "FSDP2": (2, "fsdp"),
    "HSDP": (4, sheer.Parallel(dp_replicate=2)),
    "TP": (2, sheer.Parallel(tp=2)),
    "TP x FSDP2": (4, sheer.Parallel(tp=2)),
    "PP": (2, sheer.Parallel(pp=2, pp_split=("blocks.1",), pp_micro_batches=4)),
    "PP x FSDP2": (4, sheer.Parallel(pp=2, pp_split=("blocks.1",), pp_micro_batches=2)),
}
LONE = {
    "DDP on 3 ranks": (3, "ddp"),
    "TP x HSDP": (8, sheer.Parallel(dp_replicate=2, tp=2)),
    "PP x TP x FSDP2": (8, sheer.Parallel(pp=2, tp=2, pp_split=("blocks.1",), pp_micro_batches=2)),
}
"""Ways that are tried with few features: those that make uneven parts, or need many processes."""

FLOAT32 = {"precision": "32-true", "optimizer": torch.optim.SGD}


def nan_step(model: nn.Module, batch: Any, step: int) -> dict[str, Any]:
    """A loss that is NaN in one step, for one sample."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    if step == 5 and model.training:
        losses = torch.where(batch[0][:, 0] == batch[0][:, 0].max(), losses * float("nan"), losses)
    return {"loss": losses.mean()}


def with_torchmetrics() -> dict[str, Any]:
    from torchmetrics.classification import MulticlassAccuracy

    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    return {"run_step": MetricStep(accuracy)}


class MetricStep:
    """A step with an object of torchmetrics."""

    def __init__(self, accuracy: Any) -> None:
        self.accuracy = accuracy

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        logits = model(batch[0])
        self.accuracy.to(logits.device).update(logits, batch[1])
        return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": self.accuracy}


def cosine(optimizer: Any, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


def weighted(dataset: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(dataset, 16, sampler=WeightedRandomSampler([1.0] * 50 + [3.0] * 50, 96, generator=generator))


def listed(dataset: Any) -> Any:
    return [tuple(tensor[start : start + 20] for tensor in dataset.tensors) for start in range(0, 100, 20)]


FEATURES: dict[str, Any] = {
    "scalar loss": dict,
    "`Mean` loss, `micro_batch_size`, clipping": lambda: {
        "run_step": mean_step, "micro_batch_size": 3, "gradient_clip_val": 0.5,
    },
    "32-true": lambda: FLOAT32,
    "bf16-mixed": lambda: {**FLOAT32, "precision": "bf16-mixed", "max_steps": 6},
    "16-mixed": lambda: {**FLOAT32, "precision": "16-mixed", "max_steps": 6, "run_step": small_step},
    "`accumulate_grad_batches`": lambda: {"accumulate_grad_batches": 3},
    "clipping by value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "a schedule": lambda: {"scheduler": cosine},
    "an optimizer from a function": lambda: {"as_function": True},
    "EMA": lambda: {"callbacks": [sheer.EMA(0.9)]},
    "SWA": lambda: {"callbacks": [sheer.SWA(start_step=8)], "max_steps": 20},
    "`nonfinite=\"skip\"`": lambda: {"run_step": nan_step, "nonfinite": "skip"},
    "GradientNorm, LearningRateMonitor": lambda: {
        "callbacks": [sheer.GradientNorm(per_parameter=True), sheer.LearningRateMonitor()]
    },
    "EarlyStopping": lambda: {"monitor": "val/loss", "callbacks": [sheer.EarlyStopping(patience=1, min_delta=0.3)], "max_steps": 40},
    "torchmetrics": with_torchmetrics,
    "a sampler of one's own": lambda: {"loader": weighted},
    "workers": lambda: {"loader": lambda d: DataLoader(d, 16, shuffle=True, num_workers=1), "max_steps": 9},
    "a dict of loaders": lambda: {
        "loader": lambda d: {"a": DataLoader(d, 16, shuffle=True), "b": DataLoader(d, 10)},
        "run_step": pair_step, "val_loader": lambda d: {"all": DataLoader(d, 24), "few": DataLoader(d, 60)},
    },
    "a list of batches": lambda: {"loader": listed, "val_loader": listed},
    "`overfit_batches`, `limit_val_batches`": lambda: {"overfit_batches": 2, "limit_val_batches": 3},
}  # fmt: skip


def small_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A loss that no scale makes infinite: with fewer samples on a rank, the gradients of each are larger."""
    return {"loss": step(model, batch)["loss"] / 64}


def pair_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The steps of two loaders at once."""
    return step(model, batch["a"] if isinstance(batch, dict) else batch)


REFUSED = {
    ("PP", "16-mixed"): 'Set "bf16-mixed"',
    ("PP", "GradientNorm, LearningRateMonitor"): "Leave per_parameter out",
    ("PP", "torchmetrics"): "Return a number, or a sheer.Mean",
}


def tries(way: str, feature: str) -> bool:
    """Whether a way of dividing is tried with a feature.

    Starting workers takes long, and has to do with none of them; what a pipeline cuts into micro-batches must be of one length.
    """
    if feature == "workers":
        return way in ("DDP", "FSDP2")
    return feature != "a dict of loaders" or not way.startswith("PP")


FEW = ["scalar loss", "`Mean` loss, `micro_batch_size`, clipping"]
TRIED = [(way, feature) for way in WAYS for feature in FEATURES if tries(way, feature)]
TRIED += [(way, feature) for way in LONE for feature in FEW]


def refusal(way: str, feature: str) -> str | None:
    """What is said where a way of dividing refuses a feature."""
    return REFUSED.get((way.split(" ")[0], feature))


def within(feature: str) -> dict[str, float]:
    """How near a divided run comes to that of one process: values that are logged, and weights relative to their largest."""
    if feature in ("bf16-mixed", "16-mixed"):
        return {"logged": 3e-2, "weights": 1e-1}
    return {"logged": 1e-5, "weights": 1e-5} if feature == "32-true" else {"logged": 1e-10, "weights": 1e-8}


def run_feature(feature: str, parallel: Any = "auto", folder: str = "runs/one") -> dict[str, Any]:
    """Make the run of a feature."""
    plan = tensor_plan() if getattr(parallel, "tp", 1) > 1 else None
    options = {"max_steps": 20 if feature in (*FEW, "32-true") else 9, **FEATURES[feature]()}  # an epoch has 7
    if getattr(parallel, "pp", 1) > 1:
        options["micro_batch_size"] = None  # those of a pipeline are all of one size
    return train(parallel, plan=plan, folder=folder, **options)


def run_features(features: list[str], parallel: Any) -> dict[str, Any]:
    """Make the runs of several features on this rank, one after the other; an error stands in the place of its run."""
    results: dict[str, Any] = {}
    for number, feature in enumerate(features):
        try:
            results[feature] = run_feature(feature, parallel, f"runs/{number}")
        except Exception as error:
            results[feature] = f"{type(error).__name__}: {error}"
    return results
