"""The `sheer` command."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sheer.checkpoint.commands import checkpoint_app
from sheer.errors import ContradictionError, SettingsError, SheerError, from_the_script
from sheer.launch import overriding, telling_of_untaken
from sheer.settings import Settings, overridden
from sheer.version import __version__

app = typer.Typer(
    name="sheer",
    help="Train PyTorch models: one loop that you can run, read, or take with you.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(checkpoint_app)


def a_file(path: Path) -> Path:
    """Return the path of a script that is there."""
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}")
    return path


Script = Annotated[
    Path, typer.Argument(metavar="SCRIPT", callback=a_file, help="The script; what follows it is its own.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set a setting of every Trainer in the script, as max_steps=50."),
]


@contextmanager
def told(error: type[Exception], status: int) -> Iterator[None]:
    """Say an error in its own words, and end with a status."""
    try:
        yield
    except error as said:
        print(said, file=sys.stderr)
        raise typer.Exit(status) from None


class To(Enum):
    """What a script is ejected to."""

    torch = "torch"
    loop = "loop"


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Train PyTorch models: one loop that you can run, read, or take with you."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    script: Script,
    set_: Changes = None,
    nproc: Annotated[
        str | None,
        typer.Option(
            "--nproc-per-node",
            "--nproc_per_node",
            metavar="N",
            help='Start N ranks on this machine; "gpu": one an accelerator, "cpu": one a core, "auto": the former, or the latter.',
        ),
    ] = None,
    nnodes: Annotated[
        str | None, typer.Option(metavar="M[:MAX]", help="How many machines there are. SLURM is asked if not given.")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(metavar="K", help="Which of them this is, from 0.")] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: on one of them, number 0.")
    ] = None,
    rdzv_id: Annotated[str | None, typer.Option(metavar="ID", help="What tells this run from others there.")] = None,
    max_restarts: Annotated[
        int, typer.Option(metavar="R", min=0, help="How often to start all ranks again when one has failed.")
    ] = 0,
) -> None:
    """Run a training script, on several ranks if --nproc-per-node says so; --set overrides its settings."""
    changes = changes_in(set_)
    if nproc is not None:
        start_ranks(nproc, nnodes, node_rank, rdzv_endpoint, rdzv_id, max_restarts, script, list(context.args), changes)
    if (nnodes, node_rank, rdzv_endpoint, rdzv_id) != (None, None, None, None) or max_restarts:
        raise typer.BadParameter("how many ranks on each machine?", param_hint="--nproc-per-node")
    sys.argv = [str(script), *context.args]
    sys.path[0] = str(script.resolve().parent)
    with overriding(changes), telling_of_untaken(str(script)):
        runpy.run_path(str(script), run_name="__main__")


def start_ranks(
    nproc: str,
    nnodes: str | None,
    node_rank: int | None,
    endpoint: str | None,
    run_id: str | None,
    max_restarts: int,
    script: Path,
    arguments: list[str],
    changes: dict[str, str],
) -> NoReturn:
    """Run the script on several ranks, and end with the status that says how they ended."""
    from sheer.distributed.launch import launch
    from sheer.distributed.plan import make_plan

    with told(SettingsError, 2):
        plan = make_plan(nproc, nnodes, node_rank, endpoint, run_id, max_restarts, os.environ)
    raise typer.Exit(launch(plan, script, arguments, changes))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def eject(
    context: typer.Context,
    script: Script,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The file to write.", show_default="<script>_torch.py, or _loop.py"),
    ] = None,
    to: Annotated[
        To, typer.Option("--to", help="torch: no trace of this library; loop: the loop, over its parts.")
    ] = To.torch,
    check: Annotated[
        bool, typer.Option("--check", help="Run both and compare them bit for bit before writing.")
    ] = False,
    updates: Annotated[int, typer.Option("--updates", min=1, help="How many updates --check compares.")] = 50,
    diff: Annotated[bool, typer.Option("--diff", help="Only show how the file would change.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a training script as raw PyTorch, without this library."""
    from sheer.eject import command
    from sheer.eject.program import Refusal

    with told(Refusal, 1):
        if diff:
            earlier = out or script.with_name(f"{script.stem}_torch.py")
            print(command.differences(script, context.args, earlier), end="")
        else:
            compared = updates if check else None
            lines = command.write(script, context.args, out, to=to.value, force=force, updates=compared)
            print("\n".join(lines))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def show(context: typer.Context, script: Script) -> None:
    """Print the loop that a script runs, specialised for its settings; nothing is written."""
    from sheer.eject import command
    from sheer.eject.program import Refusal

    with told(Refusal, 1):
        print(command.show(script, context.args), end="")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    script: Script,
    world: Annotated[int, typer.Option("--world", min=1, help="How many ranks there would be.")],
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="WAY", help='Instead of the script\'s: ddp, fsdp, or sizes such as "tp=8,dp_replicate=4".'
        ),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What a device has: 80GiB, or h100, h200, a100, a100-40, ...",
            show_default="this machine's, else h100",
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Which rank is shown. What does not divide gives rank 0 the most.")] = 0,
    set_: Changes = None,
) -> None:
    """Say what each of so many ranks would hold and send, on this machine alone. Status 1: it does not fit. 2: it cannot be planned."""
    from sheer.plan.command import plan_script, read_parallel

    changes = changes_in(set_)
    with told(SheerError, 2):
        changes |= read_parallel(parallel) if parallel is not None else {}
        text, fits = plan_script(script, context.args, changes, world, rank, device_memory)
    print(text, end="")
    raise typer.Exit(0 if fits else 1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def profile(
    context: typer.Context,
    script: Script,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="How many steps are timed; up to 5 more are recorded.")
    ] = 20,
    warmup: Annotated[int, typer.Option("--warmup", min=2, help="How many steps are run before.")] = 5,
    set_: Changes = None,
) -> None:
    """Say where a step's time goes, and what is worth trying. Keeps a trace and a picture, and nothing of the run."""
    from sheer.profile.command import profile_script
    from sheer.profile.script import CannotProfile

    changes = changes_in(set_)
    with told(CannotProfile, 2):
        print(profile_script(script, context.args, changes, warmup, steps), end="")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def autotune(context: typer.Context, script: Script, set_: Changes = None) -> None:
    """Try ways to train a script on this machine (compiled, captured, fused, precisions, workers), and say which is fastest."""
    from sheer.speed.command import autotune_script

    changes = changes_in(set_)
    with told(SheerError, 2):
        print(autotune_script(script, context.args, changes))


def changes_in(assignments: list[str] | None) -> dict[str, str]:
    """Read what --set was given."""
    try:
        return read_changes(assignments or [])
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None


def read_changes(assignments: list[str]) -> dict[str, str]:
    """Read NAME=VALUE assignments, and see that there are such settings and that they take such values; whether they fit the script, its Trainer says.

    Raises:
        SettingsError: one is no assignment, or names no setting, or has a value of the wrong type.
    """
    changes = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"{assignment!r} sets nothing; write NAME=VALUE, as max_steps=50.")
        changes[name] = value
        with suppress(ContradictionError):  # with the defaults, which the script may not have
            overridden(Settings(), {name: value})
    return changes


def main() -> None:
    """Run the command. An error of a script is shown from the script's own lines on, without those of the command line above them."""
    try:
        app()
    except Exception as error:
        error.__traceback__ = from_the_script(error.__traceback__)
        raise
