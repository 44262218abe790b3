"""Processor time until a command answers, and until a rollout server on the CPU is healthy.

The server starts by turns as `nemo-paced` starts it (a forked engine) and on vLLM's own platform
for CPUs (an engine and a worker process, spawned). Goal: 3 s for a command that needs no model.

    python benchmarks/start.py [--repeats 3] [--out benchmarks/results/start.json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from nemo_paced.compose import ASSETS
from nemo_paced.config import RolloutConfig
from nemo_paced.serving.engine import Served
from nemo_paced.serving.sidecar import Sidecar, free_ports
from nemo_paced.serving.vllm_engine import Vllm, gpu_count
from nemo_paced.serving.vllm_platform import FORK_VARIABLE

QUICKSTART = ("--config-name", "quickstart")
COMMANDS = {
    "plan": ("plan", *QUICKSTART),
    "--cfg job": ("train", *QUICKSTART, "--cfg", "job"),
    "weights, first error": ("weights", "--pass-rates", "no_such_file"),
    "report, first error": ("report", "no_such_run"),
    "evaluate, first error": ("evaluate", "no_such_model"),
    "import-hf": ("import-hf", str(ASSETS / "student"), "OUT"),
}


def command_s(arguments: tuple[str, ...], folder: Path) -> float:
    """Seconds of processor time, user and system, of a command and all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    given = [str(folder / "out") if a == "OUT" else a for a in arguments]
    subprocess.run(
        [sys.executable, "-m", "nemo_paced.cli", *given], cwd=folder, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Spawning(Vllm):
    """On vLLM's own platform."""

    def environment(self, served: Served) -> dict[str, str]:
        return {k: v for k, v in super().environment(served).items() if k != FORK_VARIABLE}


def server(engine: Vllm, folder: Path) -> dict[str, float]:
    """Seconds of a start by the wall clock and of processors, and memory, GiB."""
    served = Served(
        ASSETS / "student",
        RolloutConfig(),
        host="127.0.0.1",
        port=free_ports("127.0.0.1", 1)[0],
        max_model_len=64,
        dtype="float32",
        api_key="benchmark",
    )
    one = Sidecar(served, folder / f"{type(engine).__name__}.log", engine)
    began = time.monotonic()
    with one:
        one.start()
        wall = time.monotonic() - began
        processes = psutil.Process().children(recursive=True)
        processor = sum(sum(p.cpu_times()[:2]) for p in processes)
        memory = sum(p.memory_info().rss for p in processes) / 2**30
    return {"wall_s": wall, "processor_s": processor, "memory_gib": memory}


ENGINES = {"server, forked": Vllm(), "server, spawned": Spawning()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    assert not gpu_count(), "of vLLM's CPU build"
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, arguments in COMMANDS.items():
            found = []
            for _ in range(options.repeats):
                with tempfile.TemporaryDirectory() as fresh:
                    found.append(command_s(arguments, Path(fresh)))
            figures[label] = {"processor_s": statistics.median(found)}
        turns = [
            {label: server(engine, folder) for label, engine in ENGINES.items()}
            for _ in range(options.repeats)
        ]
    for label in ENGINES:
        of = [turn[label] for turn in turns]
        figures[label] = {key: statistics.median(one[key] for one in of) for key in of[0]}
    for label, values in figures.items():
        told = "  ".join(f"{key} {value:6.2f}" for key, value in values.items())
        print(f"{label:<24}{told}")
    if options.out is not None:
        machine = {"cores": os.cpu_count(), "repeats": options.repeats}
        options.out.write_text(
            json.dumps({"machine": machine, "medians": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
