"""What the records of a study say: paired over seeds, with intervals; JSON, tables and a plot."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study_arms import ARMS, PAIRS, REFERENCE

Record = dict[str, Any]
By = dict[tuple[str, float], dict[int, Record]]  # (arm, learning rate) -> seed -> record
BASE = "base"

MEASURES: dict[str, tuple[str, Callable[[Record, Record], float]]] = {
    "heldout": ("held-out, T .6", lambda run, base: run["heldout"]["mean"]),
    "heldout_t1": ("held-out, T 1", lambda run, base: run["heldout_t1"]["mean"]),
    "forgetting": (
        "forgetting (lower is better)",
        lambda run, base: base["old_skills"]["mean"] - run["old_skills"]["mean"],
    ),
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95 % interval by Student's t.

    Attributes:
        seeds: how many.
        low: NaN of a single seed, like ``high``.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @staticmethod
    def of(values: Iterable[float]) -> Interval:
        from scipy.stats import t

        found = list(values)
        mean = statistics.fmean(found)
        if len(found) < 2:
            return Interval(mean, float("nan"), float("nan"), len(found))
        error = statistics.stdev(found) / len(found) ** 0.5
        half = float(t.ppf(0.975, len(found) - 1)) * error
        return Interval(mean, mean - half, mean + half, len(found))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {(self.high - self.low) / 2:.3f}"

    def signed(self) -> str:
        """Bold where the interval leaves 0 out."""
        text = f"{self.mean:+.3f} ± {(self.high - self.low) / 2:.3f}"
        return f"**{text}**" if self.leaves_out_0 else text

    @property
    def leaves_out_0(self) -> bool:
        return self.low > 0 or self.high < 0


def write(records: list[Record], path: Path | None, described: dict[str, Any]) -> list[str]:
    """The tables as Markdown lines; with a path the figures as JSON, tables and a plot beside them.

    Args:
        described: settings and machine of the study, kept with the figures.
    """
    records = [compact(record) for record in records]  # so that what is kept gives the same tables
    found = summary(records)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {**described, "summary": found, "records": records}
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(found), encoding="utf-8")
        plot(found, path.with_suffix(".png"))
    return tables(found)


def page(found: dict[str, Any]) -> str:
    """The tables, with what a reader has to know of them."""
    lines = tables(found)
    differences = _shown_differences(found)
    sure = sum(each.leaves_out_0 for each in differences)
    head = [
        "# Figures of the study",
        "",
        "Written by `benchmarks/study.py --summary`; to be read with",
        "[its description](../README.md#study). `a ± b` is the mean over seeds and half its 95 %",
        "interval by Student's t. Differences are paired by seed, and bold where the interval",
        f"leaves out 0: {sure} of {len(differences)} are. By chance alone some "
        f"{len(differences) // 20} would be,",
        "hardly independent as they are.",
        "",
    ]
    return "\n".join([*head, *lines, ""])


def compact(record: Record) -> Record:
    """Five digits are more than the samples carry."""
    return json.loads(json.dumps(record), parse_float=lambda text: round(float(text), 5))


def summary(records: list[Record]) -> dict[str, Any]:
    """By learning rate and arm: each measure, its paired difference to the reference, to the base;
    and with each arm at the rate that did best on the *other* seeds."""
    by: By = defaultdict(dict)
    for record in records:
        by[record["arm"], record["learning_rate"]][record["seed"]] = record
    base = by.pop((BASE, 0.0), {})
    rates = sorted({rate for _, rate in by})
    found: dict[str, Any] = {"base": _base(base), "rates": {}, "pairs": {}, "own_rate": {}}
    for rate in rates:
        arms = [arm for arm in ARMS if by.get((arm, rate))]
        found["rates"][f"{rate:g}"] = {
            arm: _arm(by[arm, rate], by.get((REFERENCE, rate), {}), base) for arm in arms
        }
        found["pairs"][f"{rate:g}"] = {
            f"{arm} minus {other}": _differences(by[arm, rate], by[other, rate], base)
            for arm, other in PAIRS
            if by.get((arm, rate), {}).keys() & by.get((other, rate), {}).keys()
        } | {f"{arm} minus {BASE}": _differences(by[arm, rate], base, base) for arm in arms}
    if len(rates) > 1:
        found["own_rate"] = _at_own_rates(by, rates, base)
    return found


def _base(base: dict[int, Record]) -> dict[str, Any]:
    if not base:
        return {}
    suites = ("heldout", "heldout_t1", "old_skills")
    measured = {
        suite: asdict(Interval.of(r[suite]["mean"] for r in base.values())) for suite in suites
    }
    rates = {
        name: asdict(Interval.of(r["pass_rates"][name] for r in base.values()))
        for name in ("below_0.2", "above_0.8", "mean")
    }
    return measured | {"pass_rates": rates}


def _arm(
    runs: dict[int, Record], reference: dict[int, Record], base: dict[int, Record]
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, (_, measure) in MEASURES.items():
        fields[name] = asdict(Interval.of(measure(r, base[seed]) for seed, r in runs.items()))
    if runs.keys() & reference.keys():
        differences = _differences(runs, reference, base)
        fields |= {f"{name}_difference": each for name, each in differences.items()}
    for name in ("tokens", "problems", "clipped", "train_s", "evaluate_s"):
        fields[name] = statistics.fmean(run[name] for run in runs.values())
    return fields


def _differences(
    runs: dict[int, Record], others: dict[int, Record], base: dict[int, Record]
) -> dict[str, Any]:
    """Of each measure, over the seeds that both have."""
    paired = sorted(runs.keys() & others.keys())
    return {
        name: asdict(
            Interval.of(measure(runs[s], base[s]) - measure(others[s], base[s]) for s in paired)
        )
        for name, (_, measure) in MEASURES.items()
    }


def _at_own_rates(by: By, rates: list[float], base: dict[int, Record]) -> dict[str, Any]:
    """Of the arms that ran at every rate. The rate of a seed is the best of the other seeds, so
    that no figure is the largest of several noisy ones."""
    seeds = set(base)
    arms = [arm for arm in ARMS if all(by.get((arm, rate), {}).keys() >= seeds for rate in rates)]
    chosen: dict[str, dict[int, Record]] = {}
    for arm in arms if len(seeds) > 2 else []:
        chosen[arm] = {}
        for seed in seeds:
            others = seeds - {seed}

            def score(rate: float, arm: str = arm, others: set[int] = others) -> float:
                return statistics.fmean(by[arm, rate][s]["heldout"]["mean"] for s in others)

            chosen[arm][seed] = by[arm, max(rates, key=score)][seed]
    return {
        arm: _arm(runs, chosen.get(REFERENCE, {}), base)
        | {"chosen": _counts(r["learning_rate"] for r in runs.values())}
        for arm, runs in chosen.items()
    }


def _counts(rates: Iterable[float]) -> dict[str, int]:
    found: dict[str, int] = {}
    for rate in rates:
        found[f"{rate:g}"] = found.get(f"{rate:g}", 0) + 1
    return found


def tables(found: dict[str, Any]) -> list[str]:
    """Markdown: one table a learning rate."""
    lines = []
    if base := found["base"]:
        rates = base["pass_rates"]
        lines += [
            f"base: held-out {_text(base['heldout'])} (T .6), {_text(base['heldout_t1'])} (T 1); "
            f"old skills {_text(base['old_skills'])}; pass rates below .2 / above .8: "
            f"{rates['below_0.2']['mean']:.2f} / {rates['above_0.8']['mean']:.2f}, "
            f"mean {rates['mean']['mean']:.2f}",
        ]
    for rate, arms in found["rates"].items():
        lines += ["", f"Learning rate {rate}:", "", *_table(arms)]
        if pairs := found["pairs"][rate]:
            lines += ["", *_pairs_table(pairs)]
    if found["own_rate"]:
        lines += ["", "Each arm at its own rate, chosen on the other seeds:", ""]
        lines += _table(found["own_rate"])
    return lines


def _shown_differences(found: dict[str, Any]) -> list[Interval]:
    """All that the tables show."""
    groups = [*found["rates"].values(), *([found["own_rate"]] if found["own_rate"] else [])]
    to_reference = [
        fields[key]
        for arms in groups
        for arm, fields in arms.items()
        for key in (f"{name}_difference" for name in MEASURES)
        if arm != REFERENCE and fields.get(key) is not None
    ]
    pairs = [
        fields[name]
        for by_label in found["pairs"].values()
        for fields in by_label.values()
        for name in MEASURES
    ]
    return [Interval(**each) for each in to_reference + pairs]


def _table(arms: dict[str, Any]) -> list[str]:
    names = [title for title, _ in MEASURES.values()]
    head = ["arm", *(cell for name in names for cell in (name, f"against {REFERENCE}"))]
    lines = [_row([*head, "seeds"]), _row(["---", *["---:"] * len(head)])]
    for arm, fields in arms.items():
        cells = [arm]
        for name in MEASURES:
            cells.append(_text(fields[name]))
            difference = fields.get(f"{name}_difference")
            own = arm == REFERENCE or difference is None
            cells.append("" if own else Interval(**difference).signed())
        lines.append(_row([*cells, str(fields["heldout"]["seeds"])]))
    return lines


def _pairs_table(pairs: dict[str, Any]) -> list[str]:
    head = ["difference", *(title for title, _ in MEASURES.values()), "seeds"]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for label, fields in pairs.items():
        cells = [Interval(**fields[name]).signed() for name in MEASURES]
        lines.append(_row([label, *cells, str(fields["heldout"]["seeds"])]))
    return lines


def _text(interval: dict[str, Any]) -> str:
    return str(Interval(**interval))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(found: dict[str, Any], path: Path) -> None:
    """Paired differences to the reference, with intervals: a panel a measure, a colour a rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = [arm for arm in ARMS if arm != REFERENCE and any(arm in a for a in _all(found))]
    height = 1.2 + 0.5 * max(1, len(arms))
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, height), sharey=True)
    for axis, (name, (title, _)) in zip(axes, MEASURES.items(), strict=True):
        for index, (rate, by_arm) in enumerate(found["rates"].items()):
            offset = 0.2 * (index - (len(found["rates"]) - 1) / 2)
            rows = [
                (arms.index(arm) + offset, fields[f"{name}_difference"])
                for arm, fields in by_arm.items()
                if arm in arms and f"{name}_difference" in fields
            ]
            means = [d["mean"] for _, d in rows]
            errors = [(d["high"] - d["low"]) / 2 for _, d in rows]
            axis.errorbar(
                means, [y for y, _ in rows], xerr=errors, fmt="o", ms=4, capsize=2,
                label=f"learning rate {rate}",
            )  # fmt: skip
        axis.axvline(0, color="grey", lw=0.8)
        axis.set_title(f"{title}\nminus {REFERENCE}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.locator_params(axis="x", nbins=5)  # labels of neighbouring panels do not touch
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _all(found: dict[str, Any]) -> list[dict[str, Any]]:
    return list(found["rates"].values())
