"""Going back: the run is put to its last good checkpoint, and goes on without the batches of the steps that went bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sheer.checkpoint.read import read_shared_state
from sheer.checkpoint.store import committed, read_manifest
from sheer.checks import metrics_in
from sheer.data.batch import StepBatch
from sheer.data.feed import end_without, ranges_in
from sheer.distributed.agree import agreed, is_other_rank
from sheer.errors import BadStepsError, NonFiniteError
from sheer.metrics import Metrics
from sheer.nonfinite import Watch
from sheer.random import set_random_state
from sheer.resume import forget_copies, open_data, restore, verified
from sheer.run import Run
from sheer.settings import Rollback, Settings
from sheer.trail import Trained


def note_step(run: Run, batch: StepBatch, ends_epoch: bool) -> None:
    """Note which batches the step that ends was trained on, before they are counted, and its loss. Nothing is read."""
    assert run.trail is not None
    progress = run.progress
    place = Trained(progress.epoch, progress.batch, progress.batch + len(batch) - 1, ends_epoch)
    run.trail.add(progress.step, place, run.metrics.added_in_step("loss") if run.trail.spike is not None else None)


def go_back(cfg: Settings, run: Run, bad: BadStepsError) -> None:
    """Put the run to its newest good checkpoint from before the first bad step, as a resume would; the steps go on from there.

    All but the counts of what was lost is as it was then: weights, optimizers, schedulers, callbacks, random states, metrics, logs.

    Raises:
        NonFiniteError: it went back as often as it may, or there is no such checkpoint.
    """
    assert isinstance(cfg.nonfinite, Rollback) and run.trail is not None and run.data is not None
    times, most, seconds = run.progress.rollbacks + 1, cfg.nonfinite.max_times, run.progress.seconds
    if times > most:
        raise NonFiniteError(may_not_again(run, bad, most))
    places = [run.trail.places[step] for step in range(bad.first, bad.last + 1)]
    left_out = with_places(run.progress.left_out, places)
    path, manifest = checkpoint_before(run, bad, places, left_out)

    run.loggers.close()
    for metric in [*run.metrics.objects(), *metrics_in(run.model)]:
        metric.reset()
    run.metrics, run.watch = Metrics(), Watch()
    run.trail.clear()
    state = restore(as_resumed(cfg, run), run, path, manifest)
    forget_copies(run, path)
    run.progress.rollbacks, run.progress.left_out = times, left_out
    run.progress.seconds, run.progress.stopped_by = seconds, None
    set_random_state(state["random"])
    run.data.source.begin_anew()
    run.data.owed, run.data.goes_back = None, open_data(run.data, state)
    run.saver.open(run.info.run_id, run.progress.step)

    info = dataclasses.replace(run.info, start_step=run.progress.step)
    for callback in run.callbacks.values():
        if hasattr(callback, "on_fit_start"):  # where some take up what they have loaded
            callback.on_fit_start(run.model, run.optimizers, info)
    run.loggers.start(info)
    run.console.say(
        f"rollback {times} of {most}: {bad.short}; back to step {run.progress.step:,}, and on without {describe_batches(places)}"
    )


def may_not_again(run: Run, bad: BadStepsError, most: int) -> str:
    """Say that a run went back as often as it may, what it left out so far, and what may help."""
    assert run.trail is not None
    out = with_places(run.progress.left_out, [run.trail.places[step] for step in range(bad.first, bad.last + 1)])
    places = [Trained(epoch, first, last, False) for epoch, first, last in out]
    return (
        f"The {bad.short}. The run went back {most} time{'s' if most > 1 else ''} before, and may not again. Bad were {describe_batches(places)}. Look at "
        f"those batches, lower the learning rate, or resume with Rollback(max_times={2 * most})."
    )


def as_resumed(cfg: Settings, run: Run) -> Settings:
    """Return the settings with which this run would be resumed in another process."""
    return dataclasses.replace(cfg, resume="auto", run_dir=str(run.info.run_dir))


def checkpoint_before(
    run: Run, bad: BadStepsError, places: Sequence[Trained], left_out: Sequence[Sequence[int]]
) -> tuple[Path, Mapping[str, Any]]:
    """Return the newest checkpoint of the run from before the bad steps that verifies on all ranks, and its manifest.

    Raises:
        NonFiniteError: there is none.
    """
    disk, ranks = run.saver.disk, run.ranks
    saves = [] if is_other_rank(ranks) else committed(disk)
    own = [one.path.name for one in saves if one.manifest["run_id"] == run.info.run_id and one.step < bad.first]
    for path in verified(disk, agreed(ranks, own), ranks):
        manifest = read_manifest(path)
        if can_go_on_from(read_shared_state(path, manifest)["progress"], places, left_out):
            return path, manifest
    raise NonFiniteError(
        f"{bad} There is no checkpoint in {disk} that the run could go back to: those that are left are damaged, or nothing of the epoch is left "
        "between them and the bad steps, which are its last. Keep more: Checkpoint(every_n_steps=..., keep_last=...)."
    )


def can_go_on_from(saved: Mapping[str, Any], places: Sequence[Trained], left_out: Sequence[Sequence[int]]) -> bool:
    """Whether from where `saved` was each epoch that the bad steps ended still has a step, to be its last: then that one ends it.

    One that was saved in the middle of a validation is passed over: the callbacks have begun it.
    """
    if saved["owes_validation"]:
        return False
    for place in places:
        start = saved["batch"] if saved["epoch"] == place.epoch else 0
        if place.ends_epoch and end_without(ranges_in(left_out, place.epoch), place.last + 1) <= start:
            return False
    return True


def with_places(left_out: Sequence[Sequence[int]], places: Sequence[Trained]) -> list[list[int]]:
    """Return ranges of batches, [epoch, first, last], with those of some steps added; what touches is put together."""
    ranges: list[list[int]] = []
    for epoch, first, last in sorted([*map(list, left_out), *([p.epoch, p.first, p.last] for p in places)]):
        if ranges and ranges[-1][0] == epoch and ranges[-1][2] + 1 == first:
            ranges[-1][2] = last
        else:
            ranges.append([epoch, first, last])
    return ranges


def describe_batches(places: Sequence[Trained]) -> str:
    """Say which batches steps were trained on: `batches 30 to 31 of epoch 2 (both from 0)`."""
    said = [
        f"batch {first} of epoch {epoch}" if first == last else f"batches {first} to {last} of epoch {epoch}"
        for epoch, first, last in with_places([], places)
    ]
    return f"{' and '.join(said)} (counted from 0)"
