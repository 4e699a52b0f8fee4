"""Time and memory of the loss at the end of a language model, forward and backward, as a markdown table.

python benchmarks/linear_cross_entropy.py            # on a GPU, in bfloat16 autocast over float32 weights
python benchmarks/linear_cross_entropy.py --small    # a try on the CPU, where no memory is measured

Memory is the peak above what is there before: hidden states, weight and targets. The gradients are in it, whichever way they are made.
Differences are those of the weight's gradient to the same in float32, relative, by norm. The first call, which compiles, is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F

import sheer

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Of a batch of tokens, the hidden states and the vocabulary."""

    name: str
    tokens: int
    width: int
    classes: int


SHAPES = [Shape("GPT 124M, 32 x 1024", 32_768, 768, 50_304), Shape("Llama 1B, 4 x 4096", 16_384, 2048, 128_256)]
SMALL = [Shape("small", 512, 64, 1000)]


def logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def chunked(chunk_size: int) -> Way:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        mean = sheer.linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
        return mean.total / mean.count

    return loss


def pytorchs_own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, options=options)


def ways(sizes: list[int], compiled: bool) -> dict[str, Way]:
    known: dict[str, Way] = {"F.cross_entropy(F.linear(...))": logits}
    if compiled:
        known["the same, compiled"] = torch.compile(logits)
    known |= {f"sheer.linear_cross_entropy, chunks of {size}": chunked(size) for size in sizes}
    if compiled:
        known |= {f"the same, compiled, chunks of {size}": torch.compile(chunked(size)) for size in sizes[-2:]}
    if hasattr(F, "linear_cross_entropy"):
        known["F.linear_cross_entropy, its own chunks"] = pytorchs_own
    return known


def measured(way: Way, hidden: Tensor, weight: Tensor, targets: Tensor, repeats: int) -> dict[str, Any]:
    """Return milliseconds, bytes and the weight's gradient of a forward and backward."""
    device = hidden.device

    def once() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = way(hidden, weight, targets)
        loss.backward()

    for _ in range(3):
        once()
    times, peak = [], 0
    hidden.grad = weight.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        peak = torch.cuda.max_memory_allocated() - before
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    assert weight.grad is not None
    return {"ms": statistics.median(times), "bytes": peak, "gradient": weight.grad}


def exact_gradient(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of the weight, computed in float32."""
    mean = sheer.linear_cross_entropy(hidden.detach().float(), weight, targets)
    return torch.autograd.grad(mean.total / mean.count, weight)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.small else "cuda")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}\n")
    for shape in SMALL if arguments.small else SHAPES:
        torch.manual_seed(0)
        hidden = torch.randn(shape.tokens, shape.width, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = (0.02 * torch.randn(shape.classes, shape.width, device=device)).requires_grad_()
        targets = torch.randint(shape.classes, (shape.tokens,), device=device)
        exact = exact_gradient(hidden, weight, targets)
        print(f"| {shape.name}, vocabulary of {shape.classes:,} | ms | GiB above | off by |\n| --- | --- | --- | --- |")
        for label, way in ways(arguments.chunks, not arguments.eager).items():
            try:
                found = measured(way, hidden, weight, targets, arguments.repeats)
            except torch.OutOfMemoryError:
                print(f"| {label} | out of memory | | |", flush=True)
                continue
            off = ((found["gradient"] - exact).norm() / exact.norm()).item()
            print(f"| {label} | {found['ms']:.2f} | {found['bytes'] / 2**30:.2f} | {off:.1e} |", flush=True)
            del found
        print()


if __name__ == "__main__":
    main()
