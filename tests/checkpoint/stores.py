"""Stores that checkpoints are kept in: fsspec's own in memory and on a disk, and a real S3 server on this machine."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NUMBERS = itertools.count()


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start moto's server, with a bucket called `bucket`, and give the environment in which S3 is that server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        import s3fs

        s3fs.S3FileSystem(use_listings_cache=False).mkdir("bucket")
        yield environment
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


def url_in(kind: str, folder: Path) -> str:
    """Return where nothing is yet."""
    number = next(NUMBERS)
    return {"memory": f"memory://bucket/{number}", "local": f"local://{folder}/{number}", "s3": f"s3://bucket/{number}"}[kind]  # fmt: skip


def system_of(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url, use_listings_cache=False)
    system.invalidate_cache()
    return system, path


def objects(url: str) -> list[str]:
    """Return the objects at a URL."""
    system, path = system_of(url)
    try:
        return sorted(str(found).removeprefix(f"{path}/") for found in system.find(path))
    except FileNotFoundError:
        return []


def flip(url: str) -> None:
    """Change a bit of an object."""
    system, path = system_of(url)
    content = bytearray(system.cat_file(path))
    content[-3] ^= 1
    system.pipe_file(path, bytes(content))
