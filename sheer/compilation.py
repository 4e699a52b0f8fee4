"""PyTorch's compiler: a model is compiled as a whole, and what is compiled again while a run goes is said in words."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

SIZE = re.compile(r"tensor '(.+)' size mismatch at index (\d+)\. expected (\d+), actual (\d+)")
OF_EVALUATION = ("grad_mode", ".training ")  # what an evaluation changes: it is compiled for by itself, once
WRAPPERS = (str(Path(torch.__file__).parent / "_dynamo"), __file__)  # whose functions only call what is compiled
STATIC = "drop_last=True on the loader, or batches padded to one size, keep it the same; after the first change PyTorch compiles for any size"


def compile_model(model: nn.Module, mode: str | None) -> None:
    """Compile a model in place, as `model.compile(mode=mode)` does.

    That does nothing for a model whose class is PyTorch's own, such as `nn.Sequential`: the compiler leaves PyTorch's code alone unless it
    is called from other code. So such a model is called from here.
    """
    model.compile(mode=mode)
    if type(model).forward.__module__.startswith("torch.nn."):
        model._compiled_call_impl = torch.compile(CallOf(model).__call__, mode=mode)  # what `compile` sets


class CallOf:
    """The call of a model, its hooks included, without what it was compiled to."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *arguments: Any, **named_ones: Any) -> Any:
        """Call it."""
        return self.model._call_impl(*arguments, **named_ones)


class Compilations:
    """Tells what was compiled again since it was made, or last asked, and tells the compiler for the time of a run what memory to use."""

    def __init__(self) -> None:
        self._seen = {code: len(reasons) for code, reasons in reasons_by_code().items()}
        self.budget = 1.0
        self._budget_before: float | None = None

    def open(self) -> None:
        """Let the compiler keep the budget: a share of its activations' memory; the rest it computes again in the backward pass."""
        if self.budget < 1.0:
            self._budget_before = set_memory_budget(self.budget)

    def close(self) -> None:
        """Give the compiler back what it was told before."""
        if self._budget_before is not None:
            set_memory_budget(self._budget_before)
            self._budget_before = None

    def news(self) -> list[str]:
        """Return a sentence for each function that was compiled again, evaluations left out."""
        said = []
        for code, reasons in reasons_by_code().items():
            new = reasons[self._seen.get(code, 0) :]
            self._seen[code] = len(reasons)
            causes = dict.fromkeys(in_words(reason) for reason in new if not is_of_evaluation(reason))
            if causes and not code.co_filename.startswith(WRAPPERS):
                said.append(
                    f"{code.co_qualname} was compiled again, {times_compiled(reasons)} times by now: {'; '.join(causes)}"
                )
        return said


def set_memory_budget(budget: float) -> float:
    """Set the share of its activations' memory that what is compiled from now on keeps, and return what it was.

    What was compiled before is forgotten: it would be used again. PyTorch explains the setting, but in a module with a private name; there
    is no other way to it.
    """
    torch.compiler.reset()
    config: Any = importlib.import_module("torch._functorch.config")
    before, config.activation_memory_budget = float(config.activation_memory_budget), budget
    return before


def reasons_by_code() -> dict[CodeType, list[str]]:
    """Return for each compiled function why what was compiled before did not do, in the compiler's own words, oldest first.

    PyTorch has no public way to this but its log. The name is the same from 2.0 on, and a test sees that it still is. Nothing is imported:
    where the compiler is not loaded, nothing was compiled.
    """
    utils: Any = sys.modules.get("torch._dynamo.utils")
    return dict(getattr(utils, "guard_failures", {}))


def times_compiled(reasons: list[str]) -> int:
    """Return how often a function was compiled: a reason begins with the number of what did not do, as "0/1: ..."; numbers begin at 0."""
    numbers = [int(found[1]) for reason in reasons if (found := re.match(r"\d+/(\d+)", reason))]
    return max(numbers, default=0) + 2


def is_of_evaluation(reason: str) -> bool:
    """Whether it was compiled again only because an evaluation runs without gradients and in eval mode."""
    return any(part in reason for part in OF_EVALUATION)


def in_words(reason: str) -> str:
    """Say a reason of the compiler's."""
    found = SIZE.search(reason)
    if found is None:
        return re.sub(r"^\d+/\d+: ", "", reason).strip().splitlines()[0]
    what = "the batch size" if found[2] == "0" else f"dimension {found[2]}"
    return f"{what} of {found[1]} changed ({found[3]} -> {found[4]}); {STATIC}"
