"""Saves beside training: what a step waits for, what is there afterwards, what is deleted, and how failures are told."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, AdamW

import sheer
from sheer.checkpoint import store
from sheer.checkpoint.disk import Disk
from sheer.checkpoint.read import Stored
from sheer.checkpoint.saver import Saver, Staging
from sheer.checkpoint.store import MANIFEST, Content, Retention, committed, read_manifest, verify, write_checkpoint
from sheer.errors import RunError, SheerWarning
from tests.task import loader, model, step, trainer

CPU = torch.device("cpu")


def content(step: int, value: float = 0.0, run_id: str = "r", **metrics: float) -> Content:
    tensors = {"model": {"w": torch.full((3,), value)}, "state": {}}
    facts = {"run_id": run_id, "metrics": metrics, "settings": {}}
    return Content(step, 0, 1, True, tensors, {}, True, {"state": {}}, facts)


def saver(root: Path, *, beside: bool = True, **keep: Any) -> Saver:
    return Saver(Disk(root), Retention(**keep), 0, CPU, beside=beside, timeout=5.0)


def save(own: Saver, *args: Any, **metrics: float) -> None:
    given = content(*args, **metrics)
    own.save(own.name_for(given.step), given, wait=False)


class Held:
    """Stands for the writing, which it holds up until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.write = threading.Event(), store.write_files
        monkeypatch.setattr(store, "write_files", self)

    def __call__(self, folder: Path, given: Content) -> Any:
        assert self.go.wait(20)
        return self.write(folder, given)


def test_what_is_saved_is_the_state_at_the_save_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, own = Held(monkeypatch), saver(tmp_path)
    given = content(1, 1.0)
    own.save("step-00000001", given, wait=False)
    given.tensors["model"]["w"].fill_(2.0)
    assert own.writing is not None and not own.is_written and not (tmp_path / "step-00000001" / MANIFEST).exists()
    held.go.set()
    assert own.wait() == (1, tmp_path / "step-00000001")
    assert load_file(tmp_path / "step-00000001" / "model.safetensors")["w"].tolist() == [1.0] * 3
    assert own.writing is None and own.wait() is None


