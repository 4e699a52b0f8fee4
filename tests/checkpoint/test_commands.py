"""`sheer checkpoint`: what it says of checkpoints that are whole, cut off, damaged, of other runs, and of several ranks; what it deletes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch.optim import AdamW
from typer.testing import CliRunner, Result

import sheer
from sheer.checkpoint import commands
from sheer.checkpoint.commands import bars
from sheer.checkpoint.disk import Disk
from sheer.checkpoint.read import stored_in
from sheer.checkpoint.store import MANIFEST, read_manifest, verify
from sheer.cli import app
from tests.checkpoint.parts import weights, write_parts
from tests.task import loader, model, step, trainer

FOLDER = Path("run/checkpoints")


def trained(run_dir: str = "run", **settings: Any) -> None:
    net = model()
    given = {"checkpoint": sheer.Checkpoint(every_n_steps=2, keep_last=9), "max_epochs": 1, "monitor": "val/loss"}
    trainer(run_dir=run_dir, **(given | settings)).fit(
        net, step, loader(), loader(), optimizer=AdamW(net.parameters(), lr=0.1)
    )


def sheer_checkpoint(*words: Any) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, words)], env={"COLUMNS": "40"})


def damage(file: Path, place: int = -3) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def cut_off(name: str) -> Path:
    folder = FOLDER / name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"halved")
    return folder


def lines_of(result: Result) -> dict[str, str]:
    return {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}


@pytest.mark.parametrize("run", ["run", FOLDER])
def test_ls(run: str | Path) -> None:
    trained()
    cut_off("step-00000008")
    with (FOLDER / "step-00000002" / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    damage(FOLDER / "step-00000004" / MANIFEST)
    done = sheer_checkpoint("ls", run)
    lines = lines_of(done)
    assert done.exit_code == 0
    assert "damaged: model.safetensors missing or of another size" in lines["step-00000002"]
    assert "manifest.json is damaged" in lines["step-00000004"]
    assert "val/loss" not in lines["step-00000006"] and "damaged" not in lines["step-00000006"]
    assert "val/loss 2." in lines["step-00000007"] and "last, best" in lines["step-00000007"]
    assert "its save was cut off" in lines["step-00000008"] and " 6 bytes" in lines["step-00000008"]


def test_no_line_is_broken_where_no_terminal_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "a-run-with-a-name-that-is-longer-than-a-line-of-a-terminal-and-so-would-be-broken"
    trained(long)
    trained("other", max_epochs=2)
    shown, listed, compared = (sheer_checkpoint(*words).stdout for words in (("show", long), ("ls", long), ("diff", long, "other", "--most", 99)))  # fmt: skip
    manifest = read_manifest(Path(long, "checkpoints", "step-00000007"))
    first = shown.splitlines()[0]
    assert first.startswith(f"{Path.cwd() / long}/checkpoints/step-00000007 · ") and first.endswith(manifest["run_id"])
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == ["checkpoint", "step-00000002", "step-00000004", "step-00000006", "step-00000007"]
    assert "model: 0.weight" in compared and "optimizer: optimizer/state/0.weight/exp_avg_sq " in compared
    assert max(map(len, (first + listed + compared).splitlines())) < 1000, (
        "no line is filled up to a width that nobody has"
    )
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert commands.shown_on().width == 60


def test_verify_names_each_file_that_is_damaged() -> None:
    trained()
    done = sheer_checkpoint("verify", "run")
    assert done.exit_code == 0 and done.stdout.count(": whole") == 4
    damage(FOLDER / "step-00000004" / "model.safetensors")
    (FOLDER / "step-00000004" / "state.json").unlink()
    done = sheer_checkpoint("verify", FOLDER)
    assert done.exit_code == 1 and done.stdout.count(": whole") == 3
    assert "step-00000004/model.safetensors is damaged" in done.stdout
    assert "step-00000004/state.json is missing" in done.stdout
    assert sheer_checkpoint("verify", FOLDER / "step-00000004").exit_code == 1
    assert sheer_checkpoint("verify", FOLDER / "step-00000006").stdout.endswith("step-00000006: whole\n")


@pytest.mark.parametrize("command", ["ls", "verify", "show"])
def test_where_there_is_no_checkpoint(command: str) -> None:
    Path("empty").mkdir()
    done = sheer_checkpoint(command, "empty")
    assert (
        done.exit_code == 2 and "empty holds no checkpoint" in done.stderr and "Give a run's directory" in done.stderr
    )


def test_show() -> None:
    trained()
    done = sheer_checkpoint("show", "run")
    for words in ("step 7", "1 rank ·", "weight: float32 [16, 6]", "num_batches_tracked: int64 []", "exp_avg_sq: float32 [1, 16]",
                  "class: 'AdamW'", "epoch: 1", "random", "torch: uint8 [", "and 621 more", "val/loss 2."):  # fmt: skip
        assert words in done.stdout, words
    shallow = sheer_checkpoint("show", "--depth", 1, FOLDER / "step-00000002")
    assert "step 2" in shallow.stdout and "weight:" not in shallow.stdout


def test_show_of_several_ranks_shows_whole_tensors() -> None:
    done = sheer_checkpoint("show", write_parts(FOLDER))
    for words in ("2 ranks", "weight: float32 [4, 3] in 2 parts", "bias: float32 []", "narrow: bfloat16 [2]", "rank 1"):
        assert words in done.stdout, words


def test_diff_of_the_same_training() -> None:
    trained("a")
    trained("b")
    done = sheer_checkpoint("diff", "a", "b")
    assert done.exit_code == 0 and "the same, bit for bit" in done.stdout, done.stdout


def test_diff_names_the_largest_differences_first() -> None:
    given = weights()
    one = write_parts(FOLDER / "a", given=given)
    changed = {**given, "wide.weight": given["wide.weight"].clone(), "bias": torch.tensor(2.5), "more": torch.ones(2)}
    changed["wide.weight"][3, 1] += 5.0
    del changed["narrow"]
    other = write_parts(FOLDER / "b", given=changed, progress={"step": 4, "seconds": 9.0, "epoch": 2})
    done = sheer_checkpoint("diff", one, other)
    lines = [line.split() for line in done.stdout.splitlines()]
    tensors = [words for words in lines if words[:1] == ["model:"]]
    assert done.exit_code == 1 and "4 tensors differ" in done.stdout
    assert [words[1] for words in tensors] == ["wide.weight", "bias", "more", "narrow"]
    assert [float(number) for number in tensors[0][2:4]] == [5.0, pytest.approx(5.0 / 11.0, abs=1e-3)]
    assert [float(number) for number in tensors[1][2:4]] == [0.5, 0.25]
    assert tensors[2][-3:] == ["only", "in", "B"] and tensors[3][-3:] == ["only", "in", "A"]
    assert "1 numbers of the state differ" in done.stdout and "progress/epoch: not there in A, 2 in B" in done.stdout


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (torch.tensor([1.0, float("nan")]), "inf"),
        (torch.tensor([1.0, -0.0]), "0"),
        (torch.tensor([1, 0]), "float32 [2] in A, int64 [2] in B"),
        (torch.tensor([1.0, 0.0, 0.0]), "float32 [2] in A, float32 [3] in B"),
    ],
)
def test_diff_sees_every_bit(other: torch.Tensor, said: str) -> None:
    one = write_parts(FOLDER / "a", given={**weights(), "w": torch.tensor([1.0, 0.0])})
    two = write_parts(FOLDER / "b", given={**weights(), "w": other})
    done = sheer_checkpoint("diff", one, two)
    assert done.exit_code == 1 and said in next(line for line in done.stdout.splitlines() if "model: w" in line)


def test_diff_refuses_what_is_damaged() -> None:
    one, other = write_parts(FOLDER / "a"), write_parts(FOLDER / "b")
    damage(other / "model-00001-of-00002.safetensors")
    done = sheer_checkpoint("diff", one, other)
    assert done.exit_code == 2 and "model-00001-of-00002.safetensors is damaged" in done.stderr


def test_export_writes_whole_weights_that_anything_reads() -> None:
    path = write_parts(FOLDER)
    done = sheer_checkpoint("export", path, "-o", "out.safetensors")
    assert done.exit_code == 0, done.output
    read, given = load_file("out.safetensors"), weights()
    assert read.keys() == given.keys()
    for name, value in given.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype
    assert [file.name for file in Path().glob("*out*")] == ["out.safetensors"]


def test_export_reads_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trained()
    asked: list[str] = []
    get = sheer.checkpoint.read.Stored.__getitem__

    def noted(self: Any, name: str) -> torch.Tensor:
        asked.append(name)
        assert Path(".out.tmp").exists(), "what was read before is written"
        return get(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(sheer.checkpoint.read.Stored, "__getitem__", noted)
        assert sheer_checkpoint("export", "run", "-o", "out").exit_code == 0
    given = load_file(FOLDER / "last" / "model.safetensors")
    assert sorted(asked) == sorted(given) and all(torch.equal(load_file("out")[n], given[n]) for n in given)


def test_export_writes_over_nothing_and_leaves_nothing_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parts(FOLDER)
    Path("out").write_text("mine")
    done = sheer_checkpoint("export", path, "-o", "out")
    assert done.exit_code == 2 and "out is there already" in done.stderr and Path("out").read_text() == "mine"
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        done = sheer_checkpoint("export", path, "-o", "out", "--force")
    assert done.exit_code == 2 and "No space left" in done.stderr and Path("out").read_text() == "mine"
    assert not Path(".out.tmp").exists()
    assert sheer_checkpoint("export", path, "-o", "out", "--force").exit_code == 0 and len(load_file("out")) == 3


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_export_writes_no_safetensors_under_the_suffix_of_others() -> None:
    trained()
    done = sheer_checkpoint("export", "run", "-o", "w.pt")
    assert done.exit_code == 2 and "Give w.safetensors, or a name without suffix" in done.stderr
    assert not Path("w.pt").exists()


def test_export_of_the_weights_that_are_trained() -> None:
    trained(callbacks=[sheer.EMA(0.9)])
    for words, file in ((["-o", "averages"], "model"), (["-o", "trained", "--trained"], "training")):
        assert sheer_checkpoint("export", "run", *words).exit_code == 0
        given = load_file(FOLDER / "last" / f"{file}.safetensors")
        assert all(torch.equal(load_file(words[1])[name], value) for name, value in given.items())


def names() -> list[str]:
    return Disk(FOLDER).names()


def test_prune_says_first_and_then_deletes() -> None:
    trained()
    cut_off("step-00000008")
    shutil.copytree(FOLDER / "step-00000007", FOLDER / "step-00000005", symlinks=True)
    manifest = read_manifest(FOLDER / "step-00000007")
    write_as(FOLDER / "step-00000005", {**manifest, "run_id": "another", "step": 5})
    before = names()
    done = sheer_checkpoint("prune", "run", "--keep-last", 2, "--dry-run")
    assert done.exit_code == 0 and names() == before
    assert "step-00000008: would be deleted (its save was cut off)" in done.stdout
    assert "step-00000002: would be deleted\n" in done.stdout and "step-00000005" not in done.stdout
    done = sheer_checkpoint("prune", "run", "--keep-last", 2)
    assert names() == ["step-00000005", "step-00000006", "step-00000007"], done.output
    assert sheer_checkpoint("prune", FOLDER, "--keep-last", 1).exit_code == 0
    assert names() == ["step-00000005", "step-00000007"]
    assert {(FOLDER / link).resolve().name for link in ("last", "best")} == {"step-00000007"}


def write_as(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(sheer.checkpoint.store.sealed(manifest))


def test_prune_keeps_the_best_and_leaves_no_link_that_points_nowhere() -> None:
    trained(validate_every_n_steps=2)
    for number, path in enumerate(sorted(FOLDER.glob("step-*"))):
        write_as(path, {**read_manifest(path), "metrics": {"val/loss": float(number)}})
    (FOLDER / "best").unlink()
    (FOLDER / "best").symlink_to("step-00000002")
    assert sheer_checkpoint("prune", "run", "--keep-last", 1).exit_code == 0
    assert names() == ["step-00000002", "step-00000007"] and (FOLDER / "best").resolve().name == "step-00000002"
    assert sheer_checkpoint("prune", "run", "--keep-last", 1, "--keep-best", 0).exit_code == 0
    assert names() == ["step-00000007"] and not (FOLDER / "best").is_symlink() and (FOLDER / "last").exists()


def test_prune_keeps_steps_and_other_bests() -> None:
    trained()
    for number, path in enumerate(sorted(FOLDER.glob("step-*"))):
        write_as(path, {**read_manifest(path), "metrics": {"mine": float(number)}})
    words = ["--keep-last", 1, "--keep-every-n-steps", 4, "--monitor", "mine", "--mode", "max"]
    assert sheer_checkpoint("prune", "run", *words).exit_code == 0
    assert names() == ["step-00000004", "step-00000007"] and (FOLDER / "best").resolve().name == "step-00000007"


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_prune_refuses_a_metric_that_no_checkpoint_has(more: list[str]) -> None:
    trained(validate_every_n_steps=2)
    before = names()
    done = sheer_checkpoint("prune", "run", "--keep-last", 1, "--monitor", "val/X", *more)
    assert done.exit_code == 2 and names() == before
    assert "has a metric 'val/X'" in done.stderr and "There are val/" in done.stderr
    done = sheer_checkpoint("prune", "run", "--keep-last", 1, "--mode", "MAX", *more)
    assert done.exit_code == 2 and names() == before and '"min" or "max", not \'MAX\'' in done.stderr


def test_prune_does_not_count_what_is_damaged() -> None:
    trained()
    damage(FOLDER / "step-00000007" / "model.safetensors")
    done = sheer_checkpoint("prune", "run", "--keep-last", 1, "--keep-best", 0)
    assert done.exit_code == 0 and "step-00000007: damaged, left as it is" in done.stdout
    assert names() == ["step-00000006", "step-00000007"] and verify(FOLDER / "last")["step"] == 6


def test_prune_refuses_a_run_that_is_training_and_a_folder_of_several() -> None:
    net = model()
    run = trainer(run_dir="run", max_steps=2, checkpoint=True).start(net, optimizers={"a": AdamW(net.parameters())})
    write_parts(FOLDER)
    done = sheer_checkpoint("prune", "run", "--keep-last", 1)
    assert done.exit_code == 2 and "Another process is training in run" in done.stderr
    run.finish()
    write_parts(Path("mixed"), 1, "a")
    write_parts(Path("mixed"), 2, "b")
    done = sheer_checkpoint("prune", "mixed", "--keep-last", 1)
    assert done.exit_code == 2 and "of the runs a, b" in done.stderr and len(Disk(Path("mixed")).names()) == 2


def test_what_a_save_writes_is_json_that_other_tools_read() -> None:
    path = write_parts(FOLDER)
    assert json.loads((path / MANIFEST).read_text())["step"] == 4
    assert stored_in(path, read_manifest(path), "model")["wide.weight"].tolist() == weights()["wide.weight"].tolist()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("verify", FOLDER / "step-00000004"), 0),
        (("diff", FOLDER / "step-00000002", FOLDER / "step-00000004"), 1),  # they differ
        (("export", "run", "-o", "out.safetensors"), 0),
    ],
)
def test_a_bar_moves_with_what_is_read_where_somebody_sees_it(
    words: tuple[Any, ...], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    moved: list[float] = []
    advance = Progress.advance

    def noted(bar: Progress, task: Any, by: float = 1) -> None:
        moved.append(by)
        advance(bar, task, by)

    monkeypatch.setattr(Progress, "advance", noted)
    assert sheer_checkpoint(*words).exit_code == status
    size = sum(facts["size"] for facts in read_manifest(FOLDER / "step-00000004")["files"].values())
    assert sum(moved) >= (size if words[0] == "verify" else 1)
    assert bars().disable
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert not bars().disable
