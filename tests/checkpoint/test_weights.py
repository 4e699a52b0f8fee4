"""`load_weights`: from what it reads weights, by which names, and what it says of those that do not fit."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD

import sheer
from sheer.errors import RunError, SettingsError, SheerWarning
from tests.checkpoint.parts import weights, write_parts
from tests.ranks import run_on_ranks
from tests.task import assert_same, loader, model, step, trainer


def other() -> nn.Module:
    """The same model as that of the task, with other weights."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 1))


def a_run(folder: Path, state: dict[str, Tensor]) -> Path:
    net = model()
    net.load_state_dict(state)
    made = trainer(max_steps=1, run_dir=str(folder), checkpoint=True)
    made.fit(net, step, loader(), optimizer=SGD(net.parameters(), lr=0.0))
    state.update(net.state_dict())  # the batch norm has moved
    return folder / "checkpoints" / "last"


def a_file(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def hugging_face(folder: Path, state: dict[str, Tensor]) -> Path:
    (folder / "hf").mkdir()
    save_file(state, folder / "hf" / "model.safetensors", {"format": "pt"})
    return folder / "hf"


def in_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    (folder / "hf").mkdir()
    names, places = sorted(state), {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in names[number::2]}, folder / "hf" / file)
        places |= dict.fromkeys(names[number::2], file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "hf"


def the_index(folder: Path, state: dict[str, Tensor]) -> Path:
    return in_shards(folder, state) / "model.safetensors.index.json"


def a_state_dict(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "w.pt")
    return folder / "w.pt"


def an_old_pickle(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "w.bin", _use_new_zipfile_serialization=False)
    return folder / "w.bin"


def lightning(folder: Path, state: dict[str, Tensor]) -> Path:
    content = {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.6.6", "hyper_parameters": {"lr": 0.1}}
    torch.save(content, folder / "epoch=3.ckpt")
    return folder / "epoch=3.ckpt"


SOURCES = [a_run, a_file, hugging_face, in_shards, the_index, a_state_dict, an_old_pickle, lightning]


@pytest.mark.parametrize("write", SOURCES)
def test_sources(write: Callable[[Path, dict[str, Tensor]], Path], tmp_path: Path) -> None:
    state, net = dict(model().state_dict()), other()
    source = write(tmp_path, state)
    loaded = sheer.load_weights(net, source)
    assert_same(net.state_dict(), state)
    assert loaded == source.resolve()


def test_parts_of_ranks_are_put_together(tmp_path: Path) -> None:
    net = nn.Module()
    net.register_module("wide", nn.Linear(3, 4, bias=False))
    net.bias, net.narrow = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))  # type: ignore[assignment]
    sheer.load_weights(net, write_parts(tmp_path))
    assert_same(net.state_dict(), weights())


def load_divided(folder: Path) -> list[dict[str, Tensor]]:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    found = []
    for source in sorted(folder.iterdir()):
        net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        fully_shard(net)
        sheer.load_weights(net, source, rename={r"^model\.": ""})
        found.append({name: value.full_tensor() for name, value in net.state_dict().items()})  # type: ignore[operator]
    return found


def test_models_that_are_divided_over_ranks_take_their_parts(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).state_dict()
    for number, write in enumerate([in_shards, lightning, a_file]):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number), {f"model.{name}": value for name, value in state.items()})
    for path in (tmp_path / "0" / "hf", tmp_path / "1" / "epoch=3.ckpt", tmp_path / "2" / "w.safetensors"):
        path.rename(tmp_path / f"source{path.suffix}")
    for number in range(3):
        (tmp_path / str(number)).rmdir()
    for found in run_on_ranks(2, load_divided, tmp_path):
        assert len(found) == 3
        for loaded in found:
            assert_same(loaded, state)