def test_training_goes_on_while_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    told: list[tuple[int, str, int]] = []
    net = model()

    class Notes:
        def __init__(self) -> None:
            self.step = 0

        def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
            self.step = step
            if step == 6:  # three steps after the save of step 3
                held.go.set()

        def on_save(self, step: int, path: Path) -> None:
            told.append((step, path.name, self.step))
            verify(path)

    checkpoint = sheer.Checkpoint(every_n_steps=3, keep_last=9)
    trainer(callbacks=[Notes()], max_epochs=None, max_steps=8, checkpoint=checkpoint, run_dir="run").fit(
        net, step, loader(), optimizer=SGD(net.parameters(), lr=0.1)
    )
    steps, folders, when = zip(*told, strict=True)
    assert steps == (3, 6, 8) and folders == ("step-00000003", "step-00000006", "step-00000008")
    assert 6 <= when[0] <= 7 and when[2] == 8


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_saved_beside_training_equals_one_that_waits(asynchronous: bool, tmp_path: Path) -> None:
    net = model()
    checkpoint = sheer.Checkpoint(every_n_steps=2, keep_last=20, asynchronous=asynchronous)
    trainer(max_epochs=1, checkpoint=checkpoint, run_dir="run").fit(
        net, step, loader(), optimizer=AdamW(net.parameters(), lr=0.1)
    )
    paths = [saved.path for saved in committed(Disk(Path("run/checkpoints")))]
    assert [path.name for path in paths] == [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    shutil.rmtree("plain", ignore_errors=True)
    sheer.seed_everything(0)
    for path in paths:
        assert len(load_file(path / "optimizer.safetensors")) == 3 * len(list(net.parameters()))
        verify(path)


def test_the_same_memory_is_used_for_every_save() -> None:
    staging, tensor = Staging(CPU), torch.ones(4)
    staging.make({"model": {"w": tensor}})
    first, _ = staging.copy({"model": {"w": tensor}})
    place = first["model"]["w"].data_ptr()
    second, event = staging.copy({"model": {"w": tensor * 2}})
    assert second["model"]["w"].data_ptr() == place and second["model"]["w"].tolist() == [2.0] * 4 and event is None
    grown, _ = staging.copy({"model": {"w": torch.ones(5)}})
    assert grown["model"]["w"].shape == (5,)


def test_failures_of_the_writer_reach_training(monkeypatch: pytest.MonkeyPatch) -> None:
    net, steps = model(), []
    write = store.write_files

    def failing(folder: Path, given: Content) -> Any:
        if given.step == 4:
            raise OSError(28, "No space left on device")
        return write(folder, given)

    monkeypatch.setattr(store, "write_files", failing)
    count = sheer.On(step_end=lambda step, model: steps.append(step))
    made = trainer(callbacks=[count], checkpoint=sheer.Checkpoint(every_n_steps=2), run_dir="run")
    with pytest.raises(RunError, match=r"step 4 could not be written.*No space left.*step-00000002"):
        made.fit(net, step, loader(), optimizer=SGD(net.parameters(), lr=0.1))
    assert steps[-1] <= 6, "at the next save at the latest"
    assert [saved.step for saved in committed(Disk(Path("run/checkpoints")))] == [2]
    assert not Path("run/checkpoints/step-00000004").exists(), "what a full disk has no room for"


def test_an_error_in_training_waits_for_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    held, net = Held(monkeypatch), model()

    def fails(net: nn.Module, batch: Any, step: int) -> Any:
        if step == 4:
            threading.Timer(0.2, held.go.set).start()
            raise ValueError("my own")
        x, y = batch
        return ((net(x) - y) ** 2).mean()

    made = trainer(checkpoint=sheer.Checkpoint(every_n_steps=3), run_dir="run")
    with pytest.raises(ValueError, match="my own"):
        made.fit(net, fails, loader(), optimizer=SGD(net.parameters(), lr=0.1))
    assert [saved.step for saved in committed(Disk(Path("run/checkpoints")))] == [3]


def test_what_stays(tmp_path: Path) -> None:
    own = saver(tmp_path, last=2, best=2, every=10, monitor="loss")
    for number, loss in enumerate([5.0, 3.0, 9.0, 3.0, 2.0, 8.0], start=1):
        save(own, number * 5, loss=loss)
        own.wait()
        names = [saved.path.name for saved in own.saves]
        assert names == own.disk.names() == [saved.path.name for saved in own.expected]
    assert own.disk.names() == [f"step-{step:08d}" for step in (10, 20, 25, 30)]
    assert (tmp_path / "last").readlink() == Path("step-00000030")
    assert (tmp_path / "best").readlink() == Path("step-00000025")


def test_of_one_step_the_newest_save_stays(tmp_path: Path) -> None:
    own = saver(tmp_path, last=3)
    for value in (1.0, 2.0, 3.0):
        save(own, 4, value)
        own.wait()
    assert own.disk.names() == ["step-00000004-3"]
    assert Stored([tmp_path / "last" / "model.safetensors"])["w"].tolist() == [3.0] * 3


def test_nothing_is_deleted_before_what_replaces_it_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = saver(tmp_path, last=1)
    save(own, 1)
    own.wait()
    held = Held(monkeypatch)
    save(own, 2)
    assert own.disk.names()[0] == "step-00000001" and verify(tmp_path / "step-00000001")
    held.go.set()
    own.wait()
    assert own.disk.names() == ["step-00000002"]


def test_rests_and_what_was_found_damaged_go_with_the_next_save_and_what_is_of_others_stays(tmp_path: Path) -> None:
    def put(step: int, run_id: str) -> Path:
        disk = Disk(tmp_path)
        saved = write_checkpoint(disk, disk.unused(step), content(step, run_id=run_id), 0.0, threading.Event())
        assert saved is not None
        return saved.path

    good, later, other = put(10, "mine"), put(20, "mine"), put(15, "another's")
    cut = tmp_path / "step-00000030"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(b"whole")
    (cut / ".tmpKGLgwg").write_bytes(b"half")  # as safetensors 0.8 names it; found where a run was killed in its midst
    notes = tmp_path / "step-00000040"
    notes.mkdir()
    (notes / "notes.txt").write_text("a user's")
    own = saver(tmp_path, last=1)
    own.open("mine", 10)
    assert [saved.path for saved in own.saves] == [good]
    assert all(path.exists() for path in (good, later, other, cut, notes)), "nothing goes before a save"
    save(own, 12, run_id="mine")
    own.wait()
    assert own.disk.names() == ["step-00000012", other.name, notes.name]


def test_a_manifest_names_other_damage_than_that_of_files(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    write_checkpoint(disk, "step-00000001", content(1, loss=0.5), 0.0, threading.Event())
    path = tmp_path / "step-00000001"
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"loss": 0.5', '"loss": 0.4'))
    with pytest.raises(RunError, match=r"manifest.json is damaged"):
        read_manifest(path)
    (path / MANIFEST).write_text(json.dumps({**json.loads(text), "format": 1}))
    with pytest.raises(RunError, match="in format 1; this one reads format 2"):
        read_manifest(path)
    (path / MANIFEST).write_text(text)
    path.rename(tmp_path / "step-00000002")
    with pytest.raises(RunError, match="of step 1, and its name says otherwise"):
        read_manifest(tmp_path / "step-00000002")
    with pytest.warns(SheerWarning, match="passed over"):
        assert committed(disk) == []


def test_rank_zero_names_the_rank_that_wrote_nothing(tmp_path: Path) -> None:
    alone = content(1)
    two = Content(1, 0, 2, True, alone.tensors, {}, True, alone.texts, alone.facts)
    with pytest.raises(RunError, match="Rank 1 has not written its part"):
        write_checkpoint(Disk(tmp_path), "step-00000001", two, 0.05, threading.Event())
