"""What the ejector knows of ranks: on one process there are none, and all that is for several goes."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from sheer.eject.expressions import dotted, is_constant, parsed
from sheer.eject.facts import Facts
from sheer.eject.script import Script
from sheer.eject.source import Definition

Answer = Callable[[ast.Call], ast.expr | None]

HOLDERS = ("ranks", "run.ranks", "self.run.ranks", "info.ranks", "self.ranks", "self._ranks")
"""What a function may call the ranks that train together."""

STEPPERS = ("run.stepper", "self.run.stepper")
"""What it may call the module that runs a step on several ranks."""

AGREEMENTS: Mapping[str, ast.expr] = {name: ast.Constant(None) for name in ("run.agreement", "self.run.agreement")}
"""What leads ranks to stop at one step when one of them is told to: no script has it."""

ALONE: Mapping[str, ast.expr] = {
    name: ast.Constant(None) for name in (*HOLDERS, *STEPPERS, *AGREEMENTS, "parallelize", "self.shares")
}
"""What is None in the run of one process."""

ANSWERS_ALONE: Mapping[str, Answer] = {
    **{name: lambda call: ast.Constant(None) for name in ("form_ranks", "evaluator_of", "StopAgreement")},
    "backward_of": lambda call: parsed("backward"),
    **{name: lambda call: call.args[0] for name in ("own_device", "whole", "local", "like_its_parameter")},
    "step.holding": lambda call: ast.Call(parsed("StepBatch"), call.args, []),
    "own_state": lambda call: call.args[-1],
}
"""What calls give there."""

TWINS_TOGETHER = {
    "Ranks": "PlainRanks",
    "StepBatch": "PlainStepBatch",
    "own_device": "plain_own_device",
    "repoint": "plain_repoint",
    "report": "plain_rank_zero_report",
    "same_buffers": "plain_same_buffers",
    "whole": "plain_whole",
}
"""Definitions, and what a script for several ranks gets in their place."""

STEP_MODULE = frozenset({"forward", "model"})
"""What PyTorch reads of the module whose forward is a step."""

TAKE_BATCHES = ("begin_step", "backward", "end_step", "count_batches", "parts_of_rank")
"""Functions that are given what a step trains on as a whole."""


def is_ddp(parallel: Mapping[str, Any]) -> bool:
    """Whether each rank holds the whole model."""
    return bool(parallel["dp_shard"] == parallel["tp"] == 1)


def known_together(parallel: Mapping[str, Any]) -> dict[str, ast.expr]:
    """Return what is known of the ranks of a run, by what functions call them."""
    known: dict[str, ast.expr] = {**AGREEMENTS}
    for holder in HOLDERS:
        known |= {f"{holder}.parallel.{name}": ast.Constant(parallel[name]) for name in ("pp", "cp")}
        known[f"{holder}.uses_ddp"] = ast.Constant(is_ddp(parallel))
        known[f"{holder}.reports"] = ast.Constant(True)
        known[f"{holder}.averaged"] = parsed(f"{holder}.data_ranks")
        known[f"{holder}.stream"] = parsed(f"{holder}.data_rank")
        if parallel["tp"] > 1:
            known[f"{holder}.reports"] = parsed(f"{holder}.rank % {parallel['tp']} == 0")
        else:
            known |= {
                f"{holder}.data_rank": parsed(f"{holder}.rank"),
                f"{holder}.data_ranks": parsed(f"{holder}.world_size"),
            }
    return known


def answers_together(facts: Facts, parallel: Mapping[str, Any]) -> dict[str, Answer]:
    """Return what calls give where several ranks train together."""
    ddp, one_mesh = is_ddp(parallel), parallel["tp"] == 1
    device = facts.settings["device"]
    answers: dict[str, Answer] = {
        "form_ranks": lambda call: parsed(f"PlainRanks({places(parallel)})"),
        "divide": lambda call: parsed(divided(facts, parallel)),
        "agreed": decided_alike,
        "find_checkpoint": lambda call: ast.Constant(None),
        **dict.fromkeys(("metrics.read", "run.metrics.read"), read_by_all),
        "first_of": lambda call: call.args[1] if is_constant(call.args[1], None) else None,
        "batches_of": lambda call: ast.Call(parsed("plain_dealt"), [*call.args[:3], ast.Constant(not ddp)], []),
        "is_counted": lambda call: ast.Compare(call.args[1], [ast.Gt()], [ast.Constant(0)]),
        "evaluate_on_ranks": lambda call: ast.Call(parsed("step_on_ranks"), [call.args[0], *call.args[3:]], []),
        "backward_of": lambda call: parsed("backward"),
        "StopAgreement": lambda call: ast.Constant(None),
        "asked_for": lambda call: call.args[1],  # a reason that one rank alone may have was refused
        "contents": lambda call: parsed("[]"),
        "run.watch.check": lambda call: parsed("plain_check_on_ranks(run.watch)"),
        "cast": lambda call: call.args[1],
        "mean_over_ranks": lambda call: averaged(call, parallel),
    }
    if ddp:
        answers["evaluator_of"] = lambda call: ast.Constant(None)
    else:
        answers["evaluator_of"] = lambda call: call.args[0]
    if ddp or one_mesh:
        whole = "" if ddp else ".full_tensor()"
        answers["global_norm"] = lambda call: parsed(
            f"get_total_norm({ast.unparse(ast.Tuple([call.args[0], *call.args[2:]], ast.Load()))[1:-1].rstrip(',')}){whole}"
        )
        answers["clip_to"] = lambda call: ast.Call(parsed("clip_grads_with_norm_"), call.args, [])
        answers["clip_values_to"] = lambda call: ast.Call(parsed("clip_grad_value_"), call.args, [])
    if device == "cpu" or ":" in device:
        answers["own_device"] = lambda call: call.args[0]
    if facts.settings["micro_batch_size"] is None:
        answers["parts_of_rank"] = lambda call: call.args[1]
        if facts.settings["accumulate_grad_batches"] == 1:
            answers["synchronised_last"] = lambda call: call.args[1]
    twins = twins_together(parallel)
    return answers | {twins[name]: answer for name, answer in answers.items() if name in twins}


def twins_together(parallel: Mapping[str, Any]) -> dict[str, str]:
    """Return definitions, and what a script for several ranks gets in their place."""
    last = "plain_synchronised_ddp" if is_ddp(parallel) else "plain_synchronised_shards"
    return {**TWINS_TOGETHER, "synchronised_last": last}


def needless_together(facts: Facts, parallel: Mapping[str, Any]) -> frozenset[str]:
    """Return functions whose calls are left out of such a script."""
    own = {"repoint", "plain_repoint"} if is_ddp(parallel) or "optimizer" in facts.functions else set()
    own |= set() if facts.has_buffers else {"same_buffers", "plain_same_buffers"}
    return frozenset({"metrics.take_back", "run.metrics.take_back", "open_output", *own})


def decided_alike(call: ast.Call) -> ast.expr | None:
    """Return what `agreed` gives where nothing differs from rank to rank, or only rank 0 will use it."""
    value = call.args[1]
    if isinstance(value, ast.IfExp) and isinstance(value.orelse, (ast.Constant, ast.Dict)):
        return value.orelse
    return value if isinstance(value, (ast.Constant, ast.Dict)) else ast.Call(parsed("from_rank_zero"), [value], [])


def read_by_all(call: ast.Call) -> ast.expr:
    """Return the call that reads metrics over all ranks."""
    assert isinstance(call.func, ast.Attribute)
    counts = ast.Attribute(call.args[0], "reports", ast.Load())
    return ast.Call(parsed("plain_read_on_ranks"), [call.func.value, counts], [])


def sizes(parallel: Mapping[str, Any]) -> dict[str, str]:
    """Return the dimensions of the mesh, each with the number of ranks along it; one of them depends on how many there are."""
    given = {name: parallel[name] for name in ("dp_replicate", "dp_shard", "tp")}
    left = [name for name in given if given[name] == -1]
    fixed = math.prod(size for size in given.values() if size != -1)
    free = "dist.get_world_size()" + (f" // {fixed}" if fixed > 1 else "")
    return {
        name: free if name in left else repr(size) for name, size in given.items() if size != 1 or name == "dp_shard"
    }


def places(parallel: Mapping[str, Any]) -> str:
    """Return the arguments that say where a rank is among the others."""
    tp = parallel["tp"]
    by_tp = f" // {tp}" if tp > 1 else ""
    given = ["rank=dist.get_rank()", "world_size=dist.get_world_size()"]
    given += [f"data_rank=dist.get_rank(){by_tp}", f"data_ranks=dist.get_world_size(){by_tp}"]
    if is_ddp(parallel):
        return ", ".join([*given, "mesh=None"])
    mesh = sizes(parallel)
    given.append(f"mesh=plain_mesh(compute.device, ({', '.join(mesh.values())},), {tuple(mesh)!r})")
    return ", ".join(given)


def divided(facts: Facts, parallel: Mapping[str, Any]) -> str:
    """Return the call that divides the model over the ranks."""
    if is_ddp(parallel):
        return f"plain_ddp(model, compute.device, {parallel['find_unused_parameters']})"
    mesh, is_split = [name for name in sizes(parallel) if name != "tp"], parallel["tp"] > 1
    shared = f"ranks.mesh[{', '.join(map(repr, mesh))}]" if is_split else "ranks.mesh"
    mixed = facts.settings["precision"] == "bf16-mixed"
    dtypes = {
        "param_dtype": parallel["param_dtype"] or ("bfloat16" if mixed else None),
        "reduce_dtype": parallel["reduce_dtype"] or ("float32" if mixed else None),
    }
    policy = [f"{name}=torch.{value}" for name, value in dtypes.items() if value is not None]
    policy += ["cast_forward_inputs=False"] if facts.settings["precision"].endswith("-mixed") else []
    return (
        f"plain_shard(model, {units(parallel)}, {shared}, MixedPrecisionPolicy({', '.join(policy)}), {parallel['reshard_after_forward']}, "
        f"{facts.settings['compile']!r}, {'ranks.mesh[' + repr('tp') + ']' if is_split else None}, {'parallelize' if is_split else '{}'})"
    )


def units(parallel: Mapping[str, Any]) -> str:
    """Return the expression for the modules that are sharded each by itself."""
    if parallel["shard_modules"] is not None:
        chosen = tuple(parallel["shard_modules"])
        return f"[m for m in children_first(model) if type(m).__name__ in {chosen!r} and m is not model]"
    if parallel["shard_min_parameters"] is not None:
        return f"large_modules(model, {parallel['shard_min_parameters']})"
    return "repeated_blocks(model)"


def averaged(call: ast.Call, parallel: Mapping[str, Any]) -> ast.expr:
    """Return the call for the mean of a count over ranks."""
    given = [call.args[0], parsed("run.compute.device"), call.args[1]]
    dimensions = tuple(name for name in sizes(parallel) if name != "tp")
    if is_ddp(parallel) or (len(dimensions) == 1 and parallel["tp"] == 1):
        return ast.Call(parsed("plain_mean_over_all"), given, [])
    return ast.Call(parsed("plain_mean_over_ranks"), [*given, parsed(repr(dimensions))], [])


class _Parts(ast.NodeTransformer):
    """Reads a rank's part of a step's batch, where that is not handed on as a whole."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if dotted(node.func) in TAKE_BATCHES:
            node.args = [value if _is_batch(value) else self.visit(value) for value in node.args]
            return node
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return node if _is_batch(node.value) else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Attribute(node, "parts", ast.Load()) if _is_batch(node) and isinstance(node.ctx, ast.Load) else node


