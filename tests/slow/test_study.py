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

    records.write_text("\n".join(lines[:2]) + "\n" + lines[2][:50])
    said = run_study(out, "--summary", str(tmp_path / "summary.json"))
    again = [json.loads(line) for line in records.read_text().splitlines() if line[-1] == "}"]
    assert [line["arm"] for line in again] == arms
    # same seeds, same server, same order of sums: the same answers
    assert again[2]["heldout"] == json.loads(lines[2])["heldout"]
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
