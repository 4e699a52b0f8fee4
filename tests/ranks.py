"""Several ranks in one test: real processes, forked from a parent that has imported torch and never ran a backward."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "torch._dynamo.convert_frame",  # the first optimizer and the first update import it: a second for each process
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torch.profiler",
    "filelock",
    "safetensors.torch",
    "torchmetrics.classification",
    "hypothesis",
    "pytest",
    "sheer",
    "tests.distributed.task",
]
"""What ranks would each import for themselves, for longer than the tests take: the parent that they are forked from does it once."""


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 100.0) -> list[Any]:
    """Run a function of a test module on every rank, under the environment that torchrun makes, and return what each returned.

    Raises:
        AssertionError: a rank raised an error, died, or did not end in `timeout` seconds; it holds the traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, pipes, processes = free_port(), [], []
    for rank in range(world_size):
        here, there = context.Pipe(duplex=False)
        place = place_of(rank, world_size, port)
        process = context.Process(target=_rank, args=(there, str(Path.cwd()), place, function, arguments))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return _collected(pipes, timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def place_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment that torchrun makes for a rank of one machine."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in place.items()}


def _collected(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout)
        if not ready:
            left = [rank for rank in range(len(pipes)) if rank not in results]
            raise AssertionError(f"ranks {left} did not end within {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                error, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if error:
                raise AssertionError(f"rank {rank}:\n{error}")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, folder: str, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        message = (None, function(*arguments))
    except BaseException:
        message = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(message))  # whole: a tensor sent by `send` stays in memory that goes with the rank
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
