"""What `sheer run` decides to start, from its options and from SLURM."""

from __future__ import annotations

import pytest

from sheer.distributed.plan import Plan, describe_plan, first_host, make_plan
from sheer.errors import SettingsError

SLURM = {
    "SLURM_JOB_ID": "41234",
    "SLURM_NNODES": "4",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "node[01-04,07],gpu-9",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-04,07],gpu-9", "node01"),
        ("gpu-9,node[01-04]", "gpu-9"),
        ("gpu-9", "gpu-9"),
        ("rack[3,5]-n[08-12].cluster,login", "rack3-n08.cluster"),
        ("a[7]", "a7"),
    ],
)
def test_the_first_machine_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_slurm_says_which_machines_there_are() -> None:
    plan = make_plan("8", None, None, None, None, 0, SLURM)
    assert plan == Plan(8, 4, 4, 2, "node01:21234", "41234", 0, "41234") and plan.static
    text = describe_plan(plan, "4")
    assert text == (
        "8 ranks on each of 4 machines, this is number 2, which meet at node01:21234 (SLURM job 41234); "
        "4 threads a rank (OMP_NUM_THREADS)"
    )


def test_options_come_before_slurm_and_one_machine_needs_none() -> None:
    plan = make_plan("2", "2:3", None, "host", "mine", 1, SLURM)
    assert plan == Plan(2, 2, 3, None, "host:29500", "mine", 1) and not plan.static
    alone = make_plan("1", None, None, None, None, 0, {**SLURM, "SLURM_NNODES": "1"})
    assert (alone.max_nodes, alone.endpoint) == (1, "") and describe_plan(alone, None) == "1 rank on this machine"


@pytest.mark.parametrize(
    ("nproc", "nnodes", "node_rank", "endpoint", "message"),
    [
        ("two", None, None, None, "two must be a number of ranks"),
        ("2", "3:2", None, "host:1", "the least and the most"),
        ("2", "2", None, None, "needs --rdzv-endpoint"),
        ("2", "2", 2, "host:1", "one of 0 to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    nproc: str, nnodes: str | None, node_rank: int | None, endpoint: str | None, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_plan(nproc, nnodes, node_rank, endpoint, None, 0, {})
