"""Roll call of a job's ranks through its key-value store, so that a missing rank hangs nobody.

Every rank writes a report of itself under its own key; rank 0 reads them until a deadline, compares
them and publishes what it found, which every rank returns. No process group exists yet: in a
collective a missing rank would hang the others until its timeout and would not be named.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store

from nemo_paced.preflight.findings import Finding, PreflightFailed, Severity, error, warning

POLL_S = 0.05
HERE = "here"  # key: rank 0 has begun, whatever it does before the roll call
READING_S = 3600.0  # longest that rank 0 may read the inputs before the roll call
MAX_CLOCK_SKEW_S = 2.0
MIN_FREE_SHARE = 0.9  # of a GPU's memory, before this job has used any


@dataclass(frozen=True, slots=True)
class GpuReport:
    """The GPU of one rank.

    Attributes:
        name: as CUDA gives it.
        visible: number of GPUs that the process sees.
        total, free: bytes of this GPU's memory.
    """

    name: str
    visible: int
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """A rank's report of itself: host, library versions and GPU.

    Attributes:
        host: the node's name.
        libraries: name -> version, which must be equal on all ranks.
        gpu: the one that it will use; ``None``: it sees none.
    """

    rank: int
    host: str
    libraries: dict[str, str] = field(default_factory=dict)
    gpu: GpuReport | None = None

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @staticmethod
    def from_json(text: bytes) -> RankReport:
        fields = json.loads(text)
        gpu = fields.pop("gpu")
        return RankReport(**fields, gpu=None if gpu is None else GpuReport(**gpu))


def call_roll(
    store: Store,
    own: RankReport,
    *,
    world_size: int,
    ranks_per_node: int,
    timeout_s: float,
    needs_gpu: bool = False,
) -> list[Finding]:
    """Exchange and compare the ranks' reports; collective, with the same findings on all ranks.

    Args:
        store: of this roll call alone (a prefix of the job's).
        own: the report of this rank.
        timeout_s: how long ranks are waited for, seconds.
        needs_gpu: whether a rank without a GPU is an error.

    Raises:
        PreflightFailed: on another rank, where rank 0 is not heard of.
    """
    store.set(f"report/{own.rank}", json.dumps(asdict(own)))
    if own.rank:
        return _answer(store, own.rank, timeout_s)
    store.set(HERE, "")
    there = _collect(store, "report", range(world_size), timeout_s)
    reports = {rank: RankReport.from_json(text) for rank, text in there.items()}
    asked = time.time()
    store.set("time", "now")
    clocks = _collect(store, "clock", [r for r in reports if r], timeout_s)
    answered = time.time()
    findings = [
        *absent(range(world_size), reports, ranks_per_node, timeout_s),
        *skewed(reports, {r: float(c) for r, c in clocks.items()}, asked, answered),
        *unequal(list(reports.values())),
        *(gpus(list(reports.values())) if needs_gpu else ()),
    ]
    store.set("verdict", json.dumps([_plain(f) for f in findings]))
    return findings


def _answer(store: Store, rank: int, timeout_s: float) -> list[Finding]:
    """The roll call of a rank other than 0: tell the time when asked, and take the verdict.

    Raises:
        PreflightFailed: rank 0 is not heard of, so there is no verdict.
    """
    try:
        store.wait([HERE], timedelta(seconds=2 * timeout_s))
        # rank 0 may be reading the data; if it dies its launcher, or the lost store, ends this
        store.wait(["time"], timedelta(seconds=READING_S))
        store.set(f"clock/{rank}", repr(time.time()))
        store.wait(["verdict"], timedelta(seconds=2 * timeout_s))
        return [Finding(Severity(f.pop("severity")), **f) for f in json.loads(store.get("verdict"))]
    except torch.distributed.DistError as failure:
        raise PreflightFailed(
            f"rank {rank}: rank 0 did not answer ({first_line(failure)}): see what it said, and "
            "whether MASTER_ADDR:MASTER_PORT reaches it"
        ) from failure


def absent(
    ranks: Iterable[int], reports: dict[int, RankReport], ranks_per_node: int, timeout_s: float
) -> list[Finding]:
    """A finding for each rank without a report, with its node where another rank knows that."""
    hosts = {report.rank // ranks_per_node: report.host for report in reports.values()}
    return [
        error(
            f"rank {rank}",
            f"did not answer within {timeout_s:g} s; it belongs to node {rank // ranks_per_node}"
            + _host_of(hosts.get(rank // ranks_per_node)),
            "see whether that process runs and reaches MASTER_ADDR:MASTER_PORT",
        )
        for rank in ranks
        if rank not in reports
    ]


def _host_of(host: str | None) -> str:
    return f" ({host})" if host else ", of which no rank answered"


def skewed(
    reports: dict[int, RankReport], clocks: dict[int, float], asked: float, answered: float
) -> list[Finding]:
    """A warning for each clock that is more than ``MAX_CLOCK_SKEW_S`` off that of rank 0.

    The skew is the least that explains a reading taken between rank 0's question and the last
    answer.

    Args:
        clocks: reading of each rank's clock, seconds since the epoch.
        asked, answered: rank 0's clock at its question and after the last answer.
    """
    found = []
    for rank, clock in clocks.items():
        skew = min(clock - asked, 0.0) + max(clock - answered, 0.0)
        if abs(skew) > MAX_CLOCK_SKEW_S:
            side = "ahead of" if skew > 0 else "behind"
            text = f"its clock is at least {abs(skew):.1f} s {side} that of {reports[0].who}"
            remedy = "synchronise the clocks (chrony, ntpd): logs and file times would mislead"
            found.append(warning(reports[rank].who, text, remedy))
    return found


def unequal(reports: Sequence[RankReport]) -> list[Finding]:
    """An error for each library version that is not the one of most ranks."""
    found = []
    for name in sorted({name for report in reports for name in report.libraries}):
        versions: dict[str, list[RankReport]] = defaultdict(list)
        for report in reports:
            versions[report.libraries.get(name, "not installed")].append(report)
        usual = max(versions, key=lambda v: len(versions[v]))
        for version, holders in versions.items():
            if version != usual:
                found.append(
                    error(
                        name,
                        f"is {version} for {_some(holders)} and {usual} for "
                        f"{_some(versions[usual])}",
                        "start all ranks from one environment or container image",
                    )
                )
    return found


def gpus(reports: Sequence[RankReport]) -> list[Finding]:
    """Findings on ranks without a GPU, on GPUs in use by others, and on GPUs of several kinds."""
    found = []
    blind = [report for report in reports if report.gpu is None]
    if blind:
        found.append(
            error(
                "trainer.accelerator",
                f"is gpu and there is no GPU for {_some(blind)}",
                "ask the scheduler for one a rank, lower trainer.devices, or install a CUDA "
                "build of torch",
            )
        )
    seeing = [(report, report.gpu) for report in reports if report.gpu is not None]
    kinds = defaultdict(list)
    for report, gpu in seeing:
        kinds[gpu.name].append(report)
        if gpu.free < MIN_FREE_SHARE * gpu.total:
            found.append(
                warning(
                    report.who,
                    f"{(gpu.total - gpu.free) / 2**30:.1f} of the {gpu.total / 2**30:.1f} GiB of "
                    "its GPU are in use",
                    "end what runs there (nvidia-smi shows it)",
                )
            )
    if len(kinds) > 1:
        text = ", ".join(f"{name} for {_some(who)}" for name, who in kinds.items())
        found.append(warning("GPUs", f"they differ: {text}", "the slowest sets the pace"))
    return found


def _some(reports: Sequence[RankReport]) -> str:
    """The names of ranks in a sentence: the first three, and how many more there are."""
    names = ", ".join(report.who for report in reports[:3])
    return names + (f" and {len(reports) - 3} more" if len(reports) > 3 else "")


def _collect(store: Store, prefix: str, ranks: Iterable[int], timeout_s: float) -> dict[int, bytes]:
    """The values of ``prefix/rank`` that are there before the deadline."""
    missing = set(ranks)
    found: dict[int, bytes] = {}
    deadline = time.monotonic() + timeout_s
    while missing:
        # one question for all, as long as somebody is missing
        if store.check([f"{prefix}/{rank}" for rank in sorted(missing)]):
            arrived = set(missing)
        elif time.monotonic() > deadline:
            arrived = {rank for rank in missing if store.check([f"{prefix}/{rank}"])}
            missing &= arrived
        else:
            time.sleep(POLL_S)
            continue
        found |= {rank: store.get(f"{prefix}/{rank}") for rank in arrived}
        missing -= arrived
    return found


def _plain(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "severity": finding.severity.value}


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type without one."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
