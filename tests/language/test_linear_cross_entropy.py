"""The loss without logits is that of the logits, and they never exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import sheer
from tests.task import trainer

TOKENS, CLASSES, WIDTH = 37, 23, 8


def inputs(dtype: torch.dtype = torch.float64, tokens: int = TOKENS, classes: int = CLASSES) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(classes, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(classes, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(classes, (tokens,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets, bias


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, of))


@pytest.mark.parametrize("chunk_size", [1, 10, 37, 2048])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_are_those_of_the_logits(chunk_size: int, with_bias: bool) -> None:
    hidden, weight, targets, bias = inputs()
    bias = bias if with_bias else None
    of = (hidden, weight, bias) if with_bias else (hidden, weight)
    plain = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    own = sheer.linear_cross_entropy(hidden, weight, targets, bias, chunk_size=chunk_size)
    assert own.count.item() == (targets != -100).sum().item()
    torch.testing.assert_close(own.total, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(own.total * 3, *of), gradients(plain * 3, *of), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_are_differences_of_the_loss() -> None:
    hidden, weight, targets, bias = inputs()
    loss = sheer.linear_cross_entropy(hidden, weight, targets, bias, chunk_size=10).total
    for tensor, gradient in zip((hidden, weight, bias), gradients(loss, hidden, weight, bias), strict=True):
        direction = torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            both = []
            for size in (1e-6, -1e-6):
                tensor += size * direction
                both.append(sheer.linear_cross_entropy(hidden, weight, targets, bias, chunk_size=10).total)
                tensor -= size * direction
        torch.testing.assert_close((both[0] - both[1]) / 2e-6, (gradient * direction).sum(), rtol=1e-7, atol=1e-7)


def test_a_weight_shared_with_the_embedding_gets_both_gradients() -> None:
    _, weight, targets, _ = inputs()
    tokens = torch.arange(TOKENS) % CLASSES
    plain = F.cross_entropy(F.linear(F.embedding(tokens, weight).sin(), weight), targets, reduction="sum")
    own = sheer.linear_cross_entropy(F.embedding(tokens, weight).sin(), weight, targets, chunk_size=9)
    torch.testing.assert_close(*gradients(own.total, weight), *gradients(plain, weight), rtol=1e-12, atol=1e-12)


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden, weight, targets, bias = inputs()
    weight.requires_grad_(False)
    own = sheer.linear_cross_entropy(hidden.unflatten(0, (1, -1)), weight, targets[None], bias)
    own.total.backward()
    assert hidden.grad is not None and bias.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not sheer.linear_cross_entropy(hidden, weight, targets, bias).total.requires_grad


def test_where_no_token_counts_the_loss_and_the_gradients_are_zero() -> None:
    hidden, weight, targets, bias = inputs()
    own = sheer.linear_cross_entropy(hidden, weight, torch.full_like(targets, 7), bias, ignore_index=7)
    assert own.total.item() == own.count.item() == 0
    assert all(not gradient.any() for gradient in gradients(own.total, hidden, weight, bias))


def test_under_autocast_it_is_as_near_to_float32_as_the_logits_are() -> None:
    hidden, weight, targets, bias = inputs(torch.float32, tokens=512, classes=101)
    exact = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
        own = sheer.linear_cross_entropy(hidden, weight, targets, bias, chunk_size=64)
    assert own.total.dtype == torch.float32
    torch.testing.assert_close(own.total, plain, rtol=1e-6, atol=0)
    of = (hidden, weight, bias)
    for mine, theirs, right in zip(
        gradients(own.total, *of), gradients(plain, *of), gradients(exact, *of), strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() <= 1.05 * (theirs - right).norm()


def test_gradients_of_16_bit_weights_are_summed_in_32() -> None:
    hidden, weight, targets, bias = inputs(torch.bfloat16, tokens=4096)
    own = sheer.linear_cross_entropy(hidden, weight, targets, bias, chunk_size=16)
    mine = gradients(own.total, weight)[0]
    exact = gradients(F.cross_entropy(F.linear(hidden.double(), weight.double(), bias.double()), targets, reduction="sum"), weight)[0]  # fmt: skip
    assert mine.dtype == torch.bfloat16
    assert (mine - exact).norm() / exact.norm() < 5e-3  # 256 sums rounded to 16 bits each would be 10 times that off


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_no_tensor_is_as_large_as_the_logits() -> None:
    hidden, weight, targets, bias = inputs(torch.float32, tokens=1000, classes=500)
    with Largest() as plain:
        F.cross_entropy(F.linear(hidden, weight, bias), targets).backward()
    with Largest() as own:
        sheer.linear_cross_entropy(hidden, weight, targets, bias, chunk_size=20).total.backward()
    assert plain.elements == 1000 * 500
    assert own.elements == 20 * 500  # more than hidden, 8 x 1000, or weight, 8 x 500


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden, weight, targets, _ = inputs()
    loss = sheer.linear_cross_entropy(hidden, weight, targets).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"),
    [((4, 3), (5, 2), (4,)), ((4, 3), (5, 3), (3,)), ((2, 4, 3), (5, 3), (8,)), ((4, 3), (3,), (4,))],
)
def test_shapes_that_do_not_fit_are_named(
    hidden: tuple[int, ...], weight: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    with pytest.raises(sheer.StepError, match=r"takes hidden \[\.\.\., width\]"):
        sheer.linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64))


class Words(nn.Module):
    """An embedding, a layer, and the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.embedding(tokens)).tanh()


