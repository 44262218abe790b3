"""What ranks find together: who is missing, who differs, who cannot be reached."""

import json
import os
import time
from datetime import timedelta

import pytest
import torch

from nemo_paced.config import PacedConfig, TrainerConfig, TrainingConfig
from nemo_paced.preflight import ranks, roll_call
from nemo_paced.preflight.findings import PreflightFailed, Severity
from nemo_paced.preflight.roll_call import GpuReport, RankReport, call_roll
from tests.distributed.harness import run_ranks

TIMEOUT_S = 1.5


def config(devices=2, timeout_s=TIMEOUT_S):
    return PacedConfig(
        trainer=TrainerConfig(devices=devices, accelerator="cpu"),
        training=TrainingConfig(rank_timeout_s=timeout_s),
    )


def _check(rank, world_size, absent=(), slow_clock=(), other_library=(), unreachable=()):
    if rank in absent:
        return None
    if rank in slow_clock:
        now = time.time
        roll_call.time.time = lambda: now() - 60
    report = ranks.own_report
    if rank in other_library:

        def older(*args, **kwargs):
            made = report(*args, **kwargs)
            made.libraries["torch"] = "1.0"
            return made

        ranks.own_report = older
    if rank in unreachable:
        ranks._gloo_reduce = lambda *args: time.sleep(60)
    began = time.monotonic()
    try:
        findings = [str(f) for f in ranks.check_ranks(config(world_size))]
    except PreflightFailed as told:
        findings = [str(told)]
    return findings, time.monotonic() - began


def test_two_sound_ranks_find_nothing():
    for findings, seconds in run_ranks(2, _check):
        assert findings == []
        assert seconds < 30


def test_a_missing_rank_is_named_within_the_timeout():
    here, missing = run_ranks(2, _check, (1,))
    findings, seconds = here
    assert missing is None
    (told,) = findings
    assert told.startswith(
        f"error: rank 1: did not answer within {TIMEOUT_S} s; it belongs to node"
    )
    assert os.uname().nodename in told
    assert seconds < TIMEOUT_S + 10


def test_without_rank_0_the_others_say_so():
    _, (findings, _) = run_ranks(2, _check, (0,))
    (told,) = findings
    assert told.startswith("rank 1: rank 0 did not answer (")


def _without_a_store(rank, world_size):
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    with pytest.raises(PreflightFailed) as told:
        ranks.check_ranks(config(2, 1))
    return str(told.value)


def test_a_store_that_cannot_be_reached_is_named():
    (told,) = run_ranks(1, _without_a_store)
    assert "the job's store at 127.0.0.1:1 cannot be reached" in told and "rank 1 on" in told


def test_versions_that_differ_are_named_on_every_rank():
    for findings, _ in run_ranks(2, _check, (), (), (1,)):
        (told,) = findings
        assert told.startswith("error: torch: is 1.0 for rank 1 on")


def test_a_clock_that_is_wrong_is_a_warning():
    for findings, _ in run_ranks(2, _check, (), (1,)):
        (told,) = findings
        assert told.startswith("warning: rank 1 on") and "behind that of rank 0" in told


def test_a_rank_that_a_collective_does_not_reach_is_named():
    (first, _), (second, _) = run_ranks(2, _check, (), (), (), (1,))
    assert any(told.startswith("error: rank 1: a small all-reduce") for told in first)
    assert any(told.startswith("error: rank 1: a small all-reduce") for told in second)


def _read_first(rank, world_size):
    """Rank 0 takes longer than the timeout before the roll call, and has said that it is there."""
    if rank == 0:
        ranks.announce(config(world_size))
        time.sleep(3 * TIMEOUT_S)
    return [str(f) for f in ranks.check_ranks(config(world_size))]


def test_rank_0_is_waited_for_while_it_reads_the_data():
    assert run_ranks(2, _read_first) == [[], []]


def _host_the_store(rank, world_size):
    """As under srun: no agent has a store, rank 0 opens it; env:// shares it afterwards."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["MASTER_PORT"] = os.environ["OWN_PORT"]
    findings = ranks.check_ranks(config(world_size, 10))
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return [str(f) for f in findings], float(total)


def test_without_an_agent_rank_0_hosts_the_store_for_both(monkeypatch):
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    results = run_ranks(2, _with_port, port)
    assert results == [([], 2.0), ([], 2.0)]


def _with_port(rank, world_size, port):
    os.environ["OWN_PORT"] = str(port)
    return _host_the_store(rank, world_size)


def gpu(name="H100", free=0.99, visible=8):
    return GpuReport(name, visible, 80 * 2**30, int(free * 80 * 2**30))


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        ([gpu(), None], "is gpu and there is no GPU for rank 1 on b"),
        ([gpu(), gpu(free=0.5)], "40.0 of the 80.0 GiB of its GPU are in use"),
        ([gpu(), gpu("A100")], "they differ: H100 for rank 0 on a, A100 for rank 1 on b"),
    ],
)
def test_gpus_that_are_absent_busy_or_unequal_are_named(gpus, told):
    reports = [RankReport(r, "ab"[r], gpu=g) for r, g in enumerate(gpus)]
    (finding,) = roll_call.gpus(reports)
    assert told in finding.what
    expected = Severity.error if None in gpus else Severity.warning
    assert finding.severity is expected and finding.remedy


def test_a_whole_node_that_is_missing_is_told_from_one_rank():
    reports = {0: RankReport(0, "first"), 1: RankReport(1, "first"), 2: RankReport(2, "second")}
    third, fourth, fifth = roll_call.absent(range(6), reports, 2, 5)
    assert "node 1 (second)" in third.what
    assert "node 2, of which no rank answered" in fourth.what
    assert (fourth.where, fifth.where) == ("rank 4", "rank 5")


def test_a_report_survives_the_store():
    store = torch.distributed.HashStore()
    report = RankReport(0, "here", {"torch": "2"}, gpu())
    assert call_roll(store, report, world_size=1, ranks_per_node=1, timeout_s=1) == []
    assert RankReport.from_json(store.get("report/0")) == report
    assert json.loads(store.get("verdict")) == []
