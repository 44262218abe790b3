"""Tables that ``evaluate`` prints: accuracies by suite, lm-eval's tasks, and what was forgotten."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nemo_paced.evaluation.results import Results
from nemo_paced.grading.accuracy import Accuracy, Difference
from nemo_paced.grading.verdicts import in_words, percent

WIDE = 100  # columns of a terminal, for pass@k at every k
NOTE = (
    "± is one standard error over problems (questions of lm-eval); the interval is two to both "
    "sides, of differences paired by problem; an outcome takes the exact sign-flip test too, at "
    "p of at most 0.05. cut: responses at the token limit (of lm-eval: "
    "prompts that lost their beginning). tokens: mean length of a response, and p95. One seed: the "
    "noise of training comes on top."
)


def show(console: Console, results: Results, settings: dict[str, Any]) -> None:
    """Print all tables of an evaluation, each model's row under the baseline's."""
    suites = next(iter(results.values()))
    sampled = [suite for suite, accuracy in suites.items() if not accuracy.metric]
    for suite in sampled:
        console.print(_sampled_table(results, suite, wide=console.width >= WIDE))
        for label, measured in results.items():
            if line := verdict_line(measured[suite]):
                console.print(f"{label}: {line}", style="dim", highlight=False)
    if len(sampled) < len(suites):
        console.print(_lm_eval_table(results, [s for s in suites if s not in sampled]))
    if "baseline" in results:
        console.print(forgetting_table(results))
    console.print(NOTE, style="dim")
    if limit := settings.get("max_tokens_from"):
        console.print(f"responses: at most {settings['max_tokens']} tokens ({limit})", style="dim")


def verdict_line(accuracy: Accuracy) -> str:
    """What became of a suite's samples, and what the right ones rest on, in words.

    Empty where that was not counted.
    """
    line = in_words(accuracy.outcomes)
    by = ", ".join(f"{kind} {percent(share)}" for kind, share in accuracy.right_by.items())
    return f"{line}; right ones by {by}" if by else line


def forgetting_table(results: Results) -> Table:
    """Table of baseline minus model, paired by problem, for every suite: above 0 is lost."""
    table = _table(
        "Forgetting: baseline - model (above 0 is lost)",
        ["suite", "baseline", "model", "difference", "interval", "lost", "gained", ""],
    )
    for suite, before in results["baseline"].items():
        after = results["model"][suite]
        difference = Difference.between(before, after)
        low, high = difference.interval
        said = {"better": "forgotten", "worse": "improved"}
        table.add_row(
            suite,
            f"{before.mean:.3f}",
            f"{after.mean:.3f}",
            f"{difference.mean:+.3f}",
            "" if math.isnan(low) else f"{low:+.3f} {high:+.3f}",
            # of before minus after: what rose was lost
            str(difference.gained),
            str(difference.lost),
            said.get(difference.verdict(), "not shown"),
        )
    return table


def _sampled_table(results: Results, suite: str, *, wide: bool) -> Table:
    """Table of one sampled suite, a row for each model.

    mean@k of any k estimates the same mean; pass@k is of a k that every model has.
    """
    measured = {label: suites[suite] for label, suites in results.items()}
    fewest = min(measured.values(), key=lambda accuracy: accuracy.samples)
    ks = [k for k in fewest.pass_at_powers if k > 1]
    ks = ks if wide else ks[-1:]
    samples = sorted({accuracy.samples for accuracy in measured.values()})
    k = str(samples[0]) if len(samples) == 1 else "k"
    own = ["k"] if k == "k" else []  # a column where models differ
    each = " or ".join(map(str, samples))
    title = f"{suite}: {len(fewest.per_problem)} problems, {each} samples each"
    heads = [*(f"pass@{k}" for k in ks), f"maj@{k}", "cut", "tokens", "p95"]
    table = _table(title, ["model", *own, f"mean@{k}", *heads])
    for label, a in measured.items():
        table.add_row(
            label,
            *([str(a.samples)] if own else []),
            a.plus_minus(),
            *(f"{a.pass_at(k).mean:.3f}" for k in ks),
            _number(a.majority, ".3f"),
            f"{a.truncated:.1%}",
            _number(a.mean_length, ",.0f"),
            _number(a.p95_length, ",.0f"),
        )
    return table


def _lm_eval_table(results: Results, suites: list[str]) -> Table:
    table = _table("lm-eval", ["task", "model", "metric", "value", "questions", "cut"])
    for suite in suites:
        for label, measured in results.items():
            a = measured[suite]
            table.add_row(
                suite,
                label,
                a.metric,
                a.plus_minus(),
                str(len(a.per_problem)),
                f"{a.truncated:.1%}",
            )
    return table


def _table(title: str, heads: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        left = head in ("suite", "task", "model", "metric", "")
        # names give way where a line is too long, numbers do not
        table.add_column(
            head, justify="left" if left else "right", no_wrap=not left, overflow="fold"
        )
    return table


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
