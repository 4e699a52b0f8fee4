"""`sheer eject`: from a script that trains with the library to one that does so without it."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sheer
from sheer.eject import emit
from sheer.eject.capture import capture
from sheer.eject.constants import narrowed
from sheer.eject.entry import evaluations, prepared, prepared_loop, take_settings, training_device
from sheer.eject.facts import Facts
from sheer.eject.knowledge import RECORDS, constant_name, knowledge_of
from sheer.eject.program import Program, Refusal
from sheer.eject.ranks import STEP_MODULE, fewest, refuse_on_ranks, with_shares
from sheer.eject.rewrite import Rewrite
from sheer.eject.script import Script
from sheer.eject.source import Definition, read_library
from sheer.eject.specialise import specialise
from sheer.eject.to_loop import with_loop
from sheer.eject.verify import verify

OPERATION = frozenset({"forward", "backward"})  # what autograd calls in an operation of the library's own
CHECKING = ("check_loader", "check_arguments", "check_loggers", "check_parameters", "check_device", "check_loop")


@dataclass(frozen=True)
class Ejected:
    """What became of a script.

    Attributes:
        text: the whole of it.
        loop: the part that stands for the library: the settings, and the functions.
        ranks: how many processes it needs at least.
    """

    text: str
    loop: str
    ranks: int = 1


def eject(path: Path, arguments: Sequence[str] = ()) -> Ejected:
    """Make a script that does what `path` does, without the library; it is run up to the call that trains.

    Raises:
        Refusal: something in it cannot be ejected; the message says what, and where.
    """
    if path.suffix != ".py":
        raise Refusal(
            f"{path} is no Python script. A notebook becomes one by: jupyter nbconvert --to script {path.name}"
        )
    script = Script(path, path.read_text())
    facts = capture(path, arguments)
    refuse(script, facts)
    if (facts.settings["checkpoint"] or {}).get("directory") is not None:
        raise Refusal(
            f"{path}: Checkpoint(directory=...) has no form without the library. Leave it out: a script keeps its checkpoints in its run_dir."
        )
    refuse_on_ranks(script, facts)
    made = ejected(script, facts)
    verify(made.text, script.text)
    return made


def eject_to_loop(path: Path, arguments: Sequence[str] = ()) -> str:
    """Make a script that does what `path` does, with the loop of its `fit` written out over the library's parts.

    Raises:
        Refusal: it cannot be; the message says what, and where.
    """
    script = Script(path, path.read_text())
    facts = capture(path, arguments)
    refuse(script, dataclasses.replace(facts, modules=()))
    return with_loop(script, facts)


def ejected(script: Script, facts: Facts) -> Ejected:
    """Return what becomes of a script whose call was captured."""
    library = read_library(Path(sheer.__file__).parent)
    rewrite = Rewrite(script, facts)
    facts = rewrite.facts
    checks = {d.name for d in library.values() if d.module in ("sheer.checks", "sheer.announce")} | set(CHECKING)
    tables = {
        name: d.node.value
        for name, d in library.items()
        if isinstance(d.node, (ast.Assign, ast.AnnAssign)) and isinstance(d.node.value, ast.Dict)
    }
    knowledge = knowledge_of(facts, frozenset(checks), tables, rewrite.kept())
    used = {name: knowledge.twins.get(name, name) for name in rewrite.classes()}
    program = Program(library, set(), knowledge.twins)
    root = copy.deepcopy(library["fit" if facts.kind == "fit" else "plain_start_loop"].node)
    assert isinstance(root, ast.FunctionDef)
    loop, steps = copy.deepcopy(library["PlainLoop"].node), copy.deepcopy(library["own_steps"].node)
    if facts.kind == "fit":
        prepared(root, facts, rewrite.returned())
    elif isinstance(loop, ast.ClassDef) and isinstance(steps, ast.FunctionDef):
        prepared_loop(root, loop, steps, facts, script.attributes() | rewrite.entered())
    functions = {"fit": root, **evaluations(rewrite)}
    if rewrite.devices:
        functions["device"] = training_device()
    program.nodes = {function.name: function for function in functions.values()}
    program.nodes["Settings"] = take_settings(root, rewrite.kept())
    program.nodes |= {"PlainLoop": loop, "own_steps": steps}
    if facts.parallel is not None:
        program.nodes |= with_shares(library)
    for name, twin in used.items():
        node, calls = library[twin].node, rewrite.constructions(name)
        if isinstance(node, ast.ClassDef) and calls:
            program.nodes[twin] = narrowed(node, calls)
    program.roots = {function.name for function in functions.values()} | set(used.values())
    kept = script.attributes() | (STEP_MODULE if facts.parallel is not None else frozenset())
    kept |= rewrite.fields_of_result()
    kept |= OPERATION if "linear_cross_entropy" in used else frozenset()
    specialise(program, knowledge.known, RECORDS, knowledge.needless, kept, root=root.name)
    return assembled(script, rewrite, program, library, knowledge.settings, functions, used)


def refuse(script: Script, facts: Facts) -> None:
    """Raise `Refusal` for what stands in another file than the script."""
    for file, what in ((facts.file, "fit is called"), (facts.trainer_file, "the trainer is made")):
        if Path(file) != script.path.resolve():
            raise Refusal(
                f"{what} in {file}, which would stay imported. Do it in {script.path}, or eject that file's script."
            )
    if any(plugin.name == "JSONL" and plugin.is_ours for plugin in facts.loggers):
        raise Refusal(f"{script.path}: sheer.JSONL writes the file that is always written. Leave it out of loggers.")
    if facts.settings["activation_memory_budget"] < 1.0:
        raise Refusal(
            f"{script.path}: compile=Compile(activation_memory_budget=...) has no form without the library yet. Eject with compile=True: the steps "
            "are the same, and take more memory."
        )
    if facts.settings["cuda_graph"]:
        raise Refusal(
            f"{script.path}: cuda_graph=True has no form without the library yet. Eject with cuda_graph=False: the steps are the same, but for "
            "the time between their kernels."
        )
    if isinstance(facts.settings["nonfinite"], dict):
        raise Refusal(
            f'{script.path}: nonfinite=Rollback(...) has no form without the library yet. Eject with nonfinite="raise": where no step is bad, the steps '
            "are the same."
        )
    if facts.settings["autotune"]:
        raise Refusal(
            f"{script.path}: autotune=True measures, and a script without the library cannot. `sheer autotune {script.path}` says what to write "
            "in its place."
        )
    if facts.settings["precision"] == "float8-mixed":
        raise script.refusal(
            script.at(facts.call),
            'precision="float8-mixed" cannot be ejected yet. Eject with "bf16-mixed", and call torchao.float8.convert_to_float8_training(model) '
            "in the script that comes out.",
        )
    if facts.modules:
        raise Refusal(
            f"{facts.modules[0]}: this module of yours imports sheer, and would stay imported. Move what needs it into {script.path.name}."
        )


def assembled(
    script: Script,
    rewrite: Rewrite,
    program: Program,
    library: Mapping[str, Definition],
    settings: Mapping[str, object],
    functions: Mapping[str, ast.FunctionDef],
    used: Mapping[str, str],
) -> Ejected:
    """Put the definitions into the script, and its calls in their place."""
    facts = rewrite.facts
    emit.without_aliases(program)
    emit.with_builtin_errors(program)
    emit.with_short_docstrings(program)
    emit.with_narrow_types(program)
    names = emit.own_names(program, script.names() - rewrite.freed())
    old_names = {key: function.name for key, function in functions.items()}
    emit.rename(program, names)
    if not script.has_future_annotations():
        emit.quote_own_names(program)
    roots = [names[name] for name in (*used.values(), *dict.fromkeys(old_names.values()))]
    nodes = emit.in_order(program, roots)
    lifted = emit.lifted_imports(nodes, script.names())
    own_constants = [node for node in nodes if emit.is_number_or_text(node)]
    nodes = [node for node in nodes if node not in own_constants]
    remarks = rewrite.remarks()
    meanings = emit.comments_of(library, constant_name)
    meanings |= {constant_name(name): f"# {remark}" for name, remark in remarks.items()}
    constants = emit.constants_of(nodes, settings, meanings, Path(facts.file).stem)
    constants += [emit.written([node]) for node in own_constants]
    placed = [constant.split(" = ")[0] for constant in constants]
    imports = emit.imports_of(nodes, library, placed, lifted)
    have = script.import_statements()
    new_imports = [statement for statement in [*imports, *rewrite.seeds()] if statement not in have]
    block = emit.formatted("\n".join([*constants, "", "", emit.written(nodes)]))
    own = {function.name: function.name for function in functions.values()}
    rewrite.edit(functions, {**names, **own, **{name: names[twin] for name, twin in used.items()}})
    elsewhere = {name for name in remarks if constant_name(name) in placed} | {given.name for given in rewrite.given}
    left = {name: remark for name, remark in remarks.items() if name not in elsewhere}
    text = script.with_block(head(facts, left), emit.sorted_imports(new_imports), block)
    refuse_traces(script, text)
    return Ejected(text, block, fewest(facts.parallel))


def head(facts: Facts, remarks: Mapping[str, str]) -> str:
    """Return the comment that an ejected file begins with, with what the script said of settings that are no constants now."""
    called, name = " ".join([Path(facts.file).name, *facts.arguments]), Path(facts.file).stem
    one = ', for one process (set parallel="ddp" or "fsdp" for several ranks)'
    how = (
        ""
        if facts.parallel is None
        else f"# Run it with: torchrun --nproc-per-node {fewest(facts.parallel)} {name}_torch.py\n"
    )
    return (
        f"# From `{called}`, by `sheer eject` {sheer.__version__} (Apache License 2.0){one if facts.settings['parallel'] == 'auto' else ''}; it is yours, "
        f"to change as you like.\n{how}# Settings: {emit.described(facts.settings)}.\n"
    ) + "".join(f"# {name}: {remark}\n" for name, remark in remarks.items())


def refuse_traces(script: Script, text: str) -> None:
    """Raise `Refusal` where a script still speaks of the library."""
    left = [number for number, line in enumerate(text.splitlines(), 1) if "sheer." in line.split("#")[0]]
    if left:
        line = text.splitlines()[left[0] - 1].strip()
        raise Refusal(f"{script.path}: {line!r} cannot be ejected yet.")
