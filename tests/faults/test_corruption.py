"""Every damage to a checkpoint is found before a tensor of it reaches a model, its file is named, and the run goes on from the one before it.

The damage is drawn with seeds; a failure names the case.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import sheer
from sheer.checkpoint.disk import Disk
from sheer.checkpoint.store import MANIFEST, verify
from sheer.errors import RunError, SheerWarning
from sheer.resume import newest_good
from sheer.rundir import read_record
from tests.faults.runs import room
from tests.mistakes.test_full_disks import full_disk
from tests.ranks import run_on_ranks
from tests.task import assert_same, loader, model, step, trainer

pytestmark = pytest.mark.xdist_group("corruption")

NEWEST, BEFORE = "step-00000006", "step-00000004"


def train(folder: str, parallel: Any = "auto", steps: int = 6, callbacks: Any = (), **how: Any) -> dict[str, Any]:
    """Train, or go on, in a folder; return the weights."""
    sheer.seed_everything(0)
    net = model()
    saves = sheer.Checkpoint(every_n_steps=2, keep_last=3, asynchronous=False)
    made = trainer(
        run_dir=folder, resume="auto", checkpoint=saves, max_steps=steps, parallel=parallel, log_every_n_steps=2,
        callbacks=[sheer.EMA(decay=0.9), *callbacks], loggers=[sheer.Console(live=False)], **how,
    )  # fmt: skip
    made.fit(net, step, loader(), optimizer=AdamW(net.parameters(), lr=1e-2))
    return {name: value.detach() for name, value in net.state_dict().items()}


def train_on_a_rank(folder: str) -> None:
    train(folder, parallel="fsdp")


@pytest.fixture(scope="module")
def runs() -> Iterator[Path]:
    """Two runs with three checkpoints each: of one process, and of two ranks of which each has its part of the tensors."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(dir=room())))
    train(str(folder / "one"))
    run_on_ranks(2, train_on_a_rank, str(folder / "two"))
    yield folder
    shutil.rmtree(folder)


Damage = Callable[[Path, random.Random], None]


