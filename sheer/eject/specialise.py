"""From the library's functions to a script's: the passes, run until nothing changes."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from sheer.eject.blocks import inline_blocks
from sheer.eject.bundle import bundle
from sheer.eject.constants import bind_methods, call_for_nothing, drop_idle_methods, fold_attributes, pass_fields
from sheer.eject.drop import Needless, drop
from sheer.eject.fold import Known
from sheer.eject.inline import inline_expressions, inline_procedures
from sheer.eject.normalise import normalise
from sheer.eject.program import Program
from sheer.eject.propagate import (
    bind_parameters,
    fold_all,
    merge_parameters,
    narrow_parameters,
    type_parameters,
    unused_parameters,
)
from sheer.eject.records import explode
from sheer.eject.tidy import (
    drop_constants,
    pass_in_order,
    tidy_names,
    use_numbered_directly,
)
from sheer.eject.trim import trim_classes, trim_locals, trim_results

MOST_INLINED = 14  # statements of a function that is called once; longer ones stay functions


def specialise(
    program: Program,
    known: Known,
    records: Sequence[str],
    needless: Needless,
    kept: frozenset[str] = frozenset(),
    root: str = "fit",
) -> None:
    """Run all passes over a program until nothing changes.

    Args:
        program: changed in place.
        known: what holds everywhere: the settings, and what capture saw.
        records: the classes whose objects only carry others; they are taken apart where none is kept as a whole.
        needless: what is left out.
        kept: names of attributes that the script itself reads.
        root: the function that trains.
    """
    program.answered = frozenset(known.answers)
    program.collect()
    size = 0
    while len(program.nodes) != size:  # most of the library is left behind here, before anything is moved
        size = len(program.nodes)
        drop(program, needless)
        normalise(program)
        fold_all(program, known)
        inline_expressions(program)
        narrow_parameters(program)
        bind_parameters(program, known)
        program.collect()
    _settle(program, known, records, needless, kept)
    _settle(program, known, records, needless, kept, looped=True)
    use_numbered_directly(program)
    use_numbered_directly(program)
    fold_all(program, known)
    tidy_names(program)
    bundle(program, root)
    pass_in_order(program)


def _settle(
    program: Program,
    known: Known,
    records: Sequence[str],
    needless: Needless,
    kept: frozenset[str],
    looped: bool = False,
) -> None:
    """Run the passes that make a program smaller until nothing changes; `looped`: what a loop ends with is written there."""
    before = ""
    while (now := dumped(program)) != before:
        before = now
        drop(program, needless)
        normalise(program)
        fold_all(program, known)
        program.collect()
        narrow_parameters(program)
        bind_parameters(program, known)
        bind_methods(program, known, kept)
        fold_attributes(program, known, kept)
        call_for_nothing(program)
        drop_idle_methods(program, kept)
        inline_expressions(program)
        while inline_procedures(program, MOST_INLINED, records, looped) or inline_blocks(program):
            pass
        type_parameters(program)
        pass_fields(program, records, kept)
        for record in records:
            explode(program, record)
        trim_locals(program)
        trim_results(program)
        unused_parameters(program)
        merge_parameters(program)
        trim_classes(program, kept)
        drop_constants(program)
        program.collect()


def dumped(program: Program) -> str:
    """Return a text that changes when a program does."""
    return "\n".join(ast.dump(node) for node in program.nodes.values())
