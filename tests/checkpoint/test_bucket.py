"""Checkpoints in object stores: committed by their manifest alone, found again bit for bit, verified, and deleted after what replaces them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW
from typer.testing import CliRunner

import sheer
from sheer.checkpoint.bucket import Bucket, url_of
from sheer.checkpoint.disk import Disk
from sheer.checkpoint.store import MANIFEST, brought, committed, sealed
from sheer.cli import app
from sheer.errors import MissingPackageError, RunError, SheerWarning
from tests.checkpoint.stores import flip, objects, s3_server, system_of, url_in
from tests.ranks import run_on_ranks
from tests.task import assert_same, loader, model, step, trainer

pytestmark = pytest.mark.xdist_group("s3")
FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors"]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture(params=["memory", "local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
    return url_in(request.param, tmp_path)


@pytest.fixture
def memory(tmp_path: Path) -> str:
    return url_in("memory", tmp_path)


def train(steps: int, directory: str | None, run_dir: str = "run", **settings: Any) -> tuple[sheer.Result, nn.Module]:
    net, keep = model(), {"every_n_steps": 2, "keep_last": 2} | settings.pop("keep", {})
    settings |= {"max_steps": steps, "run_dir": run_dir, "checkpoint": sheer.Checkpoint(directory=directory, **keep)}
    made = trainer(**settings)
    val_loader = (
        loader() if settings.get("monitor") is not None else None
    )  # it draws random numbers at the end of a run
    return made.fit(net, step, loader(), val_loader, optimizer=AdamW(net.parameters(), lr=0.1)), net


@functools.cache
def straight() -> dict[str, torch.Tensor]:
    """The weights of a run of 9 steps that was not stopped."""
    return train(9, None, "not-stopped")[1].state_dict()


def tensors(disk: Bucket | Disk) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    path = brought(disk, committed(disk)[-1].path.name)
    return {f"{file.name} {name}": value.clone() for file in path.glob("*.safetensors") for name, value in load_file(file).items()}  # fmt: skip


def test_a_run_that_goes_on_from_there_is_the_one_that_was_not_stopped(url: str) -> None:
    first, _ = train(5, url)
    assert objects(url) == ["last", *(f"step-0000000{n}/{file}" for n in (4, 5) for file in FILES)]
    second, net = train(9, url, resume="auto")
    assert_same(net.state_dict(), straight())
    train(9, None, "straight")
    assert_same(tensors(Bucket(url, Path("copy"))), tensors(Disk(Path("straight/checkpoints"))))
    assert (first.step, second.step) == (5, 9)
    assert not list(Path("run/checkpoints").iterdir()), "nothing is left here of what was sent and fetched"
    assert second.last is not None and url_of(second.last) == f"{url}/step-00000009"


def test_a_run_goes_on_where_only_the_store_is_left(url: str) -> None:
    train(5, url)
    shutil.rmtree("run")
    _, net = train(9, url, resume="auto")
    assert_same(net.state_dict(), straight())


def test_another_run_begins_from_there(memory: str) -> None:
    train(5, memory)
    for number, source in enumerate([memory, f"{memory}/step-00000005", "run"]):
        _, net = train(9, None, f"other{number}", resume=source)
        assert_same(net.state_dict(), straight())
        left = [path.name for path in Path(f"other{number}/checkpoints").iterdir()]
        assert not [name for name in left if "fetched" in name]


def test_what_is_kept_and_what_is_used(url: str) -> None:
    keep = {"keep_last": 1, "keep_every_n_steps": 4}
    result, net = train(7, url, monitor="val/loss", keep=keep)
    names = Bucket(url, None).names()
    assert names == ["step-00000004", "step-00000007"] and {"last", "best"} <= set(objects(url))
    taken = model()
    for source in ("run", url, f"{url}/step-00000007", result.best):
        nn.init.zeros_(taken[0].weight)  # type: ignore[index, arg-type]
        sheer.load_weights(taken, source)  # type: ignore[arg-type]
        assert_same(taken.state_dict(), net.state_dict())
    with pytest.raises(RunError, match=r"has no 'worst' checkpoint. There are step-00000004, step-00000007"):
        sheer.load_weights(taken, url, "worst")
    found = trainer(run_dir="run").test(model(), step, loader(shuffle=False), checkpoint="best")
    assert found == trainer().test(taken, step, loader(shuffle=False))


def noted(monkeypatch: pytest.MonkeyPatch, *methods: str) -> list[tuple[Any, ...]]:
    """Note the calls of a bucket's methods."""
    calls: list[tuple[Any, ...]] = []
    for method in methods:
        real = getattr(Bucket, method)

        def call(self: Bucket, *arguments: Any, real: Any = real, method: str = method) -> Any:
            calls.append((method, *arguments))
            return real(self, *arguments)

        monkeypatch.setattr(Bucket, method, call)
    return calls


