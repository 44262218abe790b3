"""Report sections on time: where it went, who waited for whom, how fast training was."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from nemo_paced.report import figures
from nemo_paced.report.run_files import Rows
from nemo_paced.report.sections.section import (
    Section,
    curve_section,
    metric_line,
    rows_by_stage,
    stage_lines,
    values_of,
)
from nemo_paced.run.environment import Start

# part of a step as it is shown -> metric
PARTS = {
    "teacher": "time/teacher_s",
    "student": "time/student_s",
    "wait for rollouts": "time/rollout_s",
    "weights to server": "time/refit_s",
    "pass rates": "time/pass_rates_s",
    "validation": "time/validation_s",
    "checkpoint": "time/checkpoint_s",
}
# heading -> metric, of which a stage's median is shown
RATES = {
    "student TFLOP/s a rank": "throughput/student_tflops_per_rank",
    "teacher TFLOP/s a rank": "throughput/teacher_tflops_per_rank",
    "MFU": "throughput/mfu",
    "padding": "throughput/padding_share",
}


def timing_sections(rows: Rows, starts: Sequence[Start]) -> list[Section]:
    """Sections on wall time, throughput and waits; none for a run without a step."""
    if not rows:
        return []
    stages = {stage: split(own) for stage, own in rows_by_stage(rows).items()}
    waits = [
        metric_line("trainer for rollouts", rows, "rollout/trainer_wait"),
        metric_line("servers for work", rows, "rollout/server_wait", colour=1),
    ]
    sections = [
        Section(
            "Where the time went",
            svg=timing_figure(stages),
            table=split_table(stages),
            note=_preparation_note(starts),
        ),
        _throughput_section(rows),
    ]
    if any(waits):
        sections.append(
            curve_section("Waiting", waits, "share of a step's time", share=True,
                          note=_waits_note(rows))
        )  # fmt: skip
    return sections


def preparation(starts: Sequence[Start]) -> dict[str, float]:
    """Seconds before the first step by part, of all starts together."""
    spent: Counter[str] = Counter()
    for start in starts:
        spent.update(start.preparation_s)
    return {part.replace("_", " "): value for part, value in spent.items()}


def _preparation_note(starts: Sequence[Start]) -> str:
    spent = {part: value for part, value in preparation(starts).items() if value >= 0.1}
    if not spent:
        return ""
    parts = ", ".join(f"{part} {seconds(value)} s" for part, value in spent.items())
    count = f" of {len(starts)} starts" if len(starts) > 1 else ""
    return (
        f"Before the first step{count}, not in the figure: {parts}. What other commands prepared "
        "(references, pass-rates) is in neither."
    )


def split(rows: Rows) -> dict[str, float]:
    """Seconds of the steps in ``rows`` by part; ``other`` is what no part accounts for."""
    parts = {name: sum(values_of(rows, key)) for name, key in PARTS.items()}
    whole = sum(values_of(rows, "time/step_s"))
    return parts | {"other": max(whole - sum(parts.values()), 0.0)}


def timing_figure(splits: dict[str, dict[str, float]]) -> str:
    """Figure of the wall time by part, without parts that took next to none."""
    return figures.timing({label: _used(splits, parts) for label, parts in splits.items()})


def split_table(splits: dict[str, dict[str, float]]) -> list[list[str]]:
    """Table of seconds and share of the time, a row for each part, by stage or run."""
    table = [["part of the step", *splits]]
    used = [_used(splits, parts) for parts in splits.values()]
    for part in used[0]:
        cells = []
        for parts in used:
            share = parts[part] / (sum(parts.values()) or 1.0)
            cells.append(f"{seconds(parts[part])} s ({share:.0%})" if share >= 5e-4 else "-")
        table.append([part, *cells])
    return [*table, ["all", *(f"{seconds(sum(parts.values()))} s" for parts in splits.values())]]


def seconds(value: float) -> str:
    """Seconds as text: two decimals below 10, none from 100 on."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _used(splits: dict[str, dict[str, float]], parts: dict[str, float]) -> dict[str, float]:
    """The parts above a thousandth of all time in ``splits``; the rest is added to ``other``."""
    whole = sum(sum(each.values()) for each in splits.values())
    used = [name for name in parts if sum(s[name] for s in splits.values()) > 1e-3 * whole]
    kept = {name: parts[name] for name in used if name != "other"}
    return kept | {"other": sum(parts.values()) - sum(kept.values())}


def _throughput_section(rows: Rows) -> Section:
    stages = rows_by_stage(rows)
    table = [["", *stages], ["steps", *(str(len(own)) for own in stages.values())]]
    table.append(["median s a step", *(_median(own, "time/step_s") for own in stages.values())])
    table.append(["trained tokens a second", *map(_tokens_a_second, stages.values())])
    for name, key in RATES.items():
        if values_of(rows, key):
            table.append([name, *(_median(own, key) for own in stages.values())])
    lines = stage_lines(rows, "throughput/tokens_per_second")
    svg = figures.curves(lines, "tokens a second") if lines else ""
    note = (
        "Table: response tokens over the whole wall time of the stage, everything included; of the "
        "rows below the median step. Figure: over the teacher's and the student's time alone."
    )
    return Section("Throughput", svg=svg, table=table, note=note if lines else "")


def _tokens_a_second(rows: Rows) -> str:
    whole = sum(values_of(rows, "time/step_s"))
    return f"{sum(values_of(rows, 'tokens')) / whole:,.0f}" if whole else ""


def _median(rows: Rows, key: str) -> str:
    values = values_of(rows, key)
    return f"{statistics.median(values):.3g}" if values else ""


def _waits_note(rows: Rows) -> str:
    mean = {
        key: statistics.fmean(values)
        for key in ("rollout/trainer_wait", "rollout/server_wait", "rollout/sampling_s")
        if (values := values_of(rows, key))
    }
    said = []
    if "rollout/trainer_wait" in mean:
        said.append(f"the ranks waited for rollouts {mean['rollout/trainer_wait']:.0%} of the time")
    if "rollout/server_wait" in mean:
        said.append(f"the servers sampled nothing {mean['rollout/server_wait']:.0%} of it")
    if "rollout/sampling_s" in mean:
        said.append(f"a step's rollouts took {seconds(mean['rollout/sampling_s'])} s")
    note = f"On average {', '.join(said)}."
    staleness = values_of(rows, "rollout/staleness")
    if any(staleness):
        note += (
            f" They were sampled with weights {statistics.fmean(staleness):.1f} optimizer steps "
            f"old on average, {max(staleness):.0f} at most."
        )
    elif staleness:
        note += " All were sampled with the current weights (rollout.max_staleness 0)."
    return note
