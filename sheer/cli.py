"""The `sheer` command."""

from __future__ import annotations

import runpy
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sheer.errors import SettingsError
from sheer.launch import overriding
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="The script to run; what follows it is its own.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Set a setting of every Trainer in the script, as max_steps=50."
        ),
    ] = None,
) -> None:
    """Run a training script; --set overrides its settings."""
    try:
        changes = read_changes(set_ or [])
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
    if not script.is_file():
        raise typer.BadParameter(f"there is no file {script}", param_hint="SCRIPT")
    sys.argv = [str(script), *context.args]
    sys.path[0] = str(script.resolve().parent)
    with overriding(changes):
        runpy.run_path(str(script), run_name="__main__")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def eject(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="The script to eject; what follows it is its own.")],
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

    if not script.is_file():
        raise typer.BadParameter(f"there is no file {script}", param_hint="SCRIPT")
    try:
        if diff:
            earlier = out or script.with_name(f"{script.stem}_torch.py")
            print(command.differences(script, context.args, earlier), end="")
        else:
            print(
                "\n".join(
                    command.write(
                        script, context.args, out, to=to.value, force=force, updates=updates if check else None
                    )
                )
            )
    except Refusal as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def show(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="The script; what follows it is its own.")],
) -> None:
    """Print the loop that a script runs, specialised for its settings; nothing is written."""
    from sheer.eject import command
    from sheer.eject.program import Refusal

    if not script.is_file():
        raise typer.BadParameter(f"there is no file {script}", param_hint="SCRIPT")
    try:
        print(command.show(script, context.args), end="")
    except Refusal as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


def read_changes(assignments: list[str]) -> dict[str, str]:
    """Read NAME=VALUE assignments, and see that there are such settings and that they take such values.

    Raises:
        SettingsError: one is no assignment, or names no setting, or has a value of the wrong type.
    """
    changes = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"{assignment!r} sets nothing; write NAME=VALUE, as max_steps=50.")
        changes[name] = value
        overridden(
            Settings(), {name: value} if name != "resume" else {}
        )  # whether it fits the script, its Trainer says
    return changes


def main() -> None:
    """Run the command."""
    app()
