"""A run's checkpoints in an object store, or anything else that fsspec reaches. Nothing can be renamed there: the manifest, which is
written last, is what commits."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from sheer.checkpoint.disk import Disk, step_of, unused_name
from sheer.errors import MissingPackageError, RunError

FETCHED = "fetched-"  # how folders begin that hold what was fetched, until it is read
FLAT = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss")  # stores that know no folders


def url_of(source: str | Path) -> str | None:
    """Return the URL that a source is, as of a `Path` made of one, which has lost a slash; None: it is a path of this machine."""
    match = re.fullmatch(r"([a-z][a-z0-9+.-]+)(::[^:]+)*:/+(.*)", str(source))
    if match is None or match[2]:
        return str(source) if match is not None else None
    return f"{match[1]}://{'/' if match[1] in ('file', 'local') else ''}{match[3].rstrip('/')}"


def folder_at(place: str, here: Path | None, rank: int = 0, part: tuple[int, int] = (0, 1)) -> Folder:
    """Return the folder of checkpoints at a path or a URL; `here` and the rest are for a URL, see `Bucket`."""
    url = url_of(place)
    return Disk(Path(place), part) if url is None else Bucket(url, here, rank, part)


def share_of_machine(rank: int, world_size: int) -> tuple[int, int]:
    """Return which of the ranks on its machine a rank is, and how many there are, as its launcher says; they share what is fetched."""
    if world_size == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


class Bucket:
    """A folder of checkpoints at a URL, with the methods of `Disk`.

    Args:
        url: of the folder, such as `s3://bucket/runs/digits`.
        here: a folder of this machine, in which files wait to be sent, and in which those lie that were fetched; None: one is made.
        rank: which rank this is; each has files of its own.
        part: which part of the files this process fetches and verifies: (k, n) is every n-th from the k-th on.
    """

    patience = 0.2  # seconds between two looks at whether another rank has written

    def __init__(self, url: str, here: Path | None, rank: int = 0, part: tuple[int, int] = (0, 1)) -> None:
        self.url, self.here, self.rank, self.part = url, here, rank, part

    def __str__(self) -> str:
        return self.url

    @functools.cached_property
    def opened(self) -> tuple[Any, str]:
        """The file system, and the path of the folder in it."""
        try:
            from fsspec.core import url_to_fs

            found: tuple[Any, str] = url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise MissingPackageError(
                f"{self.url} needs fsspec, and the package of that store: pip install 'sheer[remote]' for S3. ({error})"
            ) from error
        except ValueError as error:
            raise RunError(f"{self.url} is of no kind that fsspec knows: {error}.") from error
        return found

    @contextmanager
    def _reached(self, path: str) -> Iterator[tuple[Any, str]]:
        """Give the file system and a path in it; what goes wrong there is told as an error of ours, but for what is not there."""
        system, root = self.opened
        try:
            system.invalidate_cache()
            yield system, f"{root}/{path}" if path else root
        except (FileNotFoundError, RunError):
            raise
        except Exception as error:  # each store has errors of its own
            raise RunError(
                f"{self.url}/{path} cannot be used: {error!r}. Are the credentials and the address of the store set?"
            ) from error

    def _listed(self, path: str) -> dict[str, dict[str, Any]]:
        with self._reached(path) as (system, there):
            try:
                found = system.ls(there, detail=True)
            except FileNotFoundError:
                return {}
        return {str(item["name"]).rstrip("/").rsplit("/", 1)[-1]: item for item in found}

    def names(self) -> list[str]:
        """Return the folders that may be checkpoints, or the rest of a save that was cut off, in the order of their steps."""
        found = [(step_of(name), name) for name, item in self._listed("").items() if item["type"] == "directory"]
        return [name for _, name in sorted((key, name) for key, name in found if key is not None)]

    def unused(self, step: int) -> str:
        """Return a name for a new checkpoint of a step, behind those of earlier saves of it."""
        return unused_name(self._listed(""), step)

    def begin(self, name: str) -> Path:
        """Make the folder in which this rank's files of a checkpoint wait to be sent; what is left of another goes."""
        folder = self._beside(f"sending-{self.rank:05d}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def settle(self, name: str, files: list[str]) -> None:
        """Send the files of a checkpoint, and wait until they are there."""
        folder = self._beside(f"sending-{self.rank:05d}")
        for file in files:
            with self._reached(f"{name}/{file}") as (system, there):
                try:
                    if not is_flat(system):
                        system.makedirs(there.rsplit("/", 1)[0], exist_ok=True)
                    system.put_file(str(folder / file), there)
                    sent = system.size(there)
                except FileNotFoundError as error:
                    raise RunError(f"{self.url} is not there: {error}. Make the bucket first.") from error
                if sent != (folder / file).stat().st_size:
                    raise RunError(f"{self.url}/{name}/{file} was not sent as a whole.")
        shutil.rmtree(folder)

    def path(self, name: str) -> Path:
        """Return where a checkpoint is, as what reads checkpoints takes it: `Path` makes one slash of two."""
        return Path(self.url) / name

    def pointed_path(self, link: str) -> Path | None:
        """Return the checkpoint that a link points at; None where there is no such link."""
        name = self.pointed(link)
        return self.path(name) if name is not None else None

    def read(self, name: str, file: str) -> bytes | None:
        """Return what is in a small file of a checkpoint; None where there is none."""
        with self._reached(f"{name}/{file}" if name else file) as (system, there):
            try:
                return bytes(system.cat_file(there))
            except FileNotFoundError:
                return None

    def sizes(self, name: str) -> dict[str, int]:
        """Return the sizes of what is in a checkpoint's folder, in bytes."""
        return {file: int(item["size"] or 0) for file, item in sorted(self._listed(name).items())}

    def when(self, name: str, file: str) -> float:
        """Return when a file of a checkpoint was written, in seconds since 1970."""
        with self._reached(f"{name}/{file}") as (system, there):
            return float(system.modified(there).timestamp())

    def write(self, name: str, file: str, text: str) -> None:
        """Write a small file, in one request."""
        with self._reached(f"{name}/{file}" if name else file) as (system, there):
            if not is_flat(system):
                system.makedirs(there.rsplit("/", 1)[0], exist_ok=True)
            system.pipe_file(there, text.encode())

    def pointed(self, link: str) -> str | None:
        """Return the checkpoint that a link points at; None where there is no such link. A link is a file that holds a name."""
        name = (self.read("", link) or b"").decode(errors="replace")
        return name if step_of(name) is not None else None

    def point(self, link: str, name: str) -> None:
        """Point a link of the folder at a checkpoint."""
        self.write("", link, name)

    def unpoint(self, link: str) -> None:
        """Remove a link of the folder."""
        self._delete(link)

    def remove(self, name: str, manifest: str) -> None:
        """Delete a checkpoint; its manifest goes first, so that a cut leaves none that is half there."""
        self._delete(f"{name}/{manifest}")
        with self._reached(name) as (system, there):
            with suppress(FileNotFoundError):
                system.rm(there, recursive=True)

    def _delete(self, path: str) -> None:
        with self._reached(path) as (system, there):
            if system.exists(there):
                system.rm_file(there)

    def bring(self, name: str, files: Sequence[str]) -> Path:
        """Fetch files of a checkpoint, and return the local folder that they are in, until `forget`. What is missing there is missing here."""
        folder = self._beside(self._fetched()) / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            temporary = folder / f".{file}.{os.getpid()}"
            with self._reached(f"{name}/{file}") as (system, there):
                try:
                    system.get_file(there, str(temporary))
                except FileNotFoundError:
                    continue
            temporary.replace(folder / file)
        return folder

    def forget(self) -> None:
        """Delete what was fetched."""
        shutil.rmtree(self._beside(self._fetched()), ignore_errors=True)

    def _fetched(self) -> str:
        return f"{FETCHED}{self.rank - self.part[0]:05d}"  # the ranks of a machine share it: the first of them names it

    def _beside(self, name: str) -> Path:
        if self.here is None:
            self.here = Path(tempfile.mkdtemp(prefix="sheer-"))
        return self.here / name


def is_flat(system: Any) -> bool:
    """Whether a file system knows no folders, so that none is to be made."""
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    return any(protocol in FLAT for protocol in protocols)


Folder: TypeAlias = Disk | Bucket  # what a run's checkpoints are in
