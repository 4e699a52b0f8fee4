"""Files that were made to do harm, of each kind that is read: none runs code, each is named in one error of ours, and no model is touched."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

import sheer
from sheer.checkpoint.store import MANIFEST, hash_of, sealed
from sheer.errors import RunError
from tests.task import assert_same, loader, model, step, trainer

DEEP = 100_000
MARK = "code-was-run"


@pytest.fixture(autouse=True)
def no_code_runs() -> Iterator[None]:
    yield
    assert not Path(MARK).exists()


class Runs:
    """Runs code where it is unpickled."""

    def __init__(self, how: Callable[..., Any], *arguments: Any) -> None:
        self.how, self.arguments = how, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.how, self.arguments


PAYLOADS = [
    Runs(os.system, f"touch {MARK}"),
    Runs(exec, f"open({MARK!r}, 'w')"),
    Runs(open, MARK, "w"),
    Runs(__import__, "os"),
    Runs(torch.load, MARK),
]


def test_the_payloads_do_run_code_where_nothing_stops_them() -> None:
    pickle.loads(pickle.dumps(PAYLOADS[1]))
    assert Path(MARK).exists()
    Path(MARK).unlink()


def refused(source: Path | str, named: str) -> None:
    """Loading the weights fails with one error, which names the file, and leaves the model as it was."""
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RunError) as error:
        sheer.load_weights(net, source)
    assert named in str(error.value)
    assert_same(net.state_dict(), before)


# Files by themselves.


def zipped(content: bytes) -> bytes:
    """What torch.save writes, with another pickle in it."""
    good, out = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(2)}, good)
    with zipfile.ZipFile(good) as before, zipfile.ZipFile(out, "w") as after:
        for name in before.namelist():
            after.writestr(name, content if name.endswith("data.pkl") else before.read(name))
    return out.getvalue()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_pickles(payload: Runs, suffix: str) -> None:
    inside = {"state_dict": {"w": torch.ones(2), "0.weight": payload}}
    for number, content in enumerate([pickle.dumps(payload), pickle.dumps(inside), zipped(pickle.dumps(payload, 2)), b"\x80\x02" * 9]):  # fmt: skip
        file = Path(f"{number}{suffix}")
        file.write_bytes(content)
        refused(file, f"{number}{suffix}")
    for number, new in enumerate([True, False]):
        torch.save(inside, f"saved{number}{suffix}", _use_new_zipfile_serialization=new)
        refused(f"saved{number}{suffix}", f"saved{number}{suffix}")


def with_header(header: Any, size: int | None = None, content: bytes = b"\x00" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [8] if shape is None else shape, "data_offsets": [begin, end]}


def with_parts(parts: Any, **tensors: torch.Tensor) -> bytes:
    from safetensors.torch import save

    return bytes(save(tensors, {"parts": parts if isinstance(parts, str) else json.dumps(parts)}))


HALF = torch.ones(2, 3)
SAFETENSORS = {
    "a header of 2**62 bytes": with_header({}, 2**62),
    "a header of the whole file and more": with_header({"w": entry(0, 32)}, 1000),
    "a header of 2 GiB": with_header({}, 2**31),
    "offsets that overlap": with_header({"a": entry(0, 32), "b": entry(16, 48)}),
    "offsets that are negative": with_header({"a": entry(-32, 0)}),
    "offsets behind the end": with_header({"a": entry(0, 32), "b": entry(32, 1 << 40, [1 << 38])}),
    "offsets that do not fit the shape": with_header({"a": entry(0, 64)}),
    "a shape whose size overflows": with_header({"a": entry(0, 64, [2**62, 2**62])}),
    "an unknown type": with_header({"a": entry(0, 64, dtype="F99")}),
    "a type of another size": with_header({"a": entry(0, 64, dtype="F64")}, content=b"\x00" * 60),
    "no JSON": with_header(b"\x80\x02cos\nsystem\n"),
    "deep nesting": with_header(b"[" * DEEP + b"]" * DEEP),
    "a list": with_header([1, 2]),
    "parts that are no JSON": with_parts("{", w=HALF),
    "parts that nest deeply": with_parts("[" * DEEP, w=HALF),
    "parts that are a list": with_parts([], w=HALF),
    "a part that begins before the tensor": with_parts({"w": [[-1, 0], [4, 3]]}, w=HALF),
    "a part that ends behind it": with_parts({"w": [[3, 0], [4, 3]]}, w=HALF),
    "a part of a tensor of other dimensions": with_parts({"w": [[0], [12]]}, w=HALF),
    "a part that begins nowhere": with_parts({"w": [["a", None], [4, 3]]}, w=HALF),
    "a part at half a number": with_parts({"w": [[0.5, 0], [4, 3]]}, w=HALF),
    "a part that is a number": with_parts({"w": 3}, w=HALF),
}


@pytest.mark.parametrize("lie", SAFETENSORS)
@pytest.mark.parametrize("place", ["file", "hugging face"])
def test_safetensors(lie: str, place: str) -> None:
    folder = Path("folder")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(SAFETENSORS[lie])
    refused(folder / "model.safetensors" if place == "file" else folder, "model.safetensors")


def test_a_part_of_a_tensor_that_would_fill_the_memory_is_not_made() -> None:
    state = model().state_dict()
    state["0.weight"] = torch.ones(16, 6)
    for shape, said in (([10**6, 10**7], "0.weight is"), ([32, 6], "0.weight is")):
        save_file(state, "w.safetensors", {"parts": json.dumps({"0.weight": [[0, 0], shape]})})
        refused("w.safetensors", said)
    save_file({**state, "0.weight": torch.ones(8, 6)}, "w.safetensors", {"parts": json.dumps({"0.weight": [[8, 0], [16, 6]]})})  # fmt: skip
    refused("w.safetensors", "has 48 of the 96 numbers wanted of '0.weight'")


INDICES = {
    "a way out of the folder": {"weight_map": {"w": "../outside.safetensors"}},
    "an absolute path": {"weight_map": {"w": "/etc/passwd"}},
    "a number for a file": {"weight_map": {"w": 3}},
    "a list for a map": {"weight_map": ["w"]},
    "no map": {},
    "an empty map": {"weight_map": {}},
    "the folder itself": {"weight_map": {"w": ".."}},
}


@pytest.mark.parametrize("lie", [*INDICES, "deep nesting"])
def test_an_index_of_hugging_face(lie: str) -> None:
    Path("folder").mkdir()
    save_file(model().state_dict(), "outside.safetensors")
    text = "[" * DEEP if lie == "deep nesting" else json.dumps(INDICES[lie])
    Path("folder/model.safetensors.index.json").write_text(text)
    refused("folder", "model.safetensors.index.json")


# Checkpoints, of which an attacker can compute all hashes anew.


def trained() -> Path:
    net = model()
    made = trainer(max_steps=4, run_dir="run", checkpoint=sheer.Checkpoint(keep_last=1))
    result = made.fit(net, step, loader(), optimizer=AdamW(net.parameters(), lr=0.1))
    assert result.last is not None
    return result.last


def sealed_anew(path: Path, **changes: Any) -> None:
    """Write the manifest so that all hashes fit."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    for name, facts in manifest["files"].items():
        facts.update(size=(path / name).stat().st_size, sha256=hash_of(path / name))
    (path / MANIFEST).write_text(sealed({**manifest, **changes}))


