"""Sections of a comparison on how its runs were trained: what differs, curves, time."""

from __future__ import annotations

import statistics
from typing import Any

from nemo_paced.report.run_files import RunFiles
from nemo_paced.report.sections.section import Section, curve_section, metric_line, values_of
from nemo_paced.report.sections.settings import environment
from nemo_paced.report.sections.timing import (
    preparation,
    seconds,
    split,
    split_table,
    timing_figure,
)
from nemo_paced.report.sections.training import LOSS_NOTE, share_clipped

ABSENT = "-"
# settings of which every run has its own: that they differ says nothing
OWN_SETTINGS = (
    "exp_manager.name",
    "exp_manager.exp_dir",
    "exp_manager.version",
    "rollout.endpoints",
)


def side_by_side(runs: dict[str, RunFiles]) -> list[Section]:
    """Sections that show several runs beside each other.

    Args:
        runs: label -> run, in the order in which they are shown and coloured.
    """

    def curve(title: str, key: str, ylabel: str, error: str | None = None, **options: Any):
        lines = [
            metric_line(label, run.rows, key, error, colour=index)
            for index, (label, run) in enumerate(runs.items())
        ]
        return [curve_section(title, lines, ylabel, **options)] if any(lines) else []

    return [
        _runs_section(runs),
        *_settings_section(runs),
        *_environments_section(runs),
        *curve("Loss", "loss", "loss as minimised (nats)", note=f"{LOSS_NOTE} Comparable between "
               "runs of one divergence and one weighting alone."),
        *curve("Divergence of a token", "token_divergence", "mean of a token (nats)",
               note="Unweighted, but each run trains on other tokens, and a stage change changes "
               "the divergence: levels are comparable within a stage alone."),
        *curve("Gradient norm", "grad_norm", "global norm before clipping", log=True),
        *curve("Validation", "validation/accuracy", "mean@k", "validation/standard_error",
               note="Held-out problems, ± standard error over them."),
        *curve("Mean pass rate", "weights/mean_pass_rate", "of the training problems",
               share=True, noisy=False, note="As the run's latest estimate has it: it moves where "
               "pass rates are estimated again."),
        *curve("Training rollouts", "rollout/accuracy", "share that was right", share=True),
        *_timing_section(runs),
    ]  # fmt: skip


def _runs_section(runs: dict[str, RunFiles]) -> Section:
    table = [["run", "steps", "stages", "problems a batch", "tokens", "clipped", "validation",
              "median s a step", "s in steps", "s before them"]]  # fmt: skip
    for label, run in runs.items():
        cells = _run_cells(run) if run.rows else ["0"]
        table.append([label, *cells, *[""] * (len(table[0]) - 1 - len(cells))])
    note = (
        "Problems of weight above 0 in a batch, and their response tokens: what was trained on. "
        "Validation: the last one. Before the steps: references, servers and pass rates, as far as "
        "the run made them itself."
    )
    return Section("Runs", table=table, note=note, wide=True)


def _run_cells(run: RunFiles) -> list[str]:
    rows, before = run.rows, preparation(run.starts)
    active = values_of(rows, "weights/active_problems") or [0]
    validated = [row for row in rows if row.get("validation/accuracy") is not None]
    last = validated[-1] if validated else None
    times = values_of(rows, "time/step_s") or [0.0]
    return [
        str(rows[-1]["step"]),
        ", ".join(dict.fromkeys(str(row["stage"]) for row in rows)),
        f"{statistics.fmean(active):.1f}",
        f"{sum(values_of(rows, 'tokens')):,.0f}",
        f"{share_clipped(rows):.0%}",
        f"{last['validation/accuracy']:.3f} at {last['step']}" if last else "",
        f"{statistics.median(times):.3g}",
        seconds(sum(times)),
        seconds(sum(before.values())) if before else "",
    ]


def _settings_section(runs: dict[str, RunFiles]) -> list[Section]:
    """Section on the settings in which the runs differ, which are what is compared."""
    by_run = {label: run.settings_by_key() for label, run in runs.items() if run.config}
    if len(by_run) < 2:
        return []
    settings, left_out = _known_to_all(by_run)
    table, title = _differing(settings), "Settings that differ"
    note = f"{ABSENT}: the run has no such stage." if len(table) > 1 else "None."
    if left_out:
        count = f"{left_out} setting{'s' * (left_out > 1)}"
        note += f" Not shown: {count} that only some of the runs' versions know."
    return [Section(title, table=table if len(table) > 1 else None, note=note, wide=True)]


def _known_to_all(by_run: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], int]:
    """The settings that all runs' versions of the program know, and how many others there are.

    Settings of which every run has its own are left out and not counted. Stages may be fewer in one
    run than in another.
    """
    in_all = set.intersection(*map(set, by_run.values()))
    every = dict.fromkeys(key for settings in by_run.values() for key in settings)
    new = {key for key in every if key not in in_all and not key.startswith("stages[")}
    hidden = new | set(OWN_SETTINGS)
    kept = {
        label: {key: value for key, value in settings.items() if key not in hidden}
        for label, settings in by_run.items()
    }
    return kept, len(new)


def _environments_section(runs: dict[str, RunFiles]) -> list[Section]:
    last = {label: environment(run.starts[-1]) for label, run in runs.items() if run.starts}
    if len(last) < 2:
        return []
    table, title = _differing(last), "Environments that differ"
    same = last[next(iter(last))]
    note = f"None: all on {same['ranks that train']}, {same['processor']}, same versions."
    if len(table) > 1:
        note = "At the last start of each run."
    if unknown := [label for label in runs if label not in last]:
        note += f" Not recorded: {', '.join(unknown)}."
    return [Section(title, table=table if len(table) > 1 else None, note=note, wide=True)]


def _differing(by_run: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A table with a row for each key whose value is not the same in all runs."""
    table = [["what", *by_run]]
    for key in dict.fromkeys(key for each in by_run.values() for key in each):
        cells = [_cell(each[key]) if key in each else ABSENT for each in by_run.values()]
        if len(set(cells)) > 1:
            table.append([key, *_without_common_tail(cells)])
    return table


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _without_common_tail(paths: list[str]) -> list[str]:
    """Long paths cut to what tells them apart, and their name: ``/a/.../x`` for ``/a/b/c/x``."""
    parts = [path.split("/") for path in paths]
    common = 0
    while all(len(p) > common + 1 and p[-common - 1] == parts[0][-common - 1] for p in parts):
        common += 1
    if common < 3:
        return paths
    return ["/".join([*p[:-common], "...", p[-1]]) for p in parts]


def _timing_section(runs: dict[str, RunFiles]) -> list[Section]:
    splits = {label: split(run.rows) for label, run in runs.items() if run.rows}
    if not splits:
        return []
    return [
        Section(
            "Where the time went",
            svg=timing_figure(splits),
            table=split_table(splits),
            note="Comparable between runs on one machine alone.",
        )
    ]
