"""Writes docs/metrics.md from nemo_paced/run/metric_names.py: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from nemo_paced.run.metric_names import METRICS

PATH = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """\
# Metrics

The names are the same in `metrics.jsonl` (one line a step), TensorBoard and W&B. The loggers get
every `trainer.log_every_n_steps`-th step and each one with a validation; the file gets all steps.
Divergences are in nats; a share is between 0 and 1; rates and times are rank 0's.
What a step did not do it does not log. [The report](report.md) draws them.

This page is made from `nemo_paced/run/metric_names.py` by `make docs`; edit it there.

| name | unit | what | when |
| --- | --- | --- | --- |
"""


def metrics_table() -> str:
    """The whole page."""
    rows = (
        f"| `{name}` | {each.unit} | {each.meaning.replace('|', chr(92) + '|')} | {each.when} |\n"
        for name, each in METRICS.items()
    )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PATH.write_text(metrics_table())
