"""A run directory as training writes it, without training: fixture for what reads one."""

import dataclasses
import json
import math
import random

import pandas

from nemo_paced.config import PacedConfig, WeightsConfig, to_dict
from nemo_paced.grading.accuracy import Accuracy
from nemo_paced.grading.verdicts import Ground, Verdicts
from nemo_paced.records import Outcome, Problem, Rollout
from nemo_paced.run.environment import ENVIRONMENT_FILE, Start
from nemo_paced.teacher.fp8.certificate import Certificate
from nemo_paced.weights.pass_rates import PassRateTable
from tests.outcomes import right_or_wrong

PROBLEMS = [Problem(f"p{i:03d}", "x", "1", group="ab"[i % 2]) for i in range(120)]
SUITE_MEANS = {"heldout": 0.5, "forgetting": 0.7}


def accuracy(mean, *, seed=0, problems=PROBLEMS, samples=8):
    """mean@k of a made-up model that is right with probability about ``mean``."""
    draw = random.Random(seed)
    rollouts = []
    for problem in problems:
        share = min(max(draw.gauss(mean, 0.25), 0), 1)
        rollouts += [
            Rollout(f"{problem.id}/{k}", problem.id, (1,) * (5 + k), sample=k,
                    outcome=right_or_wrong(draw.random() < share), truncated=draw.random() < 0.05)
            for k in range(samples)
        ]  # fmt: skip
    return Accuracy.of(rollouts, problems)


def results(**gains):
    """A base model and one a keyword, each better than it by the given amount."""
    models = {"base": 0.0, **gains}
    return {
        label: {suite: accuracy(mean + gain, seed=index) for suite, mean in SUITE_MEANS.items()}
        for index, (label, gain) in enumerate(models.items())
    }


def pass_rate_table(step, mean):
    draw = random.Random(step)
    rollouts = [
        Rollout(f"{p.id}/{k}", p.id, (1,), outcome=right_or_wrong(draw.random() < share))
        for p in PROBLEMS
        for share in [draw.betavariate(2 * mean, 2 * (1 - mean))]
        for k in range(8)
    ]
    return PassRateTable.estimate(rollouts, PROBLEMS, WeightsConfig(), student_step=step)


def verdicts(step):
    """Counts of 960 verdicts, a fifth of the right ones by the last number."""
    of = {
        (Outcome.right, "box", "text"): 400 + step,
        (Outcome.right, "last number", "numbers"): 100,
        (Outcome.wrong, "box", "numbers"): 360 - step,
        (Outcome.truncated, "cut off", "none"): 99,
        (Outcome.timed_out, "box", "math-verify"): 1,
    }
    return Verdicts((Ground(*kind), count) for kind, count in of.items())


def metric_lines(steps):
    """Two stages, a skipped step, a step without anything to train on, two validations."""
    draw = random.Random(0)
    lines = []
    for step in range(1, steps + 1):
        on_policy = step > steps // 2
        norm = 40 * math.exp(draw.gauss(0, 0.6))
        line = {
            "step": step, "stage": "reverse_kl" if on_policy else "forward_kl",
            "learning_rate": 3e-4, "loss": 3 * math.exp(-step / steps + draw.gauss(0, 0.3)),
            "token_divergence": 0.2 * math.exp(draw.gauss(0, 0.3)), "grad_norm": norm,
            "clipped": norm > 20, "skipped": False, "tokens": 900 + step,
            "weights/active_problems": 18, "time/step_s": 0.9, "time/teacher_s": 0.1,
            "time/student_s": 0.3, "throughput/tokens_per_second": 2000 + 10 * (step % 7),
            "throughput/student_tflops_per_rank": 120.0, "throughput/mfu": 0.31,
            "throughput/padding_share": 0.03,
            "weights/mean_pass_rate": 0.65 if on_policy else 0.45,
            "time/rollout_s": 0.3 if on_policy else 0.001,
        }  # fmt: skip
        if on_policy:
            line |= {
                "rollout/logprob_gap": 2e-7 * math.exp(draw.gauss(0, 0.3)),
                "rollout/accuracy": 0.6, "rollout/truncated": 0.03, "rollout/mean_length": 9.4,
                "rollout/staleness": 0, "time/refit_s": 0.15, "rollout/sampling_s": 0.25,
                "rollout/trainer_wait": 0.3, "rollout/server_wait": 0.6,
            }  # fmt: skip
        if step == 3:
            line |= {"skipped": True, "grad_norm": None, "loss": None, "clipped": False}
        if step == 5:
            line |= {"grad_norm": 0.0, "loss": 0.0, "tokens": 0, "clipped": False}
            del line["token_divergence"], line["time/teacher_s"]
        if step in (steps // 2, steps):
            line |= {"validation/accuracy": 0.6, "validation/standard_error": 0.03,
                     "time/validation_s": 2.0, "time/step_s": 2.9}  # fmt: skip
        lines.append(line)
    return lines


def start(step=0, **changes):
    """What a start of the run was recorded to run on."""
    found = Start(
        time="2026-11-25T09:40:17+00:00", step=step, nodes=2,
        devices={"NVIDIA H100 80GB HBM3 (79 GiB)": 16}, processor="A Processor, 104 cores",
        memory_gib=1007.5, system="Linux 6.8 x86_64", python="3.11.7", cuda="12.8",
        commit="0123456789ab", versions={"torch": "2.8.0", "megatron-core": "0.16.1"},
        preparation_s={"references": 310.0, "servers": 42.5, "pass_rates": 95.0, "cache": 0.0},
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def write_starts(directory, *starts):
    content = {"starts": [dataclasses.asdict(each) for each in starts]}
    (directory / ENVIRONMENT_FILE).write_text(json.dumps(content))


def write_certificate(run):
    """Of an FP8 teacher."""
    Certificate(
        identity={}, backend="torch", recipe="rowwise", versions={"torch": "2.13.0"},
        responses="rollouts", problems=16,
        tokens=812, kl_mean=0.00123, kl_median=0.0004, kl_p99=0.02, kl_max=0.31,
        top1_agreement=0.9877, divergence="reverse_kl", gradient_difference=0.0456,
        gradient_cosine=0.99891,
    ).write(run)  # fmt: skip


def write_run(directory, *, steps=60, **overrides):
    """config.yaml, environment.json, metrics.jsonl and two estimates of pass rates."""
    import yaml

    directory.mkdir(parents=True)
    config = to_dict(PacedConfig())
    config["trainer"]["max_steps"] = steps
    config["student"]["hf_path"] = overrides.get("hf_path", "/models/student")
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    write_starts(directory, start())
    text = "".join(json.dumps(line) + "\n" for line in metric_lines(steps))
    (directory / "metrics.jsonl").write_text(text)
    for step, mean in ((0, 0.45), (steps // 2, 0.65)):
        table = pass_rate_table(step, mean)
        table.write(directory / "pass_rates" / f"step_{step:08d}.parquet")
        verdicts(step).write(directory / "pass_rates" / f"step_{step:08d}.verdicts.json")
        table.write(directory / "pass_rates.parquet")
    assert len(pandas.read_parquet(directory / "pass_rates.parquet")) == len(PROBLEMS)
    return directory