def test_the_manifest_is_sent_last_and_what_it_replaces_is_deleted_after_it(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = noted(monkeypatch, "settle", "write", "remove")
    train(4, memory, keep={"keep_last": 1})
    said = [(call[0], *call[1:3]) for call in calls]
    one, other = "step-00000002", "step-00000004"
    assert [call[:2] if call[0] == "settle" else call for call in said] == [
        ("settle", one), ("write", one, MANIFEST), ("write", "", "last"),
        ("settle", other), ("write", other, MANIFEST), ("write", "", "last"), ("remove", one, MANIFEST),
    ]  # fmt: skip


def test_what_was_cut_off_before_its_manifest_is_not_seen_and_goes_with_the_next_save(url: str) -> None:
    train(4, url)
    system, path = system_of(url)
    system.rm_file(f"{path}/step-00000004/{MANIFEST}")
    assert [saved.step for saved in committed(Bucket(url, None))] == [2]
    with pytest.raises(RunError, match=f"{url}/step-00000004 is no complete checkpoint: .* its save was cut off"):
        sheer.load_weights(model(), f"{url}/step-00000004")
    _, net = train(9, url, resume="auto")
    assert_same(net.state_dict(), straight())
    assert Bucket(url, None).names() == ["step-00000008", "step-00000009"]


def killed_at_the_manifest(environment: dict[str, str], url: str) -> None:
    os.environ.update(environment)
    write = Bucket.write

    def killing(self: Bucket, name: str, file: str, text: str) -> None:
        if name == "step-00000004" and file == MANIFEST:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, name, file, text)

    Bucket.write = killing  # type: ignore[method-assign]
    train(9, url)