def cut_off(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip_a_bit(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def leave_a_hole(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    written = [at for at, byte in enumerate(content) if byte]  # there may be zeros already
    begin = draw.choice(written)
    end = min(len(content), begin + draw.choice([1, 16, 512, 4096]))
    content[begin:end] = bytes(end - begin)
    file.write_bytes(content)


def add_bytes(file: Path, draw: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(draw.randbytes(draw.randrange(1, 100)))


def lose(file: Path, draw: random.Random) -> None:
    file.unlink()


def swap(file: Path, draw: random.Random) -> None:
    other = draw.choice([path for path in sorted(file.parent.iterdir()) if path != file and path.name != MANIFEST])
    aside = file.with_name("aside")
    file.rename(aside)
    other.rename(file)
    aside.rename(other)


def put_that_of_another_step(file: Path, draw: random.Random) -> None:
    shutil.copy(file.parent.parent / BEFORE / file.name, file)


def put_a_folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: tuple[tuple[Damage, int], ...] = (  # and how often to each file of both runs
    (cut_off, 6), (flip_a_bit, 10), (leave_a_hole, 5), (add_bytes, 3), (lose, 1), (swap, 3),
    (put_that_of_another_step, 1), (put_a_folder, 1),
)  # fmt: skip


def is_unchanged_by(damage: Damage, path: Path, name: str) -> bool:
    """Whether the same file was written at the step before, so that there is nothing to find."""
    return (
        damage is put_that_of_another_step and (path / name).read_bytes() == (path.parent / BEFORE / name).read_bytes()
    )


def test_damage_of_every_file(runs: Path) -> None:
    net, cases = model(), 0
    untouched = {name: value.clone() for name, value in net.state_dict().items()}
    for kind in ("one", "two"):
        names = sorted(path.name for path in (runs / kind / "checkpoints" / NEWEST).iterdir())
        names = [name for name in names if not name.startswith("rank-")]  # what the ranks told rank 0 is not read again
        assert len(names) >= (6 if kind == "one" else 9) and MANIFEST in names
        for name in names:
            for damage, times in DAMAGES:
                for number in range(times):
                    cases += check(runs / kind, name, damage, number, net)
    assert_same(net.state_dict(), untouched)
    print(f"{cases} cases of damage, each found")
    assert cases >= 500


def check(run: Path, name: str, damage: Damage, number: int, net: nn.Module) -> int:
    """Do one damage, and see that it is found and named, and that the checkpoint before is taken."""
    case = f"{damage.__name__} {name} {number} of run {run.name}"
    copy = run.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy, symlinks=True)
    path = copy / "checkpoints" / NEWEST
    if is_unchanged_by(damage, path, name):
        return 0
    damage(path / name, random.Random(case))
    # Without a manifest it is no checkpoint, which is what is said; of two files that are swapped either is named.
    named = NEWEST if name == MANIFEST or damage is swap else name
    for look in (lambda: verify(path), lambda: sheer.load_weights(net, copy, which="last")):
        with pytest.raises(RunError) as error:
            look()
        assert named in str(error.value), f"{case}: {error.value}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        good, any_there = newest_good(Disk(path.parent), None)
    assert any_there and good is not None and good.name == BEFORE, f"{case}: {good}"
    if name != MANIFEST or (path / MANIFEST).is_file():  # without one the save was cut off, which is no damage
        assert any(named in str(one.message) for one in said), f"{case}: {[str(one.message) for one in said]}"
    return 1


def test_checkpoints_that_are_another_ones(runs: Path) -> None:
    """Whole, each of its files as its manifest says, and yet not what its name says; or a manifest over other files."""
    copy = runs / "copy"
    for number in range(6):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(runs / "one", copy, symlinks=True)
        path, before = copy / "checkpoints" / NEWEST, copy / "checkpoints" / BEFORE
        if number == 0:  # a folder that was renamed
            shutil.rmtree(path)
            shutil.copytree(before, path)
        elif number == 1:  # the manifest of another step
            shutil.copy(before / MANIFEST, path / MANIFEST)
        else:  # new data over an old checkpoint, its own manifest missing, as after a save in place that was cut off
            others = [file for file in sorted(before.iterdir()) if file.name != MANIFEST]
            for file in [o for o in others if o.read_bytes() != (path / o.name).read_bytes()][: number - 1]:
                shutil.copy(file, path / file.name)
        with pytest.raises(RunError, match=NEWEST):
            verify(path)
        with pytest.warns(SheerWarning, match=NEWEST):
            assert newest_good(Disk(path.parent), None)[0] == before


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, leave_a_hole, lose, swap, put_that_of_another_step])
def test_a_run_goes_on_from_the_one_before_and_ends_as_if_nothing_had_been(damage: Damage, runs: Path) -> None:
    whole = train("whole", steps=9)
    for number, name in enumerate(
        ("model.safetensors", "training.safetensors", "optimizer.safetensors", "state.json", MANIFEST)
    ):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(runs / "one", "run", symlinks=True)
        if damage is swap and name == MANIFEST:
            continue
        damage(Path("run/checkpoints", NEWEST, name), random.Random(number))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SheerWarning)
            assert_same(train("run", steps=9), whole)
        lines = [line.split('"time"')[0] for line in Path("run/metrics.jsonl").read_text().splitlines()]
        assert lines == [line.split('"time"')[0] for line in Path("whole/metrics.jsonl").read_text().splitlines()]


def test_links_that_are_lost_or_point_elsewhere(runs: Path) -> None:
    """A run that goes on does not look at them, and puts them right."""
    whole = train("whole", steps=9)
    for number in range(4):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(runs / "one", "run", symlinks=True)
        last = Path("run/checkpoints/last")
        last.unlink()
        if number == 1:
            last.symlink_to("step-00000002")
        elif number == 2:
            last.symlink_to("step-99999999")
        elif number == 3:
            last.write_text("no link")
        assert_same(train("run", steps=9), whole)
        assert last.is_symlink() and last.readlink().name == "step-00000009"