def chunked_step(model: Words, batch: tuple[Tensor, Tensor]) -> sheer.Mean:
    return sheer.linear_cross_entropy(model(batch[0]), model.embedding.weight, batch[1], chunk_size=7)


def logits_step(model: Words, batch: tuple[Tensor, Tensor]) -> sheer.Mean:
    losses = F.cross_entropy(F.linear(model(batch[0]), model.embedding.weight).flatten(0, 1), batch[1].flatten(), reduction="none")  # fmt: skip
    return sheer.mean(losses, batch[1].flatten() != -100)


def trained(step: Any, **settings: Any) -> tuple[dict[str, Tensor], float]:
    torch.manual_seed(0)
    model = Words()
    tokens = torch.randint(CLASSES, (24, 9))
    targets = torch.where(torch.rand(24, 9) < torch.rand(24, 1), tokens.roll(-1, 1), -100)
    loader = DataLoader(TensorDataset(tokens, targets), batch_size=8)
    result = trainer(precision="64-true", max_steps=6, **settings).fit(
        model, step, loader, loader, optimizer=torch.optim.SGD(model.parameters(), lr=0.5)
    )
    return {name: value.detach() for name, value in model.state_dict().items()}, result.metrics["val/loss"]


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 3}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_run_is_that_of_the_logits(settings: dict[str, Any]) -> None:
    mine, my_loss = trained(chunked_step, **settings)
    theirs, their_loss = trained(logits_step, **settings)
    assert my_loss == pytest.approx(their_loss, abs=1e-11)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-10)


def test_compiled_it_has_the_same_gradients() -> None:
    hidden, weight, targets, bias = inputs()
    compiled = torch.compile(sheer.linear_cross_entropy, backend="eager")  # what is traced is what is tried
    both = [
        gradients(loss(hidden, weight, targets, bias, chunk_size=10).total, hidden, weight, bias)
        for loss in (sheer.linear_cross_entropy, compiled)
    ]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_layer_in_place_of_its_weight_and_targets_that_are_no_classes() -> None:
    layer: Any = nn.Linear(4, 3)
    hidden, targets = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(sheer.StepError, match=r"a Tensor, a Linear and a Tensor. Of a layer give layer.weight"):
        sheer.linear_cross_entropy(hidden, layer, targets)
    with pytest.raises(sheer.StepError, match=r"its targets are torch.float32"):
        sheer.linear_cross_entropy(hidden, layer.weight, targets.float())
