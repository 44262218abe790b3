"""The script for a first GPU has no mistake left that a CPU can find."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def first_light(out, *arguments):
    command = [sys.executable, "scripts/first_light.py", "--out", str(out), "--device", "cpu"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_parts_run_on_a_cpu_and_only_what_failed_runs_again(tmp_path):
    parts = ("benchmark", "checkpoint", "step", "fp8")
    done = first_light(tmp_path, "--parts", *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert all(results[name]["passed"] for name in parts)
    assert len(results["step"]["figures"]) == 4
    everything = results["everything"]
    assert everything["step"]["figures"] == results["step"]["figures"]
    assert everything["losses_benchmark"] == results["losses_benchmark"]
    assert all(everything[name]["log"] for name in parts)
    for figures in results["step"]["figures"].values():
        assert figures["plan"]["gib"] > 0 and 0 <= figures["throughput/padding_share"] < 0.5
    assert results["fp8"]["figures"]["rowwise"]["kl_mean"] > 0
    assert "lacks on a CPU" in results["fp8"]["figures"]["blockwise"]["refused"]
    failed = tmp_path / "checkpoint.json"
    failed.write_text(json.dumps(results["checkpoint"] | {"passed": False}))
    again = first_light(tmp_path, "--parts", *parts)
    assert again.returncode == 0
    assert [line for line in again.stdout.splitlines() if line.startswith("checkpoint: ")]
    assert not [line for line in again.stdout.splitlines() if line.startswith("step: ")]


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path):
    (tmp_path / "models").write_text("in the way of a folder")
    done = first_light(tmp_path, "--parts", "step", "losses")
    assert done.returncode == 1
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if "  " in line}
    assert "FAILED" in lines["step"]
    assert "skipped" in lines["losses"], "they need a GPU, and say so: not passed"
    assert "models" in (tmp_path / "step.log").read_text()