def refused_by_both(path: Path, named: str, *, weights_too: bool = True) -> None:
    """Neither weights nor a run are loaded from it."""
    if weights_too:
        refused(path, named)
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RunError) as error:
        trainer(max_steps=8, run_dir="other", checkpoint=False, resume=str(path)).fit(
            net, step, loader(), optimizer=AdamW(net.parameters(), lr=0.1)
        )
    assert named in str(error.value)
    assert_same(net.state_dict(), before)


def test_an_honest_checkpoint_that_was_sealed_anew_is_read() -> None:
    path = trained()
    sealed_anew(path)
    sheer.load_weights(model(), path)


ESCAPES = ["../../outside.safetensors", "/etc/passwd", "..", "", ".", "a/../model.safetensors", "./model.safetensors"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_manifest_that_names_files_elsewhere(name: str) -> None:
    path = trained()
    outside = (path / name).resolve()
    if name.startswith("../.."):
        save_file(model().state_dict(), outside)
    files = json.loads((path / MANIFEST).read_text())["files"]
    facts = {"size": outside.stat().st_size if outside.is_file() else 1, "sha256": "0"}
    if outside.is_file():
        facts["sha256"] = hash_of(outside)
    sealed_anew(path, files={**files, name: facts})
    refused_by_both(path, MANIFEST)


MANIFESTS: dict[str, dict[str, Any]] = {
    "no rank that leads": {"leads": []},
    "a rank that leads and is none": {"leads": [9]},
    "ranks in words": {"world_size": "two"},
    "files in a list": {"files": ["model.safetensors"]},
    "a size in words": {"files": {"model.safetensors": {"size": "1", "sha256": "0"}}},
    "a file of no hash": {"files": {"model.safetensors": {"size": 1}}},
    "no files": {"files": {}},
    "a step in words": {"step": "4"},
    "settings in a list": {"settings": []},
    "metrics in a list": {"metrics": [1]},
    "a run of no name": {"run_id": None},
}


@pytest.mark.parametrize("lie", MANIFESTS)
def test_a_manifest_of_other_entries(lie: str) -> None:
    path = trained()
    sealed_anew(path, **MANIFESTS[lie])
    refused_by_both(path, str(path.name))


@pytest.mark.parametrize(
    "text",
    ["[" * DEEP, '{"a":' * DEEP, "9" * 10_000, '{"format": %s}' % ("9" * 10_000), "\x00", "null", '{"format": 2}'],
)
def test_a_manifest_that_is_a_bomb(text: str) -> None:
    path = trained()
    (path / MANIFEST).write_text(text)
    refused_by_both(path, MANIFEST)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "pickle"])
