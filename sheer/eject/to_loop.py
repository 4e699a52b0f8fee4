"""`sheer eject --to loop`: a call of `fit` written out as a loop of one's own, over the same parts."""

from __future__ import annotations

import ast

from sheer.eject.emit import formatted
from sheer.eject.facts import Facts
from sheer.eject.script import Script


def with_loop(script: Script, facts: Facts) -> str:
    """Return a script whose call of `fit` is the loop that it stands for.

    Raises:
        Refusal: the call cannot be written so; the message says why.
    """
    call, trainer = script.at(facts.call), script.at(facts.trainer)
    statement, parent = script.statement(call), script.parents[id(call)]
    if facts.kind != "fit":
        raise script.refusal(call, "this is a loop of your own already. --to torch takes the library out of it.")
    if facts.settings["validate_first"]:
        raise script.refusal(trainer, "validate_first has no place in a loop of your own. Take it out.")
    if facts.settings["max_time"] is not None and "val_loader" not in facts.none:
        raise script.refusal(
            trainer, "which step is the last under max_time is not known before it ends. Give max_steps."
        )
    if not (isinstance(statement, (ast.Expr, ast.Assign)) and parent is statement):
        raise script.refusal(call, "give the result of fit a name, on a line of its own: result = trainer.fit(...).")
    names = ("model", "step", "train_loader", "val_loader")
    given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
    text = {name: script.source(value) for name, value in given.items()}
    taken = script.names_seen_in(script.function_of(call))
    run, batch = ("run" if "run" not in taken else "training"), ("batch" if "batch" not in taken else "one_batch")
    assert isinstance(call.func, ast.Attribute)
    own = isinstance(given["optimizer"], ast.Name) and "optimizer" not in facts.functions
    optimizer = text["optimizer"] if own else f"{run}.optimizers['optimizer']"
    scheduled = f", schedulers={{'optimizer': {text['scheduler']}}}" if "scheduler" not in facts.none else ""
    if "scheduler" in facts.functions and facts.settings["max_steps"] is None:
        scheduled += f", total_steps={_count(facts, text['train_loader'])}"
    divided = f", parallelize={text['parallelize']}" if "parallelize" not in facts.none else ""
    skipping = ", resume_by_skipping=True" if facts.skips else ""
    lines = [
        f"{run} = {script.source(call.func.value)}.start({text['model']}, optimizers={{'optimizer': {text['optimizer']}}}{scheduled}{divided})",
        f"for {batch} in {run}.steps({text['train_loader']}{skipping}):",
        f"    {run}.update({optimizer}, {text['step']}, {batch})",
    ]
    if "val_loader" not in facts.none:
        every = facts.settings["validate_every_n_steps"]
        due = f"{run}.epoch_ends" if every is None else f"{run}.step % {every} == 0"
        step = text["step"] if "eval_step" in facts.none else text["eval_step"]
        lines += [f"    if {due} or {run}.is_last:", f"        {run}.evaluate({step}, {text['val_loader']})"]
    target = f"{script.source(statement.targets[0])} = " if isinstance(statement, ast.Assign) else ""
    lines.append(f"{target}{run}.finish()")
    written = formatted("\n".join(lines), 120 - statement.col_offset).rstrip()
    script.replace(statement, written.replace("\n", "\n" + " " * statement.col_offset))
    for keyword in trainer.keywords:
        if keyword.arg == "validate_every_n_steps" and call.func.value is not trainer:  # the loop says it now
            script.replace(keyword, "validate_every_n_steps=None")
    return script.edited()


def _count(facts: Facts, loader: str) -> str:
    """Return the number of steps as a reader would count it, or as it was counted."""
    settings = facts.settings
    plain = settings["accumulate_grad_batches"] == 1 and settings["limit_train_batches"] is None
    if plain and loader.isidentifier() and not settings["overfit_batches"]:
        return f"{settings['max_epochs']} * len({loader})"
    return repr(facts.total_steps)
