import json

import pytest

from nemo_paced.config import (
    OptimConfig,
    PacedConfig,
    SchedConfig,
    StageConfig,
    to_dict,
    two_stages,
)
from nemo_paced.errors import CheckpointError, ConfigError
from nemo_paced.records import Problem
from nemo_paced.run.fingerprint import check_config, check_data
from nemo_paced.run.metrics import MetricsFile
from nemo_paced.training.schedule import learning_rate, stage_at, stages


def test_stages_cut_the_steps_without_a_gap():
    cut = stages(two_stages(), 7)
    assert [(s.first_step, s.end_step) for s in cut] == [(0, 4), (4, 7)]
    assert [stage_at(cut, step).config.name for step in (0, 3, 4, 6)] == [
        "forward_kl",
        "forward_kl",
        "reverse_kl",
        "reverse_kl",
    ]


def test_a_stage_without_a_step_is_refused():
    tiny = [StageConfig(name="a", fraction=0.01), StageConfig(name="b", fraction=0.99)]
    with pytest.raises(ConfigError, match=r"stages\[a\].fraction is 0.01"):
        stages(tiny, 10)


def test_learning_rates_warm_up_and_decay():
    constant = OptimConfig(lr=1.0)
    assert {learning_rate(constant, s, 10) for s in range(10)} == {1.0}
    cosine = OptimConfig(lr=1.0, sched=SchedConfig("CosineAnnealing", warmup_steps=2, min_lr=0.1))
    rates = [learning_rate(cosine, s, 12) for s in range(13)]
    assert rates[0] < rates[1] < rates[2] == 1.0
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[12] == pytest.approx(0.1)
    linear = OptimConfig(lr=1.0, sched=SchedConfig("linear"))
    assert learning_rate(linear, 5, 10) == pytest.approx(0.5)


def test_a_changed_setting_is_named_with_both_values(tmp_path):
    saved = to_dict(PacedConfig())
    check_config(saved, PacedConfig(), tmp_path)
    moved = PacedConfig()
    moved.model.micro_batch_size = 7  # where it runs may change
    moved.trainer.devices = 4
    moved.rollout.port = 4321
    check_config(saved, moved, tmp_path)
    moved.model.optim.lr = 5.0
    moved.rollout.temperature = 0.3
    with pytest.raises(CheckpointError) as caught:
        check_config(saved, moved, tmp_path)
    assert "model.optim.lr was 1e-07 and is 5.0" in str(caught.value)
    assert "rollout.temperature was 1.0 and is 0.3" in str(caught.value)
    assert "devices" not in str(caught.value)


def test_a_changed_data_set_is_named(tmp_path):
    problems = [Problem(name, name, "1") for name in "abc"]
    check_data(tmp_path, problems)
    check_data(tmp_path, problems)
    changed = [Problem("a", "other", "1"), problems[1], Problem("d", "d", "1")]
    with pytest.raises(CheckpointError, match=r"1 added \(d\); 1 removed \(c\); 1 changed \(a\)"):
        check_data(tmp_path, changed)
    with pytest.raises(CheckpointError, match="in another order"):
        check_data(tmp_path, problems[::-1])


def test_a_resumed_run_drops_the_lines_of_steps_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, next_step=1)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": float("nan")})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    metrics = MetricsFile(path, next_step=3)
    metrics.write({"step": 3, "loss": 1.0})
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 1.0},
    ]
