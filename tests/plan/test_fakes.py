"""What is needed of the parts of PyTorch that have no public name."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sheer.plan.fakes import fake_mode, fake_parameters, fake_ranks, is_fake
from sheer.plan.ledger import Ledger, seeing_resizes, storage_bytes


def test_fake_ranks_have_any_rank_and_size_and_hear_themselves() -> None:
    with fake_ranks(1024, 1000):
        assert (dist.get_rank(), dist.get_world_size()) == (1000, 1024)
        said: list[object] = ["mine"]
        dist.broadcast_object_list(said)
        heard: list[object] = [None] * 1024
        dist.all_gather_object(heard, "mine")
        assert said == ["mine"] and set(heard) == {"mine"}
    assert not dist.is_initialized()


def test_a_script_on_fake_ranks_finds_what_torchrun_says_and_may_make_the_group_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    hook = sys.excepthook
    with fake_ranks(64, 63):
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("63", "64", "0")
        dist.init_process_group("gloo")
        dist.destroy_process_group()
        assert dist.get_rank() == 63
    assert os.environ["RANK"] == "5" and "WORLD_SIZE" not in os.environ
    assert sys.excepthook is hook and not dist.is_initialized()


def test_a_module_that_is_built_gets_parameters_without_memory_and_those_that_are_shared_stay_one() -> None:
    built, register = fake_mode(), nn.Module.register_parameter
    with fake_parameters(built):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        weight = nn.Parameter(torch.ones(3, 3))
        model[0].weight = model[1].weight = weight
    assert all(is_fake(parameter) and isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert model[0].weight is model[1].weight and len(list(model.parameters())) == 3
    assert nn.Module.register_parameter is register and not is_fake(nn.Linear(1, 1).weight)
    assert model(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("fake", [False, True])
def test_a_ledger_sees_what_is_made_freed_and_resized(fake: bool) -> None:
    ledger = Ledger()
    with seeing_resizes(ledger), ledger:
        with fake_mode() if fake else torch.no_grad():
            one = torch.zeros(100)
            two = one.view(10, 10)[1:]
            assert ledger.now == 400
            three = one + 1
            assert ledger.now == ledger.most == 800
            three.untyped_storage().resize_(0)
            assert ledger.now == 400
            assert storage_bytes([one, two, None]) == 400
            del one
            assert ledger.now == 400  # a part of it is in use
            del two
    assert (ledger.now, ledger.most) == (0, 800)
