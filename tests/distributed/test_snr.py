"""The whole measurement on the embedded models, at several layouts, interrupted and shown."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from nemo_paced.cli import main
from nemo_paced.commands.snr import show
from nemo_paced.compose import ASSETS, to_config
from nemo_paced.config import WeightsConfig
from nemo_paced.data.problems import load_problems
from nemo_paced.records import Rollout
from nemo_paced.report.sections.snr import snr_sections
from nemo_paced.snr.measure import measure
from nemo_paced.snr.record import SnrRecord
from nemo_paced.weights.pass_rates import PassRateTable
from tests.distributed.harness import run_ranks
from tests.outcomes import right_or_wrong

LAYOUTS = {"tp1": (1, 1, 1), "tp2": (2, 1, 2), "pp2": (1, 2, 2)}  # tensor, pipeline, ranks


def config_of(run_dir, layout):
    tensor, pipeline, ranks = layout
    return to_config(
        {
            "trainer": {"devices": ranks, "accelerator": "cpu", "precision": "fp32"},
            "model": {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                "make_vocab_size_divisible_by": 8,
            },
            "student": {"hf_path": str(ASSETS / "student")},
            "teacher": {"hf_path": str(ASSETS / "teacher")},
            "data": {
                "problems": str(run_dir / "problems.jsonl"),
                "prompt_template": "{problem}",
                "teacher_prompt_template": "hint {context} ; {student_prompt}",
                "use_chat_template": False,
                "max_prompt_length": 16,
                "max_teacher_prompt_length": 32,
                "max_response_length": 16,
            },
            "references": {"source": "solution"},
            "snr": {"bins": 5, "blocks": 4, "max_problems_per_bin": 6},
        }
    )


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with 60 problems and their pass rates."""
    lines = (ASSETS / "problems_train.jsonl").read_text().splitlines(keepends=True)[:60]
    (tmp_path / "problems.jsonl").write_text("".join(lines))
    problems = load_problems(tmp_path / "problems.jsonl")
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(f"{p.id}/{k}", p.id, (1,), outcome=right_or_wrong(rng.random() < rate))
        for p, rate in zip(problems, rng.uniform(size=60), strict=True)
        for k in range(8)
    ]
    table = PassRateTable.estimate(rollouts, problems, WeightsConfig(), student_step=0)
    table.write(tmp_path / "pass_rates.parquet")
    return tmp_path


def _measure(rank, world_size, run_dir, layout, out, alpha=1.0):
    config = config_of(run_dir, layout)
    config.weights.alpha = alpha
    measure(config, run_dir, ASSETS / "student", out)


def test_every_layout_measures_the_same_and_an_interrupted_one_goes_on(run_dir, capsys):
    records = {}
    for name, layout in LAYOUTS.items():
        out = run_dir / "snr" / f"{name}.json"
        run_ranks(layout[2], _measure, run_dir, layout, out)
        records[name] = SnrRecord.read(out)
    for record in records.values():
        assert record.complete
        for own, other in zip(record.bins, records["tp1"].bins, strict=True):
            assert own.pass_rate == pytest.approx(other.pass_rate, nan_ok=True)
            for field in ("count_B", "norm_B", "square_B", "dot_B", "block_B"):
                values = getattr(own.sums, field)
                np.testing.assert_allclose(values, getattr(other.sums, field), rtol=1e-3)

    # a bin is missing and another one can be told from what would be measured
    out = run_dir / "snr" / "tp1.json"
    before, record = records["tp1"], SnrRecord.read(out)
    record.bins[1] = replace(record.bins[1], sums=None)
    kept = replace(record.bins[0].sums, norm_B=record.bins[0].sums.norm_B + 1)
    record.bins[0] = replace(record.bins[0], sums=kept)
    record.complete = False
    record.write(out)
    run_ranks(1, _measure, run_dir, LAYOUTS["tp1"], out)
    after = SnrRecord.read(out)
    assert after.complete
    np.testing.assert_allclose(after.bins[1].sums.dot_B, before.bins[1].sums.dot_B, rtol=1e-6)
    np.testing.assert_array_equal(after.bins[0].sums.norm_B, kept.norm_B)

    # what is complete is not measured again, and may be compared with another kernel
    run_ranks(1, _measure, run_dir, LAYOUTS["tp1"], out, 2.0)
    again = SnrRecord.read(out)
    assert (again.alpha, after.alpha) == (2.0, 1.0)
    np.testing.assert_array_equal(again.bins[0].sums.norm_B, kept.norm_B)

    capsys.readouterr()
    show(out, Console(width=200))
    printed = capsys.readouterr().out
    assert "0.00-0.20" in printed and "forward_kl along references" in printed
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(out.read_text())["estimates"]["bins"][0]["problems"] == 6
    sections = snr_sections(run_dir)
    assert len(sections) == 3 and all("<svg" in section.svg for section in sections)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "is no directory"),
        (["--config-name", "quickstart"], "there are no pass rates"),
        (["--config-name", "quickstart", "snr.blocks=2"], "snr.blocks is 2"),
        (["--config-name", "quickstart", "snr.last_layers=9"], "the last pipeline stage holds 2"),
        (["--config-name", "quickstart", "--step", "7"], "has checkpoints of the steps (none)"),
        (["--config-name", "quickstart", "snr.max_problems_per_bin=5"], "a block has at least one"),
        (
            [
                "--config-name",
                "quickstart",
                "teacher.placement=separate",
                "teacher.separate_ranks=2",
                "trainer.devices=4",
            ],
            "set teacher.placement=colocated",
        ),
    ],
)
def test_mistakes_are_named_before_a_rank_starts(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["snr", *arguments]) == 2
    assert told in capsys.readouterr().err
