"""A SLURM of three nodes on this machine: real daemons, private to the test."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = 3
# CPUs that a node says it has: a job's tasks share the machine's real ones
CPUS = 4


def missing() -> str:
    """What keeps the cluster from starting here; empty: nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed (make slurm-test installs them where it may)"
    return "" if os.geteuid() == 0 else "the daemons need root"


@dataclass
class Cluster:
    """Attributes: folder, of its configuration, state and logs; environment, of its commands."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: object) -> str:
        done = subprocess.run(
            [str(part) for part in command], env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        text = self.run("scontrol", "show", "job", job, "--oneliner")
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
            time.sleep(0.1)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons; end them and every job after it."""
    config = _write_config(folder)
    environment = {**os.environ, "SLURM_CONF": str(config), "PATH": _path()}
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / "daemons.log").open("ab") as log:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )

    made = Cluster(folder, environment)
    try:
        start(
            "munged", "--foreground", "--force",
            f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        made.wait((folder / "munge.socket").exists, "munged", 10)
        start("slurmctld", "-D", "-c")
        for number in range(1, NODES + 1):
            start("slurmd", "-D", "-c", "-N", f"n{number}")
        made.wait(lambda: _idle(made) == NODES, "the nodes", 60)
        yield made
    finally:
        if len(daemons) > 1:
            subprocess.run(["scancel", "--me", "--signal=KILL", "--full"], env=environment)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


def _idle(made: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--states=idle", "--format=%D"],
        env=made.environment,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def _write_config(folder: Path) -> Path:
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    host = socket.gethostname()
    controller, *nodes = _free_ports(1 + NODES)
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        "SlurmUser=root",
        # a requeued job waits for its old credential to expire
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",
        "MpiDefault=none",
        "ReturnToService=2",
        "KillWait=5",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmctldPort={controller}",
        *(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS}"
            for number, port in enumerate(nodes, 1)
        ),
        f"PartitionName=test Nodes=n[1-{NODES}] Default=YES MaxTime=INFINITE State=UP",
    ]
    config = folder / "slurm.conf"
    config.write_text("\n".join(lines) + "\n")
    return config


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _path() -> str:
    """Daemons lie where a user's search path may not lead."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
