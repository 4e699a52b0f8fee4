"""How many ranks are started, on which machines, and where they meet: from options, or from what SLURM says."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sheer.errors import SettingsError

PORT = 29500  # where ranks of several machines meet, if nothing else is said


@dataclass(frozen=True)
class Plan:
    """What a launcher starts, and where it meets those on the other machines."""

    nproc: int  # ranks on this machine
    min_nodes: int = 1
    max_nodes: int = 1
    node_rank: int | None = None  # None: the machines are numbered as they come
    endpoint: str = ""  # host and port; empty where there is one machine
    run_id: str = ""
    max_restarts: int = 0
    job: str | None = None  # of SLURM, if the machines are those it gave

    @property
    def static(self) -> bool:
        """Whether all machines and their order are known beforehand, and stay."""
        return self.node_rank is not None and self.min_nodes == self.max_nodes > 1 and self.max_restarts == 0


def make_plan(
    nproc: str,
    nnodes: str | None,
    node_rank: int | None,
    endpoint: str | None,
    run_id: str | None,
    max_restarts: int,
    environment: Mapping[str, str],
) -> Plan:
    """Return what to start. What the options leave open is taken from SLURM, if it gave several machines.

    Raises:
        SettingsError: the options contradict each other, or leave open where the machines meet.
    """
    count = count_ranks(nproc)
    job = environment.get("SLURM_JOB_ID") if int(environment.get("SLURM_NNODES", "1")) > 1 else None
    if nnodes is None and endpoint is None and node_rank is None and job is not None:
        nodes = int(environment["SLURM_NNODES"])
        meet = f"{first_host(environment['SLURM_JOB_NODELIST'])}:{20000 + int(job) % 10000}"
        return Plan(count, nodes, nodes, int(environment["SLURM_NODEID"]), meet, run_id or job, max_restarts, job)
    low, _, high = (nnodes or "1").partition(":")
    if not (low.isdecimal() and (high or low).isdecimal()) or not 0 < int(low) <= int(high or low):
        raise SettingsError(
            f"--nnodes {nnodes} must be a number of machines, or the least and the most of them, as 2:4."
        )
    min_nodes, max_nodes = int(low), int(high or low)
    if max_nodes == 1:
        return Plan(count, run_id=run_id or uuid.uuid4().hex[:12], max_restarts=max_restarts)
    if endpoint is None:
        raise SettingsError(
            f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT, one of the machines, the same on all of them."
        )
    if node_rank is not None and not 0 <= node_rank < max_nodes:
        raise SettingsError(f"--node-rank {node_rank} must be one of 0 to {max_nodes - 1}.")
    host, _, port = endpoint.partition(":")
    meet = f"{host}:{port or PORT}"
    return Plan(count, min_nodes, max_nodes, node_rank, meet, run_id or "sheer", max_restarts)


def count_ranks(nproc: str) -> int:
    """Return how many ranks `--nproc-per-node` asks for: a number, "cpu" for one a core, "gpu" for one an accelerator, "auto"."""
    if nproc.isdecimal() and int(nproc) > 0:
        return int(nproc)
    accelerators = torch.accelerator.device_count()
    if nproc == "gpu" and accelerators == 0:
        raise SettingsError("--nproc-per-node gpu: this machine has no accelerator.")
    if nproc not in ("auto", "gpu", "cpu"):
        raise SettingsError(f'--nproc-per-node {nproc} must be a number of ranks (1 or more), "auto", "gpu" or "cpu".')
    return accelerators if nproc != "cpu" and accelerators else count_cores()


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_host(nodes: str) -> str:
    """Return the first of SLURM's list of machines: of `node[01-04,07],gpu-9` it is `node01`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def describe_plan(plan: Plan, threads: str | None) -> str:
    """Say in one line what is started."""
    ranks = f"{plan.nproc} rank{'s' if plan.nproc > 1 else ''}"
    if plan.max_nodes == 1:
        text = f"{ranks} on this machine"
    else:
        nodes = f"{plan.min_nodes}" if plan.min_nodes == plan.max_nodes else f"{plan.min_nodes} to {plan.max_nodes}"
        number = f", this is number {plan.node_rank}" if plan.node_rank is not None else ""
        text = f"{ranks} on each of {nodes} machines{number}, which meet at {plan.endpoint}"
        text += f" (SLURM job {plan.job})" if plan.job is not None else ""
    if threads is not None:
        text += f"; {threads} thread{'s' if threads != '1' else ''} a rank (OMP_NUM_THREADS)"
    if plan.max_restarts:
        text += f"; started again up to {plan.max_restarts} times"
    return text
