"""Every metric has a description, every description a metric, and all loggers the same names."""

import ast
import json
import re
import time
from pathlib import Path

import pytest

import nemo_paced
from nemo_paced.config import ExpManagerSettings, PacedConfig, TrainerConfig
from nemo_paced.run.metric_names import METRICS
from nemo_paced.run.progress import RunLog
from nemo_paced.training.loop import Loop
from scripts import metrics_table

PACKAGE = Path(nemo_paced.__file__).parent
READERS = {"report", "snr"}  # folders that show metrics and log none
# what is named below a heading; a metric without one is in every line of a run (see the slow test)
HEADINGS = {name.split("/")[0] for name in METRICS if "/" in name}
EMITTED = re.compile(rf"({'|'.join(sorted(HEADINGS))})/[\w.]+")


def emitted_names():
    """Metrics' names in the code that logs them: written out, or a part of a step that is timed."""
    names = set()
    paths = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in READERS]
    for path in paths:
        if path.name == "metric_names.py":
            continue
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            written = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if written and EMITTED.fullmatch(node.value):
                names.add(node.value)
        names |= {f"time/{part}_s" for part in re.findall(r'self\._timed\("(\w+)"\)', text)}
        for parts in re.findall(r"self\.times \|= \{(.*?)\}", text):
            names |= {f"time/{part}_s" for part in re.findall(r'"(\w+)":', parts)}
    return names


def test_every_metric_that_the_code_names_is_described():
    assert not emitted_names() - set(METRICS)


def test_every_described_metric_is_logged_by_somebody():
    assert not {name for name in METRICS if "/" in name} - emitted_names()


def test_a_description_is_whole():
    for name, metric in METRICS.items():
        assert metric.meaning and metric.when, name
        assert name.endswith("_s") == (metric.unit == "s"), name


def test_what_is_timed_within_a_part_counts_there_alone():
    loop = Loop.__new__(Loop)
    loop.times = {}
    begin = time.perf_counter()
    with loop._timed("rollout"):
        time.sleep(0.02)
        with loop._timed("refit"):
            time.sleep(0.2)
    whole = time.perf_counter() - begin
    assert loop.times["refit"] >= 0.2 > loop.times["rollout"] >= 0.02
    assert sum(loop.times.values()) == pytest.approx(whole, abs=0.01)


def test_the_page_of_metrics_is_what_metrics_table_writes():
    assert metrics_table.PATH.read_text() == metrics_table.metrics_table(), "make docs"
    assert all(f"| `{name}` |" in metrics_table.metrics_table() for name in METRICS)


def line(step, **more):
    common = {"step": step, "stage": "forward_kl", "loss": 2.0 / step, "grad_norm": None,
              "clipped": step == 2, "tokens": 10 * step, "time/step_s": 0.5}  # fmt: skip
    return common | more


@pytest.mark.slow  # NeMo's import takes most of it
def test_tensorboard_has_the_names_and_numbers_of_the_file(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = PacedConfig(
        trainer=TrainerConfig(log_every_n_steps=2, max_steps=6),
        exp_manager=ExpManagerSettings(exp_dir=str(tmp_path), name="run"),
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with RunLog(config, run_dir, 0, enabled=True) as log:
        for step in range(1, 7):
            more = {"validation/accuracy": 0.5} if step == 3 else {}
            log.step(line(step, **more))
    rows = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run_dir / "logs")).Reload()
    logged = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            logged.setdefault(event.step, {})[tag] = event.value
    assert sorted(logged) == [2, 3, 4, 6], "every second step, and the one with a validation"
    for step, values in logged.items():
        numbers = {k: float(v) for k, v in rows[step - 1].items() if isinstance(v, (int, float))}
        assert values == pytest.approx(numbers)
