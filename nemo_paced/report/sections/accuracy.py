"""Sections on accuracy and forgetting of several models, and what the numbers allow to be said."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from nemo_paced.evaluation.results import Results
from nemo_paced.grading.accuracy import Accuracy, Difference
from nemo_paced.report import accuracy_figures
from nemo_paced.report.accuracy_table import (
    OUTCOME,
    WITHIN_NOISE,
    accuracy_table,
    group_sections,
    interval,
    outcome,
    shown_baseline,
    signed,
)
from nemo_paced.report.evaluated_runs import Baselines
from nemo_paced.report.sections.section import Section

FORGETTING = "forgetting"
ALL_PAIRS_OF = 4  # runs, at most, of which every two are compared
EXACT = (
    "An outcome also takes p of at most 0.05 in the exact sign-flip test (of one answer a "
    "problem it is McNemar's), which fewer than 6 changed problems cannot reach."
)
NOT_ENOUGH = (
    "Differences of mean@k ± standard error, paired over problems; within noise: not above two "
    "standard errors, or p above 0.05 in the exact sign-flip test. This is one seed: the error is "
    "that of the problem set alone, and the noise of training comes on top of it."
)


def accuracy_sections(
    results: Results, settings: dict[str, Any], baselines: Baselines | None = None
) -> list[Section]:
    """Sections on every suite by model, with paired differences from the model's baseline.

    Args:
        settings: how the accuracies were sampled.
        baselines: label of a model -> of its baseline; ``None``: the first model for all others.
    """
    labels = list(results)
    baselines = _first_for_all(results) if baselines is None else baselines
    suites = list(dict.fromkeys(suite for model in results.values() for suite in model))
    complete = [s for s in suites if all(s in results[label] for label in labels)]
    sections = [accuracy_table(results, suites, settings, baselines)]
    if complete:
        bars = {s: [_mean_and_error(results[m][s]) for m in labels] for s in complete}
        sections.append(
            Section("Accuracy by model", svg=accuracy_figures.accuracy_bars(labels, bars))
        )
    if complete and baselines:
        reference = shown_baseline(baselines)
        intervals = {
            s: [
                _mean_and_error(Difference.between(results[m][s], results[before][s]))
                for m, before in baselines.items()
            ]
            for s in complete
        }
        svg = accuracy_figures.differences(list(baselines), intervals, reference)
        note = "Paired by problem, ± two standard errors: one that holds 0 shows no difference."
        sections.append(Section(f"Difference from {reference}", svg=svg, note=note))
    forgetting = forgetting_section(results, baselines)
    return [*sections, forgetting, *group_sections(results, suites)]


def forgetting_section(results: Results, baselines: Baselines | None = None) -> Section:
    """Section on what each trained model lost of its baseline's accuracy: above 0 is forgotten.

    It is measured on the suite ``forgetting`` and on lm-eval's tasks.
    """
    title = "Forgetting"
    baselines = _first_for_all(results) if baselines is None else baselines
    bases = dict.fromkeys(baselines.values())
    suites = {s: a for before in bases for s, a in results[before].items()}
    pairs = [
        (suite, before, [m for m in baselines if baselines[m] == before and suite in results[m]])
        for suite, accuracy in suites.items()
        for before in bases
        if (suite == FORGETTING or accuracy.metric) and suite in results[before]
    ]
    if not any(models for _, _, models in pairs):
        missing = (
            "Not measured: it takes a base and a trained model, both evaluated on a problem file "
            "named forgetting or on tasks of lm-eval."
        )
        return Section(title, missing=missing, wide=True)
    heads = ["problems", "model", "accuracy", f"{shown_baseline(baselines)} minus model"]
    table = [[*heads, "interval", "lost", "gained", OUTCOME]]
    for suite, label, models in pairs:
        before = results[label][suite]
        table.append([suite, label, before.plus_minus(), *[""] * 5])
        for model in models:
            after = results[model][suite]
            table.append([suite, model, after.plus_minus(), *_forgotten(before, after)])
    note = (
        "Skills that the base model had, paired by problem: above 0 was forgotten. Lost and "
        "gained: problems whose share of right answers fell and rose. The interval is two standard "
        f"errors of the paired differences to both sides. {EXACT}"
    )
    return Section(title, table=table, note=note, wide=True)


def _forgotten(before: Accuracy, after: Accuracy) -> list[str]:
    lost = Difference.between(before, after)
    words = {"better": "forgotten", "worse": "improved"}
    return [
        signed(lost),
        interval(lost),
        str(lost.gained),  # what rose in before minus after was lost
        str(lost.lost),
        words.get(lost.verdict(), WITHIN_NOISE),
    ]


def paired_section(results: Results, runs: list[str], subject: str) -> list[Section]:
    """Section on every two runs against each other, paired by problem; none for fewer than two.

    Of more than ``ALL_PAIRS_OF`` runs, ``subject`` alone is compared with the others.
    """
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
                    [suite, f"{after} minus {before}", signed(found), interval(found),
                     str(found.gained), str(found.lost), outcome(found)]
                )  # fmt: skip
    if len(table) == 1:
        return []
    count = len(table) - 1
    note = (
        "Gained and lost: problems whose share of right answers is larger and smaller. The "
        "interval is two standard errors of the paired differences to both sides, about 95 %"
    )
    note += f": of these {count} expect one in twenty to miss by chance." if count > 5 else "."
    note += f" {EXACT}"
    return [Section("Runs against each other", table=table, note=note, wide=True)]


def verdict(results: Results, subject: str, baselines: Baselines | None = None) -> list[str]:
    """Sentences on what the numbers show of ``subject`` against each other model, and no more.

    The baselines of others, which it did not start from, are left out.
    """
    if subject not in results:
        return [f"{subject} was not among the models evaluated."]
    known = baselines or {}
    foreign = set(known.values()) - {known.get(subject)}
    results = {label: suites for label, suites in results.items() if label not in foreign}
    sentences = []
    for suite, accuracy in results[subject].items():
        others = {m: s[suite] for m, s in results.items() if m != subject and suite in s}
        if others:
            sentences.append(f"On {suite} problems {subject} is {_outcomes(accuracy, others)}.")
    if not sentences:
        return ["No other model was evaluated on the same problems: nothing can be compared."]
    return [*sentences, NOT_ENOUGH]


def _outcomes(accuracy: Accuracy, others: dict[str, Accuracy]) -> str:
    """The others by outcome: ``better than a (+0.1 ± 0.01); within noise of b (...), c (...)``."""
    said: dict[str, list[str]] = {"better than": [], "worse than": [], "within noise of": []}
    for label, other in others.items():
        difference = Difference.between(accuracy, other)
        outcome = f"{difference.verdict()} than"
        said[outcome if outcome in said else "within noise of"].append(
            f"{label} ({signed(difference)})"
        )
    return "; ".join(f"{words} {', '.join(named)}" for words, named in said.items() if named)


def _first_for_all(results: Results) -> Baselines:
    first, *others = results
    return dict.fromkeys(others, first)


def _mean_and_error(value: Accuracy | Difference) -> tuple[float, float]:
    return value.mean, value.standard_error
