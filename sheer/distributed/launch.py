"""`sheer run --nproc-per-node N`: ranks on this machine, started and watched by torch's elastic agent."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sheer.distributed.hang import name_ranks
from sheer.distributed.plan import Plan, count_cores, describe_plan
from sheer.launch import CHANGES_OF_RANKS
from sheer.signals import EXIT_STATUS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

    from sheer.distributed.watch import RankFolders


def launch(plan: Plan, script: Path, arguments: list[str], changes: Mapping[str, str]) -> int:
    """Run a script on several ranks, and return the status to end with.

    It is 0 if all ranks ended well, 85 if they saved and left because they were told to, 1 if one failed; its error has been
    shown then.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    from sheer.distributed.watch import RankFolders, RankWatch

    threads = None
    if "OMP_NUM_THREADS" not in os.environ and plan.nproc > 1:
        threads = os.environ["OMP_NUM_THREADS"] = str(max(1, count_cores() // plan.nproc))
    if changes:
        os.environ[CHANGES_OF_RANKS] = json.dumps(dict(changes))
    if plan.max_restarts or plan.min_nodes < plan.max_nodes:
        # The agent's store outlives the ranks: started again, they would find the addresses of those that are gone, and hang.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if "LOGLEVEL" not in os.environ:  # what the agent says of a failure is a wall, around what is shown below
        logging.disable(logging.ERROR)
    print(f"sheer run: {describe_plan(plan, threads)}", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while no rank runs there is nothing to tell, or to save
    watch = RankWatch()
    with tempfile.TemporaryDirectory(prefix="sheer-", ignore_cleanup_errors=True) as folder:
        config = agent_config(plan, RankFolders(Path(folder), watch))
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "sheer.distributed.worker", str(script), *arguments)
        except ChildFailedError as error:
            print(describe_failures(error.failures, watch.killed), file=sys.stderr, flush=True)
            return 1
        except (RendezvousError, dist.DistError) as error:
            print(f"The machines did not meet at {config.rdzv_endpoint}: {error}", file=sys.stderr, flush=True)
            return 1
        except SignalException as error:
            return 128 + error.sigval
        finally:
            watch.close()
        return EXIT_STATUS if watch.all_left() else 0


def agent_config(plan: Plan, folders: RankFolders) -> LaunchConfig:
    """Return what torch's agent is to be started with."""
    from torch.distributed.launcher.api import LaunchConfig

    options: dict[str, int | bool] = {}
    if plan.static and plan.node_rank is not None:
        options = {"rank": plan.node_rank}
    elif plan.node_rank is not None:
        options = {"is_host": plan.node_rank == 0}
    return LaunchConfig(
        min_nodes=plan.min_nodes,
        max_nodes=plan.max_nodes,
        nproc_per_node=plan.nproc,
        logs_specs=folders,
        run_id=plan.run_id,
        role="sheer",
        rdzv_backend="static" if plan.static else "c10d",
        rdzv_endpoint=plan.endpoint or "localhost:0",
        rdzv_configs=options,
        max_restarts=plan.max_restarts,
        monitor_interval=0.3,
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are the watch's: a rank that is to stop saves first
    )


def describe_failures(failures: Mapping[int, ProcessFailure], killed: set[int]) -> str:
    """Show the error that came first, with its rank; of others that did not follow from it, only the ranks."""
    own = {rank: failure for rank, failure in failures.items() if failure.pid not in killed or has_error(failure)}
    _, ordered = zip(
        *sorted((failure_order(failure), rank) for rank, failure in (own or failures).items()), strict=True
    )
    rank, failure = ordered[0], failures[ordered[0]]
    if has_error(failure):
        message: Any = failure.message  # a mapping where the rank has written one; else a string
        text = str(message["extraInfo"]["py_callstack"]).rstrip()
    elif failure.exitcode < 0:
        killer = " (out of memory, most likely)" if failure.exitcode == -signal.SIGKILL else ""
        text = f"killed by {failure.signal_name()}{killer}"
    else:
        text = f"left with status {failure.exitcode}"
    too = [other for other in ordered[1:] if has_error(failures[other]) and not failures[other].error_file_data["echo"]]
    also = f"\n{name_ranks(too)} failed too." if too else ""
    return f"Rank {rank} failed{': ' if chr(10) not in text else ':' + chr(10)}{text}{also}"


def has_error(failure: ProcessFailure) -> bool:
    """Whether a rank left word of its error."""
    return "echo" in failure.error_file_data


def failure_order(failure: ProcessFailure) -> tuple[bool, float]:
    """Return by what the failures of ranks are sorted: those that only follow from another come last."""
    if has_error(failure):
        return bool(failure.error_file_data["echo"]), float(failure.error_file_data["time"])
    return failure.exitcode == -signal.SIGABRT, failure.timestamp
