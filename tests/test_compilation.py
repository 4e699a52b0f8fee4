"""`compile`: the whole model is compiled, in place; what is compiled again is said in words."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile

import sheer
from sheer.compilation import CallOf, Compilations, compile_model, in_words, reasons_by_code
from tests.task import assert_same, loader, loss_step, trainer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Backend:
    """Stands for Inductor, which takes seconds: counts what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    made, compiled = Backend(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: compiled(function, backend=made))
    torch.compiler.reset()
    return made


@pytest.mark.parametrize("make", [Net, lambda: Net().layers], ids=["a class of one's own", "a class of PyTorch's"])
def test_the_whole_model_is_one_graph_and_a_copy_is_a_model_of_its_own(make: Any, backend: Backend) -> None:
    net = make()
    seen: list[Any] = []
    net.register_forward_hook(lambda *given: seen.append(given))
    names, x = list(net.state_dict()), torch.randn(3, 6)
    plain = net(x)
    compile_model(net, None)
    assert torch.equal(net(x), plain) and backend.graphs == 1 and len(seen) == 2
    assert list(net.state_dict()) == names

    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not torch.equal(other(x), plain) and torch.equal(net(x), plain)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x).tanh()


def test_blocks_are_compiled_once_for_all_of_a_kind(backend: Backend) -> None:
    net = Blocks()
    plain = copy.deepcopy(net)
    for one, compiled in ((net, "blocks"), (plain, False)):
        torch.manual_seed(0)
        trainer(max_steps=3, compile=compiled).fit(one, loss_step, loader(16), optimizer=SGD(one.parameters(), lr=0.1))
    assert backend.graphs == 1
    assert_same(net.state_dict(), plain.state_dict())
    with pytest.raises(sheer.SettingsError, match="this model has none"):
        trainer(max_steps=1, compile="blocks").fit(
            plain.head, loss_step, loader(16), optimizer=SGD(plain.head.parameters())
        )


def test_a_run_says_what_was_compiled_again_and_why(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()
    trainer(max_epochs=2, log_every_n_steps=4, compile=True).fit(
        net, loss_step, loader(16), loader(16), optimizer=SGD(net.parameters(), lr=0.01)
    )
    said = [line for line in capsys.readouterr().out.splitlines() if "compiled again" in line]
    assert said[0].startswith("loss_step was compiled again, 2 times by now: ")
    assert "the batch size of batch[0] changed (16 -> 4); drop_last=True" in said[0]
    # The model by itself is what evaluations run, and their last batch is shorter, too; that they run without gradients is not told.
    assert len(said) == 2 and said[1].startswith("Net.forward was compiled again, ")


def test_the_compilers_own_words_are_still_where_they_were(backend: Backend) -> None:
    net = Net()
    compile_model(net, None)
    since = Compilations()
    for size in (4, 4, 3):
        net(torch.randn(size, 6))
    assert [
        reason for reasons in reasons_by_code().values() for reason in reasons if "size mismatch at index 0" in reason
    ]
    assert len(since.news()) == 1 and since.news() == []


def test_other_reasons_are_told_as_they_are() -> None:
    assert in_words("0/1: tensor 'x' dtype mismatch. expected Float, actual Half") == (
        "tensor 'x' dtype mismatch. expected Float, actual Half"
    )


def test_compiled_steps_compute_the_same() -> None:
    """The one test with the real compiler."""
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    for one, compiled in ((net, True), (plain, False)):
        torch.manual_seed(0)
        trainer(max_steps=3, compile=compiled).fit(one, loss_step, loader(16), optimizer=SGD(one.parameters(), lr=0.1))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert CallOf(net)(torch.ones(2, 6)).shape == (2, 1)


class Deep(nn.Module):
    """Whose activations are cheap to compute again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


def computed(compile: Any) -> tuple[int, list[torch.Tensor]]:
    """Train two steps; return how many times an activation was computed in the second, and the weights."""
    torch.manual_seed(0)
    net, seen = Deep(), profile(activities=[ProfilerActivity.CPU])
    second = sheer.On(
        step_start=lambda step, net, batch: seen.start() if step == 2 else None,
        step_end=lambda step, net: seen.stop() if step == 2 else None,
    )
    trainer(max_steps=2, compile=compile, callbacks=[second]).fit(
        net, loss_step, loader(), optimizer=SGD(net.parameters(), lr=0.1)
    )
    return sum(event.count for event in seen.key_averages() if event.key == "aten::tanh"), list(net.parameters())


def test_with_a_memory_budget_activations_are_computed_again_and_it_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: compiled(function, backend="aot_eager"))
    config: Any = importlib.import_module("torch._functorch.config")
    before = config.activation_memory_budget
    torch.compiler.reset()
    whole, weights = computed(True)
    less, same = computed(sheer.Compile(activation_memory_budget=0.0))
    again, _ = computed(sheer.Compile(mode="default"))
    assert config.activation_memory_budget == before
    assert (whole, less, again) == (6, 12, 6)
    for one, other in zip(weights, same, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"compile": sheer.Compile, "activation_memory_budget": 1.5}, "not 1.5"),
        ({"compile": sheer.Compile, "mode": "fast"}, 'mode must be one of "blocks"'),
        ({"compile": sheer.Settings, "activation_memory_budget": 0.5}, "compile=False. Set compile=True"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(how: dict[str, Any], words: str) -> None:
    make = how.pop("compile")
    with pytest.raises(sheer.SettingsError, match=words):
        make(**how)