def _is_batch(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "batch"


def with_shares(library: Mapping[str, Definition]) -> dict[str, ast.FunctionDef]:
    """Return the functions that take a step's batch, reading it from a record."""
    functions: dict[str, ast.FunctionDef] = {}
    for name in TAKE_BATCHES:
        node = copy.deepcopy(library[name].node)
        assert isinstance(node, ast.FunctionDef)
        node.body = [_Parts().visit(statement) for statement in node.body]
        functions[name] = node
    return functions


def fewest(parallel: Mapping[str, Any] | None) -> int:
    """Return how many ranks a script needs at least, so that each way of using them is there."""
    if parallel is None:
        return 1
    given = [parallel[name] for name in ("dp_replicate", "dp_shard", "tp")]
    return math.prod(2 if size == -1 else size for size in given)


def refuse_on_ranks(script: Script, facts: Facts) -> None:
    """Raise `Refusal` for what has no form yet where several ranks train together."""
    if facts.parallel is None:
        return
    settings, call = facts.settings, script.at(facts.call)
    for is_refused, what in (
        (facts.kind == "start", "a loop of your own cannot be ejected for several ranks yet. Eject it for one (parallel=\"none\")."),
        (settings["checkpoint"] is not None, "saving cannot be ejected for several ranks yet. Set checkpoint=False to eject a script for several ranks."),
        (settings["resume"] is not None, "going on cannot be ejected for several ranks yet. Leave resume out."),
        (settings["max_time"] is not None, "each rank has a clock of its own, so they could not agree on the end. Give max_steps or max_epochs."),
        (not facts.plain_data or "workers" in facts.reads, "several ranks read the training data from DataLoader(dataset, batch_size=...) alone, without workers and limits."),
        (facts.parallel["pp"] > 1 or facts.parallel["cp"] > 1, "pp and cp cannot be ejected yet. tp, dp_shard and dp_replicate can."),
        (facts.parallel["cpu_offload"], "cpu_offload cannot be ejected yet. Leave it out."),
        (facts.parallel["tp"] > 1 and "parallelize" in facts.none, "tp divides layers by a plan, and fit was given none. Pass parallelize={...}."),
        (bool(facts.uses) and set(facts.uses) != {"Mean"}, "metrics that are objects, pictures and texts cannot be ejected for several ranks yet. Return numbers."),
        (bool(facts.others), "test, validate and predict cannot be ejected for several ranks yet. Do it in a script of its own, on one."),
        (facts.stops_alone != "", f"{facts.stops_alone} may end the run on a step, which ranks agree on in the library alone. Let it do so by on_validation_end or on_epoch_end."),
        (facts.refused_on_ranks != "", facts.refused_on_ranks),
    ):  # fmt: skip
        if is_refused:
            raise script.refusal(call, what)
