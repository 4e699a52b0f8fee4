"""`sheer checkpoint`: checkpoints listed, verified, shown, compared, exported and deleted."""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sheer.errors import RunError, SheerError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.tree import Tree

    from sheer.checkpoint.bucket import Folder

checkpoint_app = typer.Typer(
    name="checkpoint",
    help="List, verify, show, compare, export and delete the checkpoints of a run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
UNBROKEN = 100_000  # columns; lines are not filled up to it
A_RUN = "A run's directory, or its checkpoints folder, or the URL of that."
OR_ONE = "A run's directory, its checkpoints folder, one checkpoint, or a URL."


@contextmanager
def errors_told() -> Iterator[None]:
    """Print an error of ours in a line, and end with status 2."""
    try:
        yield
    except SheerError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None


def checkpoints_of(run: str) -> Folder:
    """Return the folder of checkpoints that a run's directory, or the folder itself, means.

    Raises:
        RunError: there are none.
    """
    from sheer.checkpoint.bucket import folder_at, url_of
    from sheer.weights import recorded_directory

    elsewhere = recorded_directory(Path(run)) if url_of(run) is None else None
    places = [run] if url_of(run) is not None else [str(Path(run) / "checkpoints"), run]
    for place in places if elsewhere is None else [elsewhere]:
        disk = folder_at(place, None)
        if disk.names():
            return disk
    raise RunError(f"{run} holds no checkpoints. Give a run's directory, or its checkpoints folder.")


def shown_on() -> Console:
    """Return what tables and trees are printed on: as wide as the terminal, and for a file or another program so wide that no line is broken."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else UNBROKEN)


@checkpoint_app.command("ls")
def list_checkpoints(run: Annotated[str, typer.Argument(help=A_RUN)]) -> None:
    """List the checkpoints of a run: when, how large, how good, and whether they are whole (sizes are compared; `verify` reads all)."""
    from rich.filesize import decimal
    from rich.table import Table

    from sheer.checkpoint.look import rows_of

    with errors_told():
        rows = rows_of(checkpoints_of(run))
    table = Table("checkpoint", "step", "size", "when", "metrics", "", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header not in ("metrics", "")
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.when)) if row.when is not None else ""
        metrics = ", ".join(f"{name} {described_number(value)}" for name, value in row.metrics.items())
        marks = ", ".join(row.marks) or ""
        table.add_row(row.name, f"{row.step:,}", decimal(row.size), when, metrics, row.wrong or marks)
    shown_on().print(table)


def described_number(value: Any) -> str:
    """Return a metric as text."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(next(iter(value.values()), value))


@checkpoint_app.command("verify")
def verify_checkpoints(run: Annotated[str, typer.Argument(help=OR_ONE)]) -> None:
    """Read every file and compare it with its hash. Status 1: something is damaged, and is named."""
    from sheer.checkpoint.disk import step_of
    from sheer.checkpoint.store import MANIFEST
    from sheer.weights import checkpoint_at

    any_wrong = False
    with errors_told():
        if (Path(run) / MANIFEST).is_file() or step_of(run.rstrip("/").rpartition("/")[2]) is not None:
            disk, only = checkpoint_at(run, "last", None)
            names = [only]
        else:
            disk = checkpoints_of(run)
            names = disk.names()
        for name in names:
            wrong = wrong_in(disk, name)
            disk.forget()
            any_wrong = any_wrong or bool(wrong)
            print("\n".join(wrong) if wrong else f"{disk}/{name}: whole", flush=True)
    raise typer.Exit(1 if any_wrong else 0)


def wrong_in(disk: Folder, name: str) -> list[str]:
    """Return what is wrong with a checkpoint, file by file; a bar shows how much is read. What had to be fetched stays."""
    from sheer.checkpoint.store import check_file, manifest_of

    try:
        files = manifest_of(disk, name)["files"]
    except RunError as error:
        return [str(error)]
    wrong = []
    with bars() as shown:
        task = shown.add_task(name, total=sum(facts["size"] for facts in files.values()))
        for file, facts in sorted(files.items()):
            folder = disk.bring(name, [file])
            try:
                check_file(folder, file, facts, functools.partial(hash_shown, shown, task))
            except RunError as error:
                wrong.append(str(error).replace(str(folder), f"{disk}/{name}"))
    return wrong


def bars() -> Bars:
    """Return progress bars, which count bytes and leave nothing behind."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def hash_shown(shown: Bars, task: TaskID, file: Path) -> str:
    """Return the SHA-256 of a file; a bar moves with what is read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            shown.advance(task, len(block))
    return digest.hexdigest()


@contextmanager
def checkpoint_meant(run: str, *, is_verified: bool) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
    """Give the name of a checkpoint (of a run the last), a folder where it can be read, and its manifest.

    Raises:
        RunError: there is none, or, where it is to be verified, it is damaged.
    """
    from sheer.checkpoint.store import manifest_of
    from sheer.weights import checkpoint_at

    disk, name = checkpoint_at(run, "last", None)
    try:
        wrong = wrong_in(disk, name) if is_verified else []
        if wrong:
            raise RunError("\n".join(wrong))
        manifest = manifest_of(disk, name)
        yield f"{disk}/{name}", disk.bring(name, [] if is_verified else list(manifest["files"])), manifest
    finally:
        disk.forget()


@checkpoint_app.command("show")
def show_checkpoint(
    run: Annotated[str, typer.Argument(help=f"{OR_ONE} Of a run: the last.")],
    depth: Annotated[int | None, typer.Option(min=1, help="How deep the tree goes.", show_default="all")] = None,
) -> None:
    """Show what is inside a checkpoint: names, shapes and data types of tensors, numbers of the state."""
    from rich.filesize import decimal
    from rich.tree import Tree

    from sheer.checkpoint.look import GROUPS, bytes_of, described_tensor, groups_in, numbers_of

    with errors_told(), checkpoint_meant(run, is_verified=False) as (where, path, manifest):
        groups, numbers = groups_in(path, manifest), numbers_of(path, manifest)
    size = decimal(sum(facts["size"] for facts in manifest["files"].values()))
    ranks = f"{manifest['world_size']} rank" + ("s" if manifest["world_size"] > 1 else "")
    by = f"sheer {manifest['sheer']}" if manifest.get("sheer") else "an ejected script"
    root = Tree(f"{where} · step {manifest['step']:,} · {size} · {ranks} · run {manifest['run_id']}")
    root.add(f"written by {by}, torch {manifest['torch']}")
    metrics = ", ".join(f"{name} {described_number(value)}" for name, value in manifest["metrics"].items())
    root.add(f"metrics: {metrics or 'none'}")
    for group in [name for name in groups if name in GROUPS]:
        stored = groups[group]
        branch = root.add(f"{group}: {len(stored)} tensors, {decimal(sum(bytes_of(stored, n) for n in stored))}")
        separator = "." if group != "optimizer" else "/"
        add_leaves(branch, {n: described_tensor(stored, n) for n in sorted(stored)}, separator, depth)
    tensors = {n: described_tensor(stored, n) for g, stored in groups.items() if g not in GROUPS for n in stored}
    texts = {name: repr(value) for name, value in numbers.items()}
    add_leaves(root.add("state"), texts | tensors, "/", depth)
    shown_on().print(root)


def add_leaves(root: Tree, values: Mapping[str, str], separator: str, depth: int | None) -> None:
    """Hang values into a tree by the parts of their names; of many numbers side by side only the first are shown."""
    branches: dict[tuple[str, ...], Tree] = {(): root}
    left_out: dict[tuple[str, ...], int] = {}
    for name, said in values.items():
        *above, last = name.split(separator)
        parts = tuple(above)
        if last.isdecimal() and int(last) >= 4:
            left_out[parts] = left_out.get(parts, 0) + 1
            continue
        for end in range(1, len(parts) + 1):
            if parts[:end] not in branches and (depth is None or end <= depth):
                branches[parts[:end]] = branches[parts[: end - 1]].add(parts[end - 1])
        if depth is None or len(parts) < depth:
            branches[parts].add(f"{last}: {said}")
    for parts, count in left_out.items():
        if parts in branches:
            branches[parts].add(f"and {count:,} more")


@checkpoint_app.command("diff")
def compare_checkpoints(
    a: Annotated[str, typer.Argument(help=f"{OR_ONE} Of a run: the last.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    most: Annotated[int, typer.Option("--most", min=1, help="How many lines are shown of each kind.")] = 20,
) -> None:
    """Compare two checkpoints bit for bit; the largest differences first. Status 0: the same, 1: they differ.

    Seconds of training and lengths of logs are not compared.
    """
    from rich.table import Table

    from sheer.checkpoint.look import differing_numbers, differing_tensors, groups_in, numbers_of

    with (
        errors_told(),
        checkpoint_meant(a, is_verified=True) as (where, path, manifest),
        checkpoint_meant(b, is_verified=True) as (elsewhere, other, another),
    ):
        groups, others = groups_in(path, manifest), groups_in(other, another)
        numbers, other_numbers = numbers_of(path, manifest), numbers_of(other, another)
        with bars() as shown:
            task = shown.add_task("comparing", total=None)
            tensors = differing_tensors(groups, others, functools.partial(shown.advance, task))
    console = shown_on()
    console.print(f"A: {where}, step {manifest['step']:,}\nB: {elsewhere}, step {another['step']:,}", soft_wrap=True)
    if tensors:
        table = Table("tensor", "largest", "relative", "", title=f"{len(tensors)} tensors differ", box=None)
        table.columns[0].overflow = "fold"
        for found in tensors[:most]:
            table.add_row(found.name, f"{found.largest:.3g}", f"{found.relative:.3g}", found.said)
        console.print(table)
    paths = differing_numbers(numbers, other_numbers)
    if paths:
        console.print(f"{len(paths)} numbers of the state differ")
        for name in paths[:most]:
            one, two = (repr(held[name]) if name in held else "not there" for held in (numbers, other_numbers))
            console.print(f"  {name}: {one} in A, {two} in B", soft_wrap=True)
    if not tensors and not paths:
        console.print("the same, bit for bit")
    raise typer.Exit(1 if tensors or paths else 0)


@checkpoint_app.command("export")
def export_weights(
    run: Annotated[str, typer.Argument(help=f"{OR_ONE} Of a run: the last.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The safetensors file to write.")],
    trained: Annotated[
        bool, typer.Option("--trained", help="The weights that are trained, where a callback averages them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write the weights of a checkpoint as one plain safetensors file, whole, from however many ranks."""
    from sheer.checkpoint.look import bytes_of, write_whole
    from sheer.checkpoint.read import stored_in

    with errors_told():
        if out.suffix not in ("", ".safetensors"):
            raise RunError(
                f"{out} would be a safetensors file under a suffix of others. Give {out.with_suffix('.safetensors')}, or a name without suffix; no other "
                "format is written."
            )
        if out.exists() and not force:
            raise RunError(f"{out} is there already. Give another file, or --force.")
        with checkpoint_meant(run, is_verified=True) as (where, path, manifest), bars() as shown:
            stored = stored_in(path, manifest, "training" if trained else "model") or stored_in(path, manifest, "model")
            task = shown.add_task(out.name, total=sum(bytes_of(stored, name) for name in stored))
            try:
                write_whole(stored, out, functools.partial(shown.advance, task))
            except OSError as error:
                raise RunError(f"{out} could not be written: {error}.") from error
    print(f"{out}: {len(stored)} tensors of {where}")


@checkpoint_app.command("prune")
def prune_checkpoints(
    run: Annotated[str, typer.Argument(help=A_RUN)],
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, help="How many of the newest stay.")],
    keep_best: Annotated[int, typer.Option("--keep-best", min=0, help="How many of the best stay.")] = 1,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every-n-steps", min=1, help="Those of each n-th step stay.")
    ] = None,
    monitor: Annotated[
        str | None, typer.Option(help="The metric that says which are best.", show_default="the run's own")
    ] = None,
    mode: Annotated[str | None, typer.Option(metavar="min|max", help="Which of its values are best.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete checkpoints of a run, and what is left of saves that were cut off. What stays is verified first; other runs' stay."""
    from filelock import FileLock

    from sheer.checkpoint.pruning import carry_out, only_run_of, plan_pruning, refuse_unknown_ranking
    from sheer.checkpoint.store import Retention, committed
    from sheer.rundir import lock, read_record

    with errors_told():
        disk = checkpoints_of(run)
        record = next((p / "run.json" for p in (Path(run), Path(run).parent) if (p / "run.json").is_file()), Path())
        recorded: str | None = read_record(record)["id"] if record.is_file() else None
        held: FileLock | None = lock(record.parent) if record.is_file() else None  # it is not to be training
        try:
            saves = committed(disk)
            run_id = recorded if recorded is not None else only_run_of(disk, saves)
            own = [saved for saved in saves if saved.manifest["run_id"] == run_id]
            refuse_unknown_ranking(disk, own, monitor, mode)
            settings: Mapping[str, Any] = own[-1].manifest["settings"] if own else {}
            keep = Retention(
                keep_last,
                keep_best,
                keep_every,
                monitor or settings.get("monitor"),
                mode or settings.get("monitor_mode", "min"),
            )
            pruning = plan_pruning(disk, run_id, own, keep)
            if not dry_run:
                carry_out(disk, pruning, keep)
        finally:
            if held is not None:
                held.release()
    would = "would be " if dry_run else ""
    for name in pruning.damaged:
        print(f"{name}: damaged, left as it is")
    for name in pruning.rests:
        print(f"{name}: {would}deleted (its save was cut off)")
    for name in pruning.going:
        print(f"{name}: {would}deleted")
    for saved in pruning.staying:
        print(f"{saved.path.name}: stays")
