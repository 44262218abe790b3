"""Report sections on pass rates and weights: as they are, and how they drifted."""

from __future__ import annotations

import statistics
from typing import Any

from nemo_paced.grading.verdicts import percent
from nemo_paced.records import Outcome
from nemo_paced.report import figures
from nemo_paced.report.run_files import Rows, RunFiles
from nemo_paced.report.sections.section import Section, values_of
from nemo_paced.weights.summary import drift_metrics, effective_sample_size

# metrics that are drawn at each step: three shares that make 1, and a mean
DRIFT = (
    "weights/share_below_0.2", "weights/share_between", "weights/share_above_0.8",
    "weights/mean_pass_rate",
)  # fmt: skip


def pass_rate_sections(run: RunFiles) -> list[Section]:
    """Sections on the histogram of pass rates, the weights, and the drift of pass rates."""
    tables = {step: table for step, table in run.tables.items() if table["num_rollouts"].any()}
    if not tables:
        return [Section("Pass rates", missing="No pass rates were estimated yet.")]
    first, last = min(tables), max(tables)
    shown = {f"step {step}": tables[step]["pass_rate"] for step in sorted({first, last})}
    frame = tables[last]
    k, fewest = int(frame["num_rollouts"].max()), int(frame["num_rollouts"].min())
    each = f"{k}" if k == fewest else f"{fewest} to {k}"
    means = ", ".join(f"{rates.mean():.3f} at {label}" for label, rates in shown.items())
    once = " Estimated once in this run." if first == last else ""
    return [
        Section(
            "Pass rates",
            svg=figures.pass_rate_histogram(shown, k),
            note=f"{len(frame)} training problems, {each} rollouts each; mean {means}.{once}",
        ),
        Section(
            f"Weights from step {last} on",
            svg=figures.weights_by_pass_rate(frame["pass_rate"], frame["weight"], k),
            note=_weights_note(frame, run.rows),
        ),
        *_verdict_sections(run),
        _drift_section(run),
    ]


def _verdict_sections(run: RunFiles) -> list[Section]:
    """What became of the responses behind each estimate, and what the right ones rest on.

    None for a run whose pass rates came from elsewhere.
    """
    if not run.verdicts:
        return []
    counted = dict(sorted(run.verdicts.items()))
    there = [outcome for outcome in Outcome if any(v.number(outcome) for v in counted.values())]
    by = {step: verdicts.by("evidence", Outcome.right) for step, verdicts in counted.items()}
    kinds = list(dict.fromkeys(kind for right in by.values() for kind in right))
    heads = [*(outcome.value for outcome in there), *(f"right by {kind}" for kind in kinds)]
    rows = [["step", "responses", *heads]]
    for step, verdicts in counted.items():
        shares = [verdicts.share(outcome) for outcome in there]
        shares += [by[step].get(kind, 0) / len(verdicts) for kind in kinds]
        rows.append([str(step), f"{len(verdicts):,}", *map(percent, shares)])
    note = (
        "Shares of all responses. Cut before an answer and without one count as wrong; what the "
        "verifier took too long for does not count. A last number is what a response ends with "
        "where it marks no answer; grading.last_number=false lets marked ones count alone."
    )
    return [Section("Verdicts behind the pass rates", table=rows, note=note, wide=True)]


def _weights_note(frame: Any, rows: Rows) -> str:
    weights = frame["weight"]
    unused = int((weights == 0).sum())
    note = f"Mean weight 1 over the training set; {unused} of {len(frame)} problems weigh 0."
    active = values_of(rows, "weights/active_problems")
    if active:
        note += f" On average {statistics.fmean(active):.1f} problems of a batch weighed more."
    effective = effective_sample_size(weights)
    return f"{note} Effective sample size {effective:.0f} problems: (sum w)² / sum w²."


def _drift_section(run: RunFiles) -> Section:
    title = "Drift of pass rates"
    points = _drift_of_rows(run.rows)
    if len(points) <= figures.MOST_BARS:  # estimates taken now and then, not after every step
        points = {step: _shares_and_mean(table) for step, table in sorted(run.tables.items())}
    if len(points) < 2:
        missing = "Pass rates were estimated once, so no drift can be shown."
        return Section(title, missing=missing)
    shares, means = [p[:3] for p in points.values()], [p[3] for p in points.values()]
    note = (
        f"Mean pass rate {means[0]:.3f} at step {min(points)}, {means[-1]:.3f} at step "
        f"{max(points)}; the useful middle held {shares[0][1]:.0%} of the problems, then "
        f"{shares[-1][1]:.0%}."
    )
    return Section(title, svg=figures.drift(list(points), shares, means), note=note)


def _drift_of_rows(rows: Rows) -> dict[int, tuple[float, ...]]:
    """The metrics ``DRIFT`` by step, at the steps where they changed."""
    points: dict[int, tuple[float, ...]] = {}
    last: tuple[float, ...] = ()
    for row in rows:
        if all(row.get(key) is not None for key in DRIFT):
            now = tuple(row[key] for key in DRIFT)
            if now != last:
                points[row["step"]] = last = now
    return points


def _shares_and_mean(table: Any) -> tuple[float, ...]:
    measured = drift_metrics(table["pass_rate"], table["weight"])
    return tuple(measured[key] for key in DRIFT)