def test_files_that_are_none(file: str, kind: str) -> None:
    path = trained()
    content = (path / file).read_bytes()
    (path / file).unlink()
    if kind == "link":
        Path("elsewhere").write_bytes(content)
        (path / file).symlink_to(Path("elsewhere").resolve())
    elif kind == "pipe":
        os.mkfifo(path / file)
    elif kind == "folder":
        (path / file).mkdir()
    else:
        (path / file).write_bytes(pickle.dumps(PAYLOADS[0]))
        sealed_anew(path)
    refused_by_both(path, file)


TAGS = [
    {"$dtype": "load"}, {"$dtype": "hub"}, {"$dtype": "__import__"}, {"$dtype": ["float32"]}, {"$device": "nowhere:x"}, {"$device": 3},
    {"$tensor": "nothing"}, {"$tensor": {"a": 1}}, {"$float": "one"}, {"$float": [1]}, {"$bytes": "é"}, {"$bytes": 3}, {"$dict": 3}, {"$dict": [[1]]},
    {"$dict": [[{"a": 1}, 2]]}, {"$set": [[1]]}, {"$set": 3}, {"$tuple": 3},
]  # fmt: skip


@pytest.mark.parametrize("tag", TAGS, ids=str)
@pytest.mark.parametrize("place", ["callbacks", "extra", "optimizers", "random"])
def test_marks_of_the_codec(tag: Any, place: str) -> None:
    path = trained()
    state = json.loads((path / "state.json").read_text())
    state[place]["x"] = tag
    (path / "state.json").write_text(json.dumps(state))
    sealed_anew(path)
    refused_by_both(path, "state.json")


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda state: [],
    "nothing": lambda state: {},
    "no progress": lambda state: {k: v for k, v in state.items() if k != "progress"},
    "progress in a list": lambda state: {**state, "progress": []},
    "no random numbers": lambda state: {**state, "random": 3},
    "a role that is a number": lambda state: {**state, "role": 3},
    "optimizers without groups": lambda state: {**state, "optimizers": {"optimizer": {"state": {}}}},
    "optimizers in a list": lambda state: {**state, "optimizers": {"optimizer": []}},
    "groups of numbers": lambda state: {**state, "optimizers": {"optimizer": {"state": {}, "groups": [1]}}},
    "states of numbers": lambda state: {**state, "optimizers": {"optimizer": {"state": {"a": 1}, "groups": []}}},
}


@pytest.mark.parametrize("lie", [*STATES, "deep nesting", "a long number"])
def test_states_of_another_form(lie: str) -> None:
    path = trained()
    texts = {"deep nesting": '{"callbacks":' + "[" * DEEP, "a long number": '{"a": ' + "9" * 10_000 + "}"}
    if lie in STATES:
        text = json.dumps(STATES[lie](json.loads((path / "state.json").read_text())))
    else:
        text = texts[lie]
    (path / "state.json").write_text(text)
    sealed_anew(path)
    refused_by_both(path, "state.json")


def test_parts_that_overlap_leave_no_memory_unwritten() -> None:
    path = trained()
    (path / "model.safetensors").unlink()
    state, files = model().state_dict(), {}
    wide = state.pop("0.weight")
    for number, (own, begin) in enumerate([(wide[:8], 0), (wide[:8], 4)]):
        name = f"model-{number:05d}-of-00002.safetensors"
        parts = {"parts": json.dumps({"0.weight": [[begin, 0], [16, 6]]})}
        save_file({**(state if number == 0 else {}), "0.weight": own.clone()}, path / name, parts)
        files[name] = {}
    before = json.loads((path / MANIFEST).read_text())["files"]
    del before["model.safetensors"]
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "files": {**before, **files}}))
    sealed_anew(path)
    refused_by_both(path, "step-00000004 has 96 of the 96 numbers wanted of '0.weight', or some twice")


def test_a_tensor_of_the_optimizer_that_is_not_that_of_its_weight() -> None:
    path = trained()
    file = path / "optimizer.safetensors"
    tensors = load_file(file)
    del tensors["optimizer/state/0.weight/exp_avg"]
    save_file(tensors, file)
    sealed_anew(path)
    refused_by_both(path, "state.json")
