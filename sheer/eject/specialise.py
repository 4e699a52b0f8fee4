"""From the library's functions to a script's: the passes, run until nothing changes."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from sheer.eject.fold import Known
from sheer.eject.inline import inline_expressions, inline_procedures
from sheer.eject.normalise import drop_calls, normalise
from sheer.eject.program import Program
from sheer.eject.propagate import bind_parameters, fold_all, unused_parameters
from sheer.eject.records import explode
from sheer.eject.trim import trim_classes, trim_locals

MOST_INLINED = 14  # statements of a function that is called once; longer ones stay functions


def specialise(
    program: Program,
    known: Known,
    records: Sequence[str],
    dropped: frozenset[str] = frozenset(),
    kept: frozenset[str] = frozenset(),
) -> None:
    """Run all passes over a program until nothing changes.

    Args:
        program: changed in place.
        known: what holds everywhere: the settings, and what capture saw.
        records: the classes whose objects only carry others; they are taken apart where none is kept as a whole.
        dropped: functions whose calls are left out, as statements: what they check has held, what they say is not for a script.
        kept: names of attributes that the script itself reads.
    """
    program.collect()
    before = ""
    while (now := dumped(program)) != before:
        before = now
        drop_calls(program, dropped)
        normalise(program)
        fold_all(program, known)
        bind_parameters(program, known)
        inline_expressions(program)
        while inline_procedures(program, MOST_INLINED, records):
            pass
        for record in records:
            explode(program, record)
        trim_locals(program)
        unused_parameters(program)
        trim_classes(program, kept)
        program.collect()


def dumped(program: Program) -> str:
    """Return a text that changes when a program does."""
    return "\n".join(ast.dump(node) for node in program.nodes.values())
