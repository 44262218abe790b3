"""What a measurement keeps of an earlier one: figures and samples of the same settings alone."""

import contextlib
import os
import shutil

import numpy as np
import pytest

from nemo_paced.compose import ASSETS, to_config
from nemo_paced.config import WeightsConfig
from nemo_paced.data.problems import load_problems
from nemo_paced.errors import ConfigError
from nemo_paced.records import Response, Rollout
from nemo_paced.snr import driver as snr_driver
from nemo_paced.snr.driver import SnrDriver
from nemo_paced.snr.estimates import BlockSums
from nemo_paced.weights.pass_rates import PassRateTable
from tests.outcomes import right_or_wrong

CHECKPOINT = "checkpoints/step_00000000"


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with 24 problems, their pass rates and a copy of the student."""
    lines = (ASSETS / "problems_train.jsonl").read_text().splitlines(keepends=True)[:24]
    (tmp_path / "problems.jsonl").write_text("".join(lines))
    problems = load_problems(tmp_path / "problems.jsonl")
    rollouts = [
        Rollout(f"{p.id}/{k}", p.id, (1,), outcome=right_or_wrong(k < i % 5))
        for i, p in enumerate(problems)
        for k in range(4)
    ]
    table = PassRateTable.estimate(rollouts, problems, WeightsConfig(), student_step=0)
    table.write(tmp_path / "pass_rates.parquet")
    shutil.copytree(ASSETS / "student", tmp_path / "student")
    return tmp_path


def driver(run_dir, responses="references", model="student", step=0, **changed):
    """Of a configuration with ``changed`` settings, by dotted name with ``__`` for each dot."""
    tree = {
        "trainer": {"devices": 1, "accelerator": "cpu", "precision": "fp32"},
        "student": {"hf_path": str(ASSETS / "student")},
        "teacher": {"hf_path": str(ASSETS / "teacher")},
        "data": {
            "problems": str(run_dir / "problems.jsonl"),
            "prompt_template": "{problem}",
            "teacher_prompt_template": "hint {context} ; {student_prompt}",
            "use_chat_template": False,
            "max_response_length": 16,
        },
        "references": {"source": "solution"},
        "stages": [{"name": "forward_kl"}],
        "snr": {"bins": 2, "blocks": 4, "max_problems_per_bin": 8, "responses": responses},
    }
    for name, value in changed.items():
        *path, key = name.split("__")
        block = tree
        for part in path:
            block = block.setdefault(part, {})
        block[key] = value
    return SnrDriver(to_config(tree), run_dir, run_dir / model, step, run_dir / "snr" / "a.json")


def measure(one):
    """Give every bin figures, as a finished measurement has them."""
    for index, planned in enumerate(one.bins):
        ones = np.ones(len(planned.blocks))
        one.finish_bin(index, BlockSums(2 * ones, ones, 2 * ones, 5 * ones, 3 * ones))


def kept(one):
    return one.is_done and all(b.sums is not None for b in one.record.bins)


def touch(run_dir):
    """Other weights under the same path: what a second export leaves."""
    os.utime(run_dir / "student" / "model.safetensors", ns=(1, 1))


FIGURES = {
    "teacher__privileged_context": "none",
    "teacher__top_k": 3,
    "teacher__fp8": {"enabled": True},
    "data__prompt_template": "x {problem}",
    "data__teacher_prompt_template": "{context} ; {student_prompt}",
    "data__max_response_length": 12,
    "loss__temperature": 2.0,
}
SAMPLES = {"rollout__temperature": 0.5, "rollout__top_p": 0.9, "model__seed": 5}
NEITHER = {
    "loss__chunk_size": 7,
    "weights__alpha": 2.0,
    "data__max_prompt_length": 20,
    "teacher__cache_dir": "signals",
    "rollout__max_in_flight": 3,
}


@pytest.mark.parametrize("name", [*FIGURES, *SAMPLES])
def test_what_decides_the_figures_is_measured_anew(name, run_dir):
    measure(driver(run_dir, "rollouts"))
    again = driver(run_dir, "rollouts", **{name: (FIGURES | SAMPLES)[name]})
    assert not again.is_done and all(b.sums is None for b in again.record.bins)


@pytest.mark.parametrize("name", [*NEITHER, *SAMPLES])
def test_what_does_not_is_kept(name, run_dir):
    """Along references no response is sampled."""
    measure(driver(run_dir))
    assert kept(driver(run_dir, **{name: (NEITHER | SAMPLES)[name]}))


def test_a_model_that_changed_is_measured_anew_and_a_checkpoint_is_its_path(run_dir):
    measure(driver(run_dir))
    assert kept(driver(run_dir))
    touch(run_dir)
    assert not kept(driver(run_dir))
    measure(driver(run_dir, model=CHECKPOINT))
    assert kept(driver(run_dir, model=CHECKPOINT))


def test_pass_rates_of_an_older_student_are_warned_of(run_dir, caplog):
    assert driver(run_dir).record.pass_rates_step == 0 and not caplog.messages
    driver(run_dir, step=200)
    assert "the student has moved since step 0; --pass-rates FILE" in caplog.messages[-1]
    caplog.clear()
    given = str(run_dir / "pass_rates.parquet")
    assert driver(run_dir, step=200, snr__pass_rates=given).record.pass_rates_step is None
    assert not caplog.messages, "whoever gives a table knows whose it is"


def test_a_bin_is_kept_whatever_its_figures_say(run_dir, monkeypatch):
    def fails(record):
        raise ValueError("no figures")

    monkeypatch.setattr(snr_driver, "summarise", fails)
    with pytest.raises(ValueError, match="no figures"):
        measure(driver(run_dir))
    assert [b.sums is None for b in driver(run_dir).record.bins] == [False, True]


def test_a_table_that_fills_no_bin_is_refused_when_made(run_dir):
    assert driver(run_dir, snr__bins=50).bins
    rows = PassRateTable.read(run_dir / "pass_rates.parquet").rows
    lines = (run_dir / "problems.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "problems.jsonl").write_text("".join(lines[:10]))
    PassRateTable.of(rows[:10]).write(run_dir / "pass_rates.parquet")
    told = r"snr.bins is 50 and none of them holds 4 problems of .*pass_rates.parquet.* has 2\)"
    with pytest.raises(ConfigError, match=told):
        driver(run_dir, snr__bins=50)


class Store:
    """A sampler that remembers what it was asked for."""

    def __init__(self):
        self.purposes = []

    def sample(self, problems, *, purpose, **_):
        self.purposes.append(purpose)
        return [Response("r", problem.id, (1,)) for problem in problems]


def purpose(run_dir, **changed):
    """What the samples are stored under when the blocks are asked for."""
    with driver(run_dir, "rollouts", **changed) as one:
        one.sampler, one.responses = Store(), {}
        with contextlib.closing(one.blocks()) as blocks:
            next(blocks)
        return one.sampler.purposes[0]


def test_samples_of_another_model_or_other_settings_are_not_taken(run_dir):
    before = purpose(run_dir)
    assert purpose(run_dir) == before
    # nothing but the student's own answers is asked for
    for same in ("teacher__top_k", "teacher__privileged_context", "loss__temperature"):
        assert purpose(run_dir, **{same: FIGURES[same]}) == before
    others = {name: purpose(run_dir, **{name: value}) for name, value in SAMPLES.items()}
    for name in ("data__prompt_template", "data__max_response_length"):
        others[name] = purpose(run_dir, **{name: FIGURES[name]})
    others["checkpoint"] = purpose(run_dir, model=CHECKPOINT)
    touch(run_dir)
    others["another export"] = purpose(run_dir)
    assert before not in others.values() and len(set(others.values())) == len(others)
