"""Saves beside training: a step waits for a copy into the host's memory, and a thread writes it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread

import torch
from safetensors import SafetensorError
from torch import Tensor

from sheer.checkpoint.bucket import Folder
from sheer.checkpoint.store import (
    MANIFEST,
    Content,
    Retention,
    Saved,
    committed,
    manifest_of,
    numbers_in,
    point_links,
    prune,
    staying_of,
    write_checkpoint,
)
from sheer.errors import RunError

# The files that a save writes, and what safetensors calls one until it is whole.
_OWN = re.compile(r"\.?(model|training|optimizer|state|rank|manifest)[-.].*|\.tmp\w{6}")


class Saver:
    """Writes the checkpoints of a run, one at a time, and deletes those that they make superfluous.

    Args:
        disk: the folder that they are in.
        keep: which stay.
        rank: which of the ranks this is; the first commits and deletes.
        device: where the state is.
        beside: whether training goes on while a checkpoint is written.
        timeout: how many seconds rank 0 waits for the other ranks' parts.
    """

    def __init__(
        self, disk: Folder, keep: Retention, rank: int, device: torch.device, *, beside: bool, timeout: float
    ) -> None:
        self.disk, self.keep, self.rank, self.beside, self.timeout = disk, keep, rank, beside, timeout
        self.saves: list[Saved] = []  # that are there, oldest first; known on the first rank
        self.expected: list[Saved] = []  # the same, with the one that is being written
        self._staging = Staging(device)
        self._rest: list[str] = []  # folders to be deleted: cut off, or found damaged
        self._preparing: Beside | None = None
        self.writing: Beside | None = None  # what was given, and was not waited for yet
        self._given = (0, Path())  # step and folder of what is being written
        self._gone = Event()

    def open(self, run_id: str, step: int) -> None:
        """Learn which checkpoints there are of a run, which goes on from a step."""
        if self.rank > 0:
            return
        own = [saved for saved in committed(self.disk, quiet=True) if saved.manifest["run_id"] == run_id]
        self.saves = [saved for saved in own if saved.step <= step]
        self.expected = staying_of(self.saves, self.keep)
        point_links(self.disk, self.saves, self.keep)  # a process may have been killed behind the commit
        known = {saved.path.name for saved in self.saves}
        names = [name for name in self.disk.names() if name not in known]
        self._rest = [name for name in names if is_rest(self.disk, name, run_id)]

    def name_for(self, step: int) -> str:
        """Return the name of a new checkpoint of a step; what is left of saves that were cut off is deleted before."""
        cut_off = [rest for rest in self._rest if self.disk.read(rest, MANIFEST) is None]
        for rest in cut_off:
            self.disk.remove(rest, MANIFEST)
            self._rest.remove(rest)
        return self.disk.unused(step)

    def prepare(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Have the memory made, beside training, that tensors of these groups are copied into."""
        self._preparing = Beside(functools.partial(self._staging.make, groups))

    def save(self, name: str, content: Content, *, wait: bool) -> None:
        """Begin to save; return when the state is copied. No other save may be going on.

        Args:
            name: of the checkpoint.
            content: this rank's part of it.
            wait: whether `wait` is called next, so that nothing need be copied.
        """
        if self._preparing is not None:
            self._preparing.result()
        event: torch.Event | None = None
        if self.beside and not wait:
            tensors, event = self._staging.copy(content.tensors)
        else:
            tensors = {group: independent(given) for group, given in content.tensors.items()}
        folder = self.disk.path(name)
        expected = Saved(folder, content.step, numbers_in(content.facts["metrics"]), {})
        self.expected = staying_of([*self.expected, expected], self.keep)
        self._given = content.step, folder
        self.writing = Beside(
            functools.partial(self._write, name, dataclasses.replace(content, tensors=tensors), event)
        )

    def _write(self, name: str, content: Content, event: torch.Event | None) -> None:
        if event is not None:
            event.synchronize()
        saved = write_checkpoint(self.disk, name, content, self.timeout, self._gone)
        if saved is not None:
            self.saves = prune(self.disk, [*self.saves, saved], self.keep)
            for rest in self._rest:
                self.disk.remove(rest, MANIFEST)
            self._rest = []

    def pointed_path(self, link: str) -> Path | None:
        """Return the checkpoint that `last` or `best` points at; None where there is none."""
        return self.disk.pointed_path(link)

    @property
    def is_written(self) -> bool:
        """Whether what was given is written, or failed, so that `wait` will not take long."""
        return self.writing is not None and self.writing.done()

    @property
    def has_failed(self) -> bool:
        """Whether what was given could not be written, as `wait` will say."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> tuple[int, Path] | None:
        """Wait until what is being written, if anything, is committed; return its step and folder.

        Raises:
            RunError: it could not be written; what there was before is as it was.
        """
        writing, self.writing = self.writing, None
        if writing is None:
            return None
        try:
            writing.result()
        except (OSError, SafetensorError) as error:
            older = ", ".join(saved.path.name for saved in self.saves) or "none"
            raise RunError(
                f"The checkpoint of step {self._given[0]} could not be written to {self.disk}: {error}. The older ones are as they were: {older}. "
                'Make room (Checkpoint(keep_last=..., keep_best=...) says how many stay), then go on with resume="auto".'
            ) from error
        return self._given

    def give_up(self) -> None:
        """Do not wait for the parts of other ranks any more: they may have failed."""
        self._gone.set()


class Beside:
    """A call in a thread of its own, which the process does not wait for when it is left in a hurry."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="sheer-saver", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # is raised where it is waited for
            self._error = error

    def done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def exception(self) -> BaseException | None:
        """Wait until it has ended, and return what it raised, if anything."""
        self._thread.join()  # to the very end: PyTorch aborts a process that ends while a thread frees tensors
        return self._error

    def result(self) -> None:
        """Wait until it has ended, and raise what it raised."""
        error = self.exception()
        if error is not None:
            raise error


def is_rest(disk: Folder, name: str, run_id: str) -> bool:
    """Whether a folder is the rest of a save, or a checkpoint of this run."""
    try:
        return bool(manifest_of(disk, name)["run_id"] == run_id)
    except RunError:
        return all(_OWN.fullmatch(file) for file in disk.sizes(name))


class Staging:
    """Memory of the host that tensors are copied into, the same for every save; pinned where they come from a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[tuple[str, str], Tensor] = {}

    def make(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make the memory for these tensors, and touch it, so that the first save finds it ready."""
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                self._copy_of(group, name, tensor).zero_()

    def copy(
        self, groups: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, dict[str, Tensor]], torch.Event | None]:
        """Return copies of tensors, and what says when they are there; None: they are."""
        copies: dict[str, dict[str, Tensor]] = {}
        for group, tensors in groups.items():
            copies[group] = {}
            for name, tensor in tensors.items():
                copies[group][name] = self._copy_of(group, name, tensor).copy_(tensor.detach(), non_blocking=True)
        if self.device.type == "cpu":
            return copies, None
        event = torch.Event(self.device)
        event.record()
        return copies, event

    def _copy_of(self, group: str, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get((group, name))
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            pinned = tensor.device.type != "cpu"
            copy = self._copies[group, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return copy


def independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU that share no memory, so that each name can be loaded by itself (tied weights are written twice)."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        storage = copy.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != copy.numel() * copy.element_size():
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        out[name] = copy
    return out