def test_a_run_json_with_a_flipped_bit(runs: Path) -> None:
    """Whatever the bit says: the id by which checkpoints are known as this run's, a setting, a hyper-parameter."""
    shutil.copytree(runs / "one", "run", symlinks=True)
    for number in range(60):
        shutil.copy(runs / "one" / "run.json", "run/run.json")
        flip_a_bit(Path("run/run.json"), random.Random(number))
        with pytest.raises(RunError, match=r"run\.json is damaged"):
            train("run", steps=9) if number < 3 else read_record(Path("run/run.json"))


# ------------------------------------------------------------------------------------------------ disks


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """A file system of its own, of which what is yielded changes options; skips where none may be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only; tests/mistakes/test_full_disks.py fills others")
    try:
        yield lambda options: _remount(folder, options)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


class Until:
    """Does something to the disk at the start of a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_step_start(self, step: int, model: nn.Module, batch: Any) -> None:
        if step == self.step:
            self.action()


def used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_disk_that_runs_full_in_a_save_at_any_file_of_it(tmp_path: Path) -> None:
    whole = train("whole", steps=9)
    with small_disk(tmp_path / "disk") as change:
        run = tmp_path / "disk" / "run"
        for pages in range(1, 9):  # of 4 KiB that are left: from none for the first file to all but one of them
            shutil.rmtree(run, ignore_errors=True)
            change("size=4m")
            fill = Until(5, lambda: change(f"size={used(run.parent) + 4096 * pages}"))  # noqa: B023  called at once
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SheerWarning)  # of a logger that has no room either
                with pytest.raises(
                    RunError, match=r"step 6 could not be written to .*No space left.*step-00000004"
                ) as error:
                    train(str(run), callbacks=[fill])
            assert str(run) in str(error.value)
            verify(run / "checkpoints" / BEFORE)
            change("size=4m")
            assert_same(train(str(run), steps=9), whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    whole = train("whole", steps=9)
    with small_disk(tmp_path / "disk") as change:
        run = tmp_path / "disk" / "run"
        train(str(run), steps=4)
        change("ro")
        with pytest.raises(RunError, match=r"run cannot be written: Read-only file system"):
            train(str(run), steps=9)
        change("rw")
        verify(run / "checkpoints" / BEFORE)
        assert_same(train(str(run), steps=9), whole)


def test_a_folder_that_becomes_read_only(tmp_path: Path) -> None:
    """For those who are not root; root may write everywhere, so for it the folder's place is taken by a file."""
    whole = train("whole", steps=9)
    saves, aside = Path("run/checkpoints"), Path("run/aside")

    def forbid() -> None:
        if os.geteuid():
            saves.chmod(0o500)
        else:
            saves.rename(aside)
            saves.write_text("in the way")

    with pytest.raises(
        RunError, match=r"step 6 could not be written to run/checkpoints: .*(denied|Not a directory|exists)"
    ):
        train("run", callbacks=[Until(5, forbid)])
    if os.geteuid():
        saves.chmod(0o700)
    else:
        saves.unlink()
        aside.rename(saves)
    verify(saves / BEFORE)
    assert_same(train("run", steps=9), whole)


def test_files_that_may_not_grow_at_every_size(runs: Path) -> None:
    """A disk that is full at any byte of a save: what is cut off is no checkpoint, and the one before it is good."""
    whole, failed = train("whole", steps=9), 0
    for room_left in range(64, 4096, 400):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(runs / "one", "run", symlinks=True)
        shutil.rmtree(f"run/checkpoints/{NEWEST}")
        torch.manual_seed(0)
        limit = full_disk(room_left)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SheerWarning)
                with pytest.raises(RunError, match="step 6 could not be written"):
                    train("run", callbacks=[Until(6, limit.__enter__)])
            failed += 1
        finally:
            limit.__exit__(None, None, None)
        verify(Path("run/checkpoints", BEFORE))
        assert_same(train("run", steps=9), whole)
    assert failed == 11
