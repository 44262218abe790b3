"""Tables of accuracies by model, and how accuracies and their differences are written."""

from __future__ import annotations

import math
from typing import Any

from nemo_paced.evaluation.results import Results
from nemo_paced.grading.accuracy import Accuracy, Difference
from nemo_paced.report.evaluated_runs import Baselines
from nemo_paced.report.sections.section import Section

WITHIN_NOISE, OUTCOME = "within noise", "outcome"


def accuracy_table(
    results: Results, suites: list[str], settings: dict[str, Any], baselines: Baselines
) -> Section:
    """Table of accuracies by suite and model, with differences from each model's baseline."""
    compared = [f"minus {shown_baseline(baselines)}", OUTCOME] if baselines else []
    heading = ["problems", "model", "mean@k", *compared, "pass@k", "maj@k", "truncated"]
    heading += ["mean tokens", "95 % within"]
    table, ks = [heading], set[int]()
    for suite in suites:
        samples = {model[suite].samples for model in results.values() if suite in model}
        for label, model in results.items():
            if suite in model:
                before = results[baselines[label]].get(suite) if label in baselines else None
                found = [""] * len(compared)
                if before is not None:
                    difference = Difference.between(model[suite], before)
                    found = [signed(difference), outcome(difference)]
                table.append(_accuracy_row(suite, label, model[suite], found, samples))
                ks |= set() if model[suite].metric else {model[suite].samples}
    k = " or ".join(map(str, sorted(ks)))
    note = (
        f"mean@k: mean over problems of the share of right samples among k = {k}, ± its standard "
        "error over problems (the k samples of one problem are not independent draws). pass@k: "
        "share of problems with a right sample among the k, among the fewest where models have "
        "several k; maj@k: whose most frequent answer is right. Of lm-eval's tasks, whose metric "
        "is named, there is one answer a question."
    )
    if settings:
        note += f" Settings: {_listed(settings)}."
    return Section("Accuracy", table=table, note=note, wide=True)


def _listed(settings: dict[str, Any]) -> str:
    """Settings in one line: ``temperature 0.6, lm_eval (num_fewshot 5, limit 2000)``."""
    return ", ".join(
        f"{name} ({_listed(value)})" if isinstance(value, dict) else f"{name} {value}"
        for name, value in settings.items()
    )


def _accuracy_row(
    suite: str, label: str, a: Accuracy, compared: list[str], samples: set[int]
) -> list[str]:
    """The table's row for one model on one suite.

    Args:
        compared: cells of the difference from the baseline.
        samples: the k of all models on this suite; where they differ each row tells its own.
    """
    own_k = f" (k = {a.samples})" if len(samples) > 1 else ""
    return [
        f"{suite} ({len(a.per_problem)})",
        label,
        a.plus_minus() + (f" ({a.metric})" if a.metric else own_k),
        *compared,
        "" if a.metric else f"{a.pass_at(min(samples)).mean:.3f}",
        "" if math.isnan(a.majority) else f"{a.majority:.3f}{own_k}",
        f"{a.truncated:.1%}",
        "" if math.isnan(a.mean_length) else f"{a.mean_length:.1f}",
        "" if math.isnan(a.p95_length) else f"{a.p95_length:.0f}",
    ]


def group_sections(results: Results, suites: list[str]) -> list[Section]:
    """Table of mean@k by model and group of problems; none where no suite has several groups."""
    groups: dict[tuple[str, str], None] = {}
    for suite in suites:
        for model in results.values():
            if suite in model:
                groups |= dict.fromkeys((suite, group) for group in model[suite].groups)
    if len(groups) <= len(suites):
        return []
    table = [["model", *(f"{suite}: {group or 'other'}" for suite, group in groups)]]
    for label, model in results.items():
        cells = [model[s].groups.get(g) if s in model else None for s, g in groups]
        table.append([label, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    return [Section("Accuracy by kind of problem", table=table, note="mean@k", wide=True)]


def shown_baseline(baselines: Baselines) -> str:
    """The baseline's name for a heading; ``its own base`` where models have several."""
    names = set(baselines.values())
    return names.pop() if len(names) == 1 else "its own base"


def signed(difference: Difference) -> str:
    """A difference and its standard error, which is left out where there is no interval."""
    known = not math.isnan(difference.interval[0])
    return f"{difference.mean:+.3f}" + (f" ± {difference.standard_error:.3f}" if known else "")


def interval(difference: Difference) -> str:
    """Two standard errors to both sides of a difference; empty where the spread is zero."""
    low, high = difference.interval
    return "" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"


def outcome(difference: Difference) -> str:
    """What a difference allows to be said: ``better``, ``worse`` or ``within noise``."""
    found = difference.verdict()
    return found if found in ("better", "worse") else WITHIN_NOISE
