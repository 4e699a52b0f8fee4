"""Runs a script until its optimizers have made so many updates, and writes down what they had made of the weights.

It stands alone, since one of the two runs that are compared must not be able to import the library:
`python watch.py REPORT UPDATES RUN_DIR BLOCKED SCRIPT [ARGUMENTS]`. BLOCKED is a package that cannot be imported, or "-".
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

EVERY_UPDATE_BELOW = 5_000_000  # numbers in all weights; of larger models only the last update is compared


class Enough(BaseException):
    """Ends the script; no `except Exception` of its own stops it."""


class Blocker:
    """Makes a package impossible to import."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Refuse the package and what is in it."""
        if name == self.package or name.startswith(f"{self.package}."):
            raise ImportError(f"{name} must not be imported here")
        return None


class Watcher:
    """Counts updates, and hashes what is compared."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.updates: list[dict[str, str]] = []
        self.last: Any = None

    def updated(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Look at what an update made; end the script after the last one."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        small = sum(p.numel() for p in parameters) < EVERY_UPDATE_BELOW
        is_last = len(self.updates) + 1 == self.limit
        self.updates.append(self._state(optimizer, parameters) if small or is_last else {})
        if is_last:
            raise Enough

    def _state(self, optimizer: Any, parameters: list[Any]) -> dict[str, str]:
        rates = [group["lr"] for group in optimizer.param_groups]
        kept = [optimizer.state.get(p, {}) for p in parameters]
        states = [state[name] for state in kept for name in sorted(state)]
        return {
            "weights": digest(parameters),
            "optimizer": digest(states),
            "rates": digest(rates),
            "random": random_digest(),
        }


def digest(values: list[Any]) -> str:
    """Return a hash of the bits of tensors and numbers."""
    import torch

    total = hashlib.sha256()
    for value in values:
        own = value.to_local() if hasattr(value, "to_local") else value  # what this rank holds of it
        tensor = own.detach().cpu().contiguous() if isinstance(own, torch.Tensor) else None
        total.update(repr(value).encode() if tensor is None else tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def random_digest() -> str:
    """Return a hash of the states that random numbers are drawn from."""
    import numpy as np
    import torch

    numpy_state = np.random.get_state(legacy=True)
    states = repr(random.getstate()) + repr(
        [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state]
    )
    return hashlib.sha256(states.encode() + torch.get_rng_state().numpy().tobytes()).hexdigest()


def elsewhere(tree: ast.Module, run_dir: str) -> ast.Module:
    """Give an ejected script another folder for its run."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "RUN_DIR":
            node.value = ast.Constant(run_dir)
    takers = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "folder" in [argument.arg for argument in node.args.kwonlyargs]
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in takers:  # a script that computes it hands it over
            for keyword in (keyword for keyword in call.keywords if keyword.arg == "folder"):
                keyword.value = ast.Constant(run_dir)
    return ast.fix_missing_locations(tree)


UNLIKELY = 738_201_946  # a seed that no script has, so that one whose seed was lost differs


def seed_all(seed: int) -> None:
    """Seed the generators that a script may draw from."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def main(report: str, updates: str, run_dir: str, blocked: str, script: str, *arguments: str) -> None:
    """Run a script and write the report."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    watcher = Watcher(int(updates))
    register_optimizer_step_post_hook(watcher.updated)
    if blocked != "-":
        sys.meta_path.insert(0, Blocker(blocked))
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    seed_all(UNLIKELY)  # a script that leaves its seeds to chance has the same in both processes
    tree = ast.parse(Path(script).read_text())
    if blocked != "-":
        tree = elsewhere(tree, run_dir)
    else:
        from sheer.launch import overriding

        stack = contextlib.ExitStack()
        stack.enter_context(overriding({"run_dir": run_dir}))
    module = ModuleType("__main__")
    module.__file__ = script
    sys.modules["__main__"] = module
    ended = False
    try:
        exec(compile(tree, script, "exec"), vars(module))
        ended = True
    except Enough:
        pass
    except SystemExit as error:
        ended = not error.code
        if error.code:
            raise
    rank = os.environ.get("RANK", "0")
    Path(report if rank == "0" else f"{report}.{rank}").write_text(
        json.dumps({"updates": watcher.updates, "ended": ended})
    )
    sys.stdout.flush()
    os._exit(0)  # workers and exit handlers of a script that was cut off are not waited for


if __name__ == "__main__":
    main(*sys.argv[1:])
