"""SIGKILL leaves the page cache as it is, so it cannot show a missing fsync: the order of the calls is looked at instead."""

from __future__ import annotations

import hashlib
import os
import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

import sheer
from sheer.checkpoint.disk import Disk
from sheer.checkpoint.store import MANIFEST, read_manifest, verify, write_checkpoint
from tests.checkpoint.test_saver import content
from tests.task import loader, model, step, trainer


class Trace:
    """What was synced, with a hash of what it was then, and what was renamed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Path, str]] = []
        self.sync, self.rename, self.lock = os.fsync, pathlib.Path.replace, threading.Lock()
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(pathlib.Path, "replace", lambda path, target: self._replace(path, target))

    def _fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.sync(descriptor)
        with self.lock:
            self.calls.append(("fsync", path, hash_of(path)))

    def _replace(self, path: Path, target: Path) -> Path:
        with self.lock:
            self.calls.append(("rename", Path(target).absolute(), hash_of(path)))
            return self.rename(path, target)

    def at(self, call: str, path: Path, after: int = -1) -> int:
        """Return where the first such call behind another is."""
        found = [n for n, (name, there, _) in enumerate(self.calls) if (name, there) == (call, path) and n > after]
        assert found, f"no {call} of {path} behind call {after}"
        return found[0]


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def assert_in_order(trace: Trace, folder: Path, logs: tuple[Path, ...] = ()) -> None:
    """Every file is written, then synced; then the folders are; then the manifest is written, synced, renamed; then its folder synced."""
    folder = folder.absolute()
    commit = trace.at("rename", folder / MANIFEST)
    before = trace.at("fsync", folder / f".{MANIFEST}.tmp")
    assert before < commit < trace.at("fsync", folder, commit)
    assert trace.calls[before][2] == trace.calls[commit][2] == hash_of(folder / MANIFEST)
    files = read_manifest(folder)["files"]
    assert {path.name for path in folder.iterdir() if not path.name.startswith("rank-")} == {*files, MANIFEST}
    for name, facts in files.items():
        synced = trace.at("fsync", folder / name)
        assert synced < trace.at("fsync", folder, synced) < before, name
        assert trace.calls[synced][2] == facts["sha256"] == hash_of(folder / name), f"{name} was written to afterwards"
    assert trace.at("fsync", folder.parent) < before
    for log in logs:
        assert trace.at("fsync", log.absolute()) < before and trace.at("fsync", log.absolute().parent) < before
    for told in folder.glob("rank-*.json"):
        renamed = trace.at("rename", told)
        assert trace.at("fsync", told.with_name(f".{told.name}.tmp")) < renamed < trace.at("fsync", folder, renamed)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_of_a_run_with_its_logs(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, net = Trace(monkeypatch), model()
    saves = sheer.Checkpoint(every_n_steps=3, keep_last=9, asynchronous=asynchronous)
    trainer(
        max_epochs=1, checkpoint=saves, run_dir="run", log_every_n_steps=2, callbacks=[sheer.EMA(0.9)],
        loggers=[sheer.CSV(), sheer.Console(live=False)],
    ).fit(net, step, loader(), optimizer=SGD(net.parameters(), lr=0.1, momentum=0.9))  # fmt: skip
    for at in (3, 6, 7):
        assert_in_order(
            trace, Path(f"run/checkpoints/step-{at:08d}"), (Path("run/metrics.jsonl"), Path("run/metrics.csv"))
        )
    record = trace.at("rename", Path("run/run.json").absolute())
    assert trace.at("fsync", Path("run/.run.json.tmp").absolute()) < record < trace.at("fsync", Path("run").absolute())


def test_the_logs_are_as_long_as_the_state_says_before_the_manifest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, net = Trace(monkeypatch), model()
    saves = sheer.Checkpoint(every_n_steps=2, keep_last=9, asynchronous=False)
    trainer(max_epochs=1, checkpoint=saves, run_dir="run", log_every_n_steps=1).fit(
        net, step, loader(), optimizer=SGD(net.parameters(), lr=0.1)
    )
    log = Path("run/metrics.jsonl").absolute()
    content, begin = log.read_bytes(), 0
    for at in (2, 4, 6):
        synced = trace.at("fsync", log, begin)
        lines = b"".join(content.splitlines(keepends=True)[:at])
        assert trace.calls[synced][2] == hashlib.sha256(lines).hexdigest()
        begin = trace.at("rename", Path(f"run/checkpoints/step-{at:08d}/{MANIFEST}").absolute())
        assert synced < begin


def test_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, disk = Trace(monkeypatch), Disk(Path("saves"))

    def write(rank: int) -> Any:
        alone = content(4)
        own = replace(alone, rank=rank, world_size=3, is_whole=False, tensors={"model": {f"w{rank}": torch.ones(2)}})
        return write_checkpoint(disk, "step-00000004", own, 20.0, threading.Event())

    with ThreadPoolExecutor(3) as ranks:
        saved = list(ranks.map(write, (2, 1, 0)))[-1]
    assert saved is not None and len(verify(saved.path)["files"]) == 6
    assert_in_order(trace, saved.path)
    commit = trace.at("rename", saved.path.absolute() / MANIFEST)
    for rank in (1, 2):
        told = trace.at("rename", saved.path.absolute() / f"rank-{rank:05d}.json")
        assert told < commit
        for name in (f"model-{rank:05d}-of-00003.safetensors", f"state-{rank:05d}-of-00003.json"):
            assert trace.at("fsync", saved.path.absolute() / name) < told


def test_what_is_superfluous_goes_only_when_the_links_and_the_manifest_are_on_the_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace, net = Trace(monkeypatch), model()
    trainer(max_epochs=1, checkpoint=sheer.Checkpoint(every_n_steps=3, asynchronous=False), run_dir="run").fit(
        net, step, loader(), optimizer=SGD(net.parameters(), lr=0.1)
    )
    root = Path("run/checkpoints").absolute()
    commit = trace.at("rename", root / "step-00000006" / MANIFEST)
    pointed = trace.at("rename", root / "last", commit)
    gone = trace.at("fsync", root / "step-00000003", commit)  # its manifest was taken away
    assert (
        commit < trace.at("fsync", root / "step-00000006", commit) < pointed < trace.at("fsync", root, pointed) < gone
    )