def test_a_process_that_is_killed_before_it_sends_the_manifest(s3: dict[str, str], tmp_path: Path) -> None:
    url = url_in("s3", tmp_path)
    with pytest.raises(AssertionError, match="died"):
        run_on_ranks(1, killed_at_the_manifest, s3, url)
    assert f"step-00000004/{FILES[1]}" in objects(url) and f"step-00000004/{MANIFEST}" not in objects(url)
    _, net = train(9, url, resume="auto")
    assert_same(net.state_dict(), straight())
    assert Bucket(url, None).names() == ["step-00000008", "step-00000009"]


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_object_is_found_and_the_checkpoint_before_it_is_used(
    file: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    kind = "s3" if file == FILES[1] else "memory"
    if kind == "s3":
        request.getfixturevalue("s3")
    url = url_in(kind, tmp_path)
    train(4, url)
    flip(f"{url}/step-00000004/{file}")
    with pytest.warns(SheerWarning, match=f"{url}/step-00000004/{file} is damaged"):
        _, net = train(9, url, resume="auto")
    assert_same(net.state_dict(), straight())
    assert "step-00000004" not in Bucket(url, None).names()


def test_an_object_that_is_missing_or_of_another_size(url: str) -> None:
    train(4, url)
    system, path = system_of(url)
    system.rm_file(f"{path}/step-00000004/state.json")
    with pytest.raises(RunError, match=f"{url}/step-00000004/state.json is missing"):
        sheer.load_weights(model(), url, "last")
    system.pipe_file(f"{path}/step-00000004/state.json", b"{}")
    with pytest.raises(RunError, match=r"state.json has 2 bytes, and \d+ were written"):
        train(9, None, "other", resume=f"{url}/step-00000004")


def test_commands(url: str) -> None:
    train(4, url)
    other = url_in("memory", Path())
    train(4, other, "other")

    def sheer_checkpoint(*words: str) -> Any:
        return CliRunner().invoke(app, ["checkpoint", *words], env={"COLUMNS": "300"})

    for run in ("run", url):
        listed = sheer_checkpoint("ls", run)
        assert listed.exit_code == 0 and "step-00000002" in listed.stdout and " last" in listed.stdout, listed.output
    assert sheer_checkpoint("verify", url).stdout.splitlines() == [f"{url}/step-0000000{n}: whole" for n in (2, 4)]
    assert "exp_avg: float32 [16, 6]" in sheer_checkpoint("show", f"{url}/step-00000002").stdout
    assert sheer_checkpoint("diff", url, other).exit_code == 0
    assert sheer_checkpoint("export", url, "-o", "out").exit_code == 0 and "0.weight" in load_file("out")
    flip(f"{url}/step-00000002/model.safetensors")
    done = sheer_checkpoint("verify", url)
    assert done.exit_code == 1 and f"{url}/step-00000002/model.safetensors is damaged" in done.stdout
    assert sheer_checkpoint("verify", f"{url}/step-00000004").exit_code == 0
    assert sheer_checkpoint("prune", other, "--keep-last", "1").exit_code == 0
    assert Bucket(other, None).names() == ["step-00000004"]
    assert sheer_checkpoint("prune", "run", "--keep-last", "1").exit_code == 0
    assert Bucket(url, None).names() == ["step-00000004"]


def on_ranks(environment: dict[str, str], url: str) -> dict[str, torch.Tensor]:
    os.environ.update(environment)
    settings = {"parallel": "fsdp"}
    train(4, url, **settings)
    _, net = train(8, url, resume="auto", **settings)
    train(9, None, "other", resume=url, **settings)  # a run that keeps its own checkpoints here
    _, straight = train(8, None, "straight", **settings)
    whole = {name: getattr(value, "full_tensor", value.clone)() for name, value in net.state_dict().items()}
    assert_same(whole, {n: getattr(v, "full_tensor", v.clone)() for n, v in straight.state_dict().items()})
    return whole


def test_each_rank_sends_its_own_part_and_fetches_its_share(s3: dict[str, str], tmp_path: Path) -> None:
    url = url_in("s3", tmp_path)
    for found in run_on_ranks(2, on_ranks, s3, url):
        taken = model()
        sheer.load_weights(taken, url, "last")
        assert_same(taken.state_dict(), found)
    sent = [name for name in objects(url) if name.startswith("step-00000008/")]
    assert sum(name.endswith("-of-00002.safetensors") for name in sent) == 6
    assert not list(Path("run/checkpoints").iterdir()) and not list(Path("other/checkpoints").glob("fetched*"))


def test_a_directory_on_this_machine(tmp_path: Path) -> None:
    train(4, str(tmp_path / "elsewhere"))
    assert not list(Path("run/checkpoints").iterdir()) and (tmp_path / "elsewhere" / "last").is_symlink()
    result, net = train(9, str(tmp_path / "elsewhere"), resume="auto")
    assert_same(net.state_dict(), straight())
    assert result.last == tmp_path / "elsewhere" / "step-00000009"
    assert sheer.load_weights(model(), "run", "last") == result.last


def test_a_directory_is_of_one_run(memory: str) -> None:
    train(4, memory)
    with pytest.raises(
        RunError, match=r"already holds checkpoints: step-00000004 is the newest.*give another directory"
    ):
        train(9, memory, "other")
    train(4, url_in("memory", Path()), "third")
    with pytest.raises(RunError, match=r"keeps its checkpoints in memory://.*it would begin anew"):
        train(9, memory, "third", resume="auto")
    shutil.copytree("third", "fourth")
    with pytest.raises(RunError, match=r"are of the run \w+, and run_dir has the run \w+"):
        record = json.loads(Path("fourth/run.json").read_text())
        record["settings"]["checkpoint"]["directory"] = memory
        del record["sha256"]
        Path("fourth/run.json").write_text(sealed(record))
        train(9, memory, "fourth", resume="auto")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("s3://a/b", "s3://a/b"), (Path("s3://a/b"), "s3://a/b"), ("memory://a/b/", "memory://a/b"), ("local:///a/b", "local:///a/b"),
        (Path("file:///a"), "file:///a"), ("simplecache::s3://a/b", "simplecache::s3://a/b"), ("/a/b", None), ("runs/a:b", None), ("c:/a", None),
    ],
)  # fmt: skip
def test_which_sources_are_urls(source: str | Path, expected: str | None) -> None:
    assert url_of(source) == expected


def test_where_the_package_is_missing(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingPackageError, match=r"needs fsspec.*pip install 'sheer\[remote\]'"):
        train(4, memory)


def test_a_store_that_is_not_known() -> None:
    with pytest.raises(RunError, match="nowhere://a is of no kind that fsspec knows"):
        train(4, "nowhere://a")


def test_a_bucket_that_is_not_there(s3: Any) -> None:
    with pytest.raises(RunError, match=r"s3://nobucket/a.*Make the bucket first"):
        train(4, "s3://nobucket/a")


def test_a_store_that_refuses_is_told_and_what_was_there_stays(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    put = MemoryFileSystem.put_file

    def refusing(self: Any, source: str, there: str, *arguments: Any, **options: Any) -> None:
        if "step-00000004/optimizer" in there:
            raise PermissionError("AccessDenied")
        put(self, source, there, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", refusing)
    with pytest.raises(
        RunError, match=r"step-00000004/optimizer.safetensors cannot be used.*AccessDenied.*credentials"
    ):
        train(9, memory)
    assert [saved.step for saved in committed(Bucket(memory, None))] == [2]
