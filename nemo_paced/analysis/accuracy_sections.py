"""Accuracy and forgetting of several models, and what the numbers allow to be said of them."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from nemo_paced.analysis import accuracy_figures
from nemo_paced.analysis.sections import Section
from nemo_paced.evaluation.results import Results
from nemo_paced.rollout.accuracy import Accuracy, Difference

FORGETTING = "forgetting"
WITHIN_NOISE, OUTCOME = "within noise", "at two standard errors"
ALL_PAIRS_OF = 4  # runs at most
NOT_ENOUGH = (
    "Differences of mean@k ± standard error, paired over problems; within noise: not above two "
    "standard errors. This is one seed: the error is that of the problem set alone, and the noise "
    "of training comes on top of it."
)


def accuracy_sections(results: Results, settings: dict[str, Any]) -> list[Section]:
    """Every suite by model, with paired differences from the first model."""
    labels = list(results)
    suites = list(dict.fromkeys(suite for model in results.values() for suite in model))
    complete = [s for s in suites if all(s in results[label] for label in labels)]
    sections = [_accuracy_table(results, suites, settings)]
    if complete:
        bars = {s: [_mean_and_error(results[m][s]) for m in labels] for s in complete}
        sections.append(
            Section("Accuracy by model", svg=accuracy_figures.accuracy_bars(labels, bars))
        )
    if complete and len(labels) > 1:
        intervals = {
            s: [
                _mean_and_error(Difference.between(results[m][s], results[labels[0]][s]))
                for m in labels[1:]
            ]
            for s in complete
        }
        svg = accuracy_figures.differences(labels[1:], intervals, labels[0])
        note = "Paired by problem, ± two standard errors: one that holds 0 shows no difference."
        sections.append(Section(f"Difference from {labels[0]}", svg=svg, note=note))
    return [*sections, forgetting_section(results), *_group_sections(results, suites)]


def forgetting_section(results: Results) -> Section:
    """What the trained models lost on the forgetting suite and on lm-eval's tasks: above 0 is
    forgotten."""
    title, reference = "Forgetting", next(iter(results))
    suites = [s for s, a in results[reference].items() if s == FORGETTING or a.metric]
    trained = [(s, m) for s in suites for m in results if m != reference and s in results[m]]
    if not trained:
        missing = (
            "Not measured: it takes a base and a trained model, both evaluated on a problem file "
            "named forgetting or on tasks of lm-eval."
        )
        return Section(title, missing=missing, wide=True)
    heads = ["problems", "model", "accuracy", f"{reference} minus model", "interval"]
    table = [[*heads, "lost", "gained", OUTCOME]]
    for suite in suites:
        before = results[reference][suite]
        table.append([suite, reference, _plus_minus(before), *[""] * 5])
        for model in [m for s, m in trained if s == suite]:
            after = results[model][suite]
            table.append([suite, model, _plus_minus(after), *_forgotten(before, after)])
    note = (
        "Skills that the base model had, paired by problem: above 0 was forgotten. Lost and "
        "gained: problems whose share of right answers fell and rose. The interval is two standard "
        "errors of the paired differences to both sides."
    )
    return Section(title, table=table, note=note, wide=True)


def _forgotten(before: Accuracy, after: Accuracy) -> list[str]:
    lost = Difference.between(before, after)
    words = {"better": "forgotten", "worse": "improved"}
    return [
        _signed(lost),
        _interval(lost),
        str(lost.gained),  # of before minus after
        str(lost.lost),
        words.get(lost.verdict(), WITHIN_NOISE),
    ]


def paired_section(results: Results, runs: list[str], subject: str) -> list[Section]:
    """Every two runs against each other, paired by problem; of many runs ``subject`` alone against
    the others. Nothing for fewer than two."""
    pairs = list(combinations(runs, 2))
    if len(runs) > ALL_PAIRS_OF:
        pairs = [(other, subject) for other in runs if other != subject and subject in results]
    heads = ["problems", "difference", "of mean@k", "interval", "gained", "lost", OUTCOME]
    table = [heads]
    for suite in dict.fromkeys(suite for label in runs for suite in results[label]):
        for before, after in pairs:
            if suite in results[before] and suite in results[after]:
                found = Difference.between(results[after][suite], results[before][suite])
                table.append(
                    [suite, f"{after} minus {before}", _signed(found), _interval(found),
                     str(found.gained), str(found.lost), _outcome(found)]
                )  # fmt: skip
    if len(table) == 1:
        return []
    count = len(table) - 1
    note = (
        "Gained and lost: problems whose share of right answers is larger and smaller. The "
        "interval is two standard errors of the paired differences to both sides, about 95 %"
    )
    note += f": of these {count} expect one in twenty to miss by chance." if count > 5 else "."
    return [Section("Runs against each other", table=table, note=note, wide=True)]


def verdict(results: Results, subject: str) -> list[str]:
    """What the numbers show of ``subject`` against each other model, and no more: sentences."""
    if subject not in results:
        return [f"{subject} was not among the models evaluated."]
    sentences = []
    for suite, accuracy in results[subject].items():
        others = {m: s[suite] for m, s in results.items() if m != subject and suite in s}
        if others:
            sentences.append(f"On {suite} problems {subject} is {_outcomes(accuracy, others)}.")
    if not sentences:
        return ["No other model was evaluated on the same problems: nothing can be compared."]
    return [*sentences, NOT_ENOUGH]


def _outcomes(accuracy: Accuracy, others: dict[str, Accuracy]) -> str:
    """``better than a (+0.1 ± 0.01); within noise of b (...), c (...)``."""
    said: dict[str, list[str]] = {"better than": [], "worse than": [], "within noise of": []}
    for label, other in others.items():
        difference = Difference.between(accuracy, other)
        outcome = f"{difference.verdict()} than"
        said[outcome if outcome in said else "within noise of"].append(
            f"{label} ({_signed(difference)})"
        )
    return "; ".join(f"{words} {', '.join(named)}" for words, named in said.items() if named)


def _accuracy_table(results: Results, suites: list[str], settings: dict[str, Any]) -> Section:
    reference = next(iter(results))
    compared = [f"minus {reference}", OUTCOME] if len(results) > 1 else []
    heading = ["problems", "model", "mean@k", *compared, "pass@k", "maj@k", "truncated"]
    heading += ["mean tokens", "95 % within"]
    table, ks = [heading], set[int]()
    for suite in suites:
        for label, model in results.items():
            if suite in model:
                before = results[reference].get(suite) if label != reference else None
                outcome = [""] * len(compared)
                if before is not None:
                    difference = Difference.between(model[suite], before)
                    outcome = [_signed(difference), _outcome(difference)]
                table.append(_accuracy_row(suite, label, model[suite], outcome))
                ks |= set() if model[suite].metric else {model[suite].samples}
    k = " or ".join(map(str, sorted(ks)))
    note = (
        f"mean@k: mean over problems of the share of right samples among k = {k}, ± its standard "
        "error over problems (the k samples of one problem are not independent draws). pass@k: "
        "share of problems with a right sample among the k; maj@k: whose most frequent answer is "
        "right. Of lm-eval's tasks, whose metric is named, there is one answer a question."
    )
    if settings:
        note += f" Settings: {_listed(settings)}."
    return Section("Accuracy", table=table, note=note, wide=True)


def _listed(settings: dict[str, Any]) -> str:
    """``temperature 0.6, lm_eval (num_fewshot 5, limit 2000)``."""
    return ", ".join(
        f"{name} ({_listed(value)})" if isinstance(value, dict) else f"{name} {value}"
        for name, value in settings.items()
    )


def _accuracy_row(suite: str, label: str, a: Accuracy, outcome: list[str]) -> list[str]:
    return [
        f"{suite} ({len(a.per_problem)})",
        label,
        _plus_minus(a) + (f" ({a.metric})" if a.metric else ""),
        *outcome,
        "" if a.metric else f"{a.pass_at_k:.3f}",
        "" if math.isnan(a.majority) else f"{a.majority:.3f}",
        f"{a.truncated:.1%}",
        "" if math.isnan(a.mean_length) else f"{a.mean_length:.1f}",
        "" if math.isnan(a.p95_length) else f"{a.p95_length:.0f}",
    ]


def _group_sections(results: Results, suites: list[str]) -> list[Section]:
    """Accuracy by the problems' groups, where a suite has several."""
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


def _mean_and_error(value: Accuracy | Difference) -> tuple[float, float]:
    return value.mean, value.standard_error


def _plus_minus(accuracy: Accuracy) -> str:
    return f"{accuracy.mean:.3f}{_error(accuracy)}"


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.3f}{_error(difference)}"


def _interval(difference: Difference) -> str:
    low, high = difference.interval
    return "" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"


def _outcome(difference: Difference) -> str:
    found = difference.verdict()
    return found if found in ("better", "worse") else WITHIN_NOISE


def _error(value: Accuracy | Difference) -> str:
    return "" if math.isnan(value.standard_error) else f" ± {value.standard_error:.3f}"