def test_names_are_renamed_by_patterns_one_after_the_other(tmp_path: Path) -> None:
    state, net = model().state_dict(), other()
    source = a_file(tmp_path, {f"module.encoder.{name}": value for name, value in state.items()})
    sheer.load_weights(net, source, rename={r"^module\.": "", r"^encoder\.(\d+)": r"\1"})
    assert_same(net.state_dict(), state)
    with pytest.raises(
        SettingsError, match=r"\^encoder.*matches no name in .*at its turn there are: module\.encoder\.0\.bias, "
    ):
        sheer.load_weights(net, source, rename={r"^encoder\.": "", r"^module\.": ""})


@pytest.mark.parametrize(
    ("rename", "error", "said"),
    [
        ({r"\.(weight|bias)$": ""}, RunError, "rename makes '0' of both '0.bias' and '0.weight'"),
        ({"(": ""}, SettingsError, r'no pattern and its replacement.*Give such as'),
        ({"^modle.": ""}, SettingsError, r"'\^modle.': ''} matches no name in .*: 0.bias, 0.weight, .*, \.\.\."),
        ([("a", "b")], SettingsError, "rename is a list, and it takes a dict of patterns"),
        ({"0": r"\3"}, SettingsError, "no pattern and its replacement"),
    ],
)  # fmt: skip
def test_renaming_that_cannot_be(rename: dict[str, str], error: type[Exception], said: str, tmp_path: Path) -> None:
    source, net = a_file(tmp_path, model().state_dict()), other()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=said):
        sheer.load_weights(net, source, rename=rename)
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize(
    ("there", "here", "hint"),
    [
        ("model.", "", r'rename={r"^model\.": ""} makes most'),
        ("", "backbone.", r'rename={r"^": "backbone."} makes most'),
        ("a.encoder.", "backbone.", r'rename={r"^a\.encoder\.": "backbone."} makes most'),
        ("", "", None),
    ],
)
def test_a_prefix_that_explains_what_is_missing_is_named(
    there: str, here: str, hint: str | None, tmp_path: Path
) -> None:
    state = model().state_dict()
    source = a_file(tmp_path, {f"{there}{name}": value for name, value in state.items() if name != "4.bias"})
    net: nn.Module = other()
    if here:
        net = nn.Module()
        net.add_module(here.rstrip("."), other())
    with pytest.raises(RunError) as error:
        sheer.load_weights(net, source)
    assert (hint is None and "rename" not in str(error.value)) or (hint is not None and hint in str(error.value))
    if hint is not None:
        rename = eval(str(error.value).split("rename=")[1].split(" makes")[0])
        with pytest.raises(RunError, match=r"another model:\n  not in w.safetensors: \S*4\.bias\n"):
            sheer.load_weights(net, source, rename=rename)


def test_what_fits_is_loaded_and_the_rest_is_said(tmp_path: Path) -> None:
    state = dict(model().state_dict())
    del state["1.bias"]
    state |= {"4.weight": torch.ones(2, 16), "head.weight": torch.ones(1), "1.running_mean": torch.ones(16).int()}
    source, net = a_file(tmp_path, state), other()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    lines = (
        r"not in w.safetensors: 1.bias\n.*not in the model: head.weight\n  1.running_mean is float here and int there\n"
        r"  4.weight is \[1, 16\] here and \[2, 16\] there"
    )
    with pytest.raises(RunError, match=lines):
        sheer.load_weights(net, source)
    assert_same(net.state_dict(), before)
    with pytest.warns(SheerWarning, match="Not all of the weights in .* are loaded:\n.*" + lines):
        sheer.load_weights(net, source, strict=False)
    kept = ("1.bias", "4.weight", "1.running_mean")
    assert_same(net.state_dict(), {name: before[name] if name in kept else state[name] for name in before})


