"""The study on a real server: a few steps, stopped in a line of its records, and gone on with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_paced.compose import ASSETS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run_study(out, *arguments):
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "study.py"), "--out", str(out),
            "--seeds", "1", "--steps", "4", "--arms", "paced_two_stage", *arguments,
        ],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_study_goes_on_where_it_was_stopped(tmp_path):
    out = tmp_path / "study"
    student = out / "seed_1" / "student"  # as if it had been trained
    shutil.copytree(ASSETS / "student", student)
    run_study(out)
    records = out / "records.jsonl"
    lines = records.read_text().splitlines()
    arms = [json.loads(line)["arm"] for line in lines]
    assert arms == ["base", "unweighted", "paced_two_stage"]

    # as if stopped before the base was evaluated, its pass rates being there, and in a line
    records.write_text(lines[1] + "\n" + lines[2][:50])
    said = run_study(out, "--summary", str(tmp_path / "summary.json"))
    again = [json.loads(line) for line in records.read_text().splitlines() if line[-1] == "}"]
    by_arm = {line["arm"]: line for line in again}
    assert len(again) == 3 and sorted(by_arm) == sorted(arms)
    # same seeds, same server, same order of sums: the same answers
    for arm, line in zip(arms, lines, strict=True):
        assert by_arm[arm]["heldout"] == json.loads(line)["heldout"]
    assert by_arm["base"]["pass_rates"] == json.loads(lines[0])["pass_rates"]
    assert "| paced_two_stage |" in said
    assert (tmp_path / "summary.png").exists()

    refused = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "study.py"), "--out", str(out),
            "--steps", "5", "--seeds", "1",
        ],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert refused.returncode == 1 and "other settings" in refused.stderr
