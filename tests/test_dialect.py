"""The library's source keeps to the rules by which it can be taken apart, and read: checked on its own syntax trees."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import sheer

ROOT = Path(sheer.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(ROOT.rglob("*.py"))
    if "eject" not in path.relative_to(ROOT).parts
}
# What only speaks of a run, evaluates by itself or is a command: nothing of it is reached by a step.
TUNING = {"speed.autotune", "speed.command", "speed.trials", "speed.ways"}
BESIDE = {"cli", "launch", "__main__", "trainer", "settings", "find_lr", *TUNING}
PATH = {name: tree for name, tree in MODULES.items() if name not in BESIDE and not name.endswith("__init__")}
CFG = {
    "loop",
    "rollback",
    "memory",
    "step",
    "start",
    "checks",
    "announce",
    "due",
    "resume",
    "saving",
    "speed.graph",
    "rundir",
    "own_loop",
    "evaluate_alone",
    "plain.loop",
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def top_level(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_a_top_level_name_is_of_one_module() -> None:
    where = defaultdict(list)
    for module, tree in MODULES.items():
        for name in top_level(tree):
            if name != "__all__":
                where[name].append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", PATH)
def test_no_function_is_inside_of_another(module: str) -> None:
    nested = [
        f"{outer.name}, line {inner.lineno}"
        for outer in functions(PATH[module])
        for inner in ast.walk(outer)
        if inner is not outer and isinstance(inner, (ast.FunctionDef, ast.Lambda, ast.ClassDef))
    ]
    assert nested == []


@pytest.mark.parametrize("module", PATH)
def test_no_local_name_is_that_of_a_function(module: str) -> None:
    known = {
        name
        for tree in PATH.values()
        for name in top_level(tree)
        if any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)
    }
    shadowed = set()
    for function in functions(PATH[module]):
        arguments = function.args
        names = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
        names |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        shadowed |= {f"{function.name}: {name}" for name in names & known}
    assert shadowed == set()


@pytest.mark.parametrize("module", MODULES)
def test_settings_are_read_as_attributes_of_cfg(module: str) -> None:
    for function in functions(MODULES[module]):
        arguments = function.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            settings = argument.annotation is not None and ast.unparse(argument.annotation) == "Settings"
            if settings and module not in {"settings", "trainer", "find_lr", *TUNING}:
                assert argument.arg == "cfg", f"{function.name} calls its settings {argument.arg}"
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id == "cfg" and isinstance(node.ctx, ast.Store):
                raise AssertionError(f"{function.name} rebinds cfg")
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "setattr")
            ):
                assert not (isinstance(node.args[0], ast.Name) and node.args[0].id == "cfg"), (
                    f"{function.name} reads cfg by name"
                )


@pytest.mark.parametrize("module", PATH)
def test_only_what_decides_reads_settings(module: str) -> None:
    takes = [f.name for f in functions(PATH[module]) if any(a.arg == "cfg" for a in f.args.args)]
    assert module in CFG or takes == []


@pytest.mark.parametrize("module", PATH)
def test_arguments_are_spelt_out_and_nothing_is_inherited_to_share_code(module: str) -> None:
    own = {node.name for tree in MODULES.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(PATH[module]):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            assert node.args.kwarg is None, f"{node.name} takes **{node.args.kwarg and node.args.kwarg.arg}"
        if isinstance(node, ast.ClassDef) and module != "errors":
            bases = [ast.unparse(base) for base in node.bases]
            assert not own & set(bases), f"{node.name} inherits from {bases}"


@pytest.mark.parametrize("module", PATH)
def test_names_are_imported_from_where_they_are(module: str) -> None:
    for node in PATH[module].body:
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("sheer") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module in {
            "sheer",
            *(f"sheer.{name}" for name in MODULES if name.endswith("__init__")),
        }:
            raise AssertionError(f"line {node.lineno}: import from the module that defines it")