def test_that_nothing_fits_is_an_error_and_no_rename_is_advised_that_would_not_fit(tmp_path: Path) -> None:
    source, net = a_file(tmp_path, {f"net.{name}": torch.ones(9, 9) for name in model().state_dict()}), other()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RunError, match=r"Nothing in .* fits the model, so nothing is loaded:\n  not in") as error:
        sheer.load_weights(net, source, strict=False)
    assert "rename" not in str(error.value)
    with pytest.raises(RunError, match=r"another model:(?![\s\S]*rename=)"):
        sheer.load_weights(net, source)
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("w.pt", other()), "given a str as the model. They are swapped"),
        ((other(), other().state_dict()), r"a OrderedDict, whose weights are in memory: call model.load_state_dict\(source\)"),
        ((other(), other()), r"load_state_dict\(source.state_dict\(\)\)"),
        ((other(), None), "the path or the URL of weights, not a NoneType"),
    ],
)  # fmt: skip
def test_arguments_of_other_kinds(given: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        sheer.load_weights(*given)


def test_which_is_no_word_of_ones_own(tmp_path: Path) -> None:
    a_run(tmp_path / "run", dict(model().state_dict()))
    with pytest.raises(RunError, match=r'no \'lst\' checkpoint: which is "best", "last" or a step'):
        sheer.load_weights(other(), tmp_path / "run", "lst")


def test_tied_weights_that_are_written_once_are_not_missing(tmp_path: Path) -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    net["head"].weight = net["embed"].weight  # type: ignore[assignment]
    sheer.load_weights(net, a_file(tmp_path, {"embed.weight": torch.ones(5, 3)}))
    assert net["head"].weight is net["embed"].weight and torch.equal(net["head"].weight, torch.ones(5, 3))


class Extra(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1)
        self.extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_comes_along_under_its_new_name(tmp_path: Path) -> None:
    net, taking = Extra(), Extra()
    net.extra = {"version": 3}
    torch.save({f"net.{name}": value for name, value in net.state_dict().items()}, tmp_path / "w.pt")
    sheer.load_weights(taking, tmp_path / "w.pt", rename={r"^net\.": ""})
    assert taking.extra == {"version": 3} and torch.equal(taking.weight, net.weight)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {"a": torch.ones(1)}, "hparams": Namespace(lr=1)}, r"holds a argparse.Namespace, and to make one could run code.*take the weights out"),
        ({"epoch": 3, "model": {"a": 1}}, "holds a dict of epoch, model, and weights are tensors by name"),
        ([torch.ones(1)], "holds list, and weights are tensors by name"),
        ({3: torch.ones(1)}, "holds 3 as the name of a weight"),
    ],
)  # fmt: skip
def test_pickles_without_weights(content: Any, said: str) -> None:
    torch.save(content, "w.pt")
    with pytest.raises(RunError, match=said):
        sheer.load_weights(other(), "w.pt")


def test_a_whole_model_and_a_file_of_anything() -> None:
    torch.save(other(), "w.pt")
    with pytest.raises(RunError, match=r'torch.save\(there.state_dict\(\), "weights.pt"\) where it is a whole model'):
        sheer.load_weights(other(), "w.pt")
    Path("w.pt").write_bytes(b"e" * 99)
    with pytest.raises(RunError, match=r"^w.pt is nothing that torch.save wrote, or damaged. Give what"):
        sheer.load_weights(other(), "w.pt")


def test_a_file_of_the_index_that_is_not_there(tmp_path: Path) -> None:
    folder = in_shards(tmp_path, model().state_dict())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RunError, match=r"index.json names model-00002-of-00002.safetensors, which is not there"):
        sheer.load_weights(other(), folder)


def test_a_checkpoint_whose_save_was_cut_off_is_no_hugging_face_folder(tmp_path: Path) -> None:
    path = write_parts(tmp_path)
    save_file(weights(), path / "model.safetensors")
    (path / "manifest.json").unlink()
    with pytest.raises(RunError, match="holds no checkpoint"):
        sheer.load_weights(other(), path)


def test_a_trainer_tests_with_them(tmp_path: Path) -> None:
    state, net = model(0.0).state_dict(), other()
    made = trainer(max_steps=1)
    found = made.test(net, step, loader(shuffle=False), checkpoint=lightning(tmp_path, state))
    expected = trainer(max_steps=1).test(model(0.0), step, loader(shuffle=False))
    assert found == expected and load_file(a_file(tmp_path, state)).keys() == state.keys()
