"""What a report says of one run, section by section: figures, tables and plain sentences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_paced.analysis import figures
from nemo_paced.analysis.figures import Line
from nemo_paced.analysis.run_files import Rows, RunFiles
from nemo_paced.teacher.certificate import Certificate


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what is under it; ``missing`` says why there is nothing to show.

    Attributes:
        table: rows of cells, the first of them the heading.
        text: shown as it is, folded away.
        wide: takes the page's whole width instead of one column.
    """

    title: str
    svg: str = ""
    note: str = ""
    missing: str = ""
    text: str = ""
    table: list[list[str]] | None = None
    wide: bool = False


def run_sections(run: RunFiles) -> list[Section]:
    """Pass rates and weights, training, time and configuration of a run."""
    sections = [*_pass_rate_sections(run), *_training_sections(run.rows)]
    sections += _rollout_sections(run.rows)
    if run.certificate is not None:
        sections.append(_certificate_section(run.certificate))
    if run.rows:
        sections += [_timing_section(run.rows)]
    if run.config:
        sections.append(Section("Configuration", text=run.config, wide=True))
    else:
        sections.append(Section("Configuration", missing="There is no config.yaml.", wide=True))
    return sections


def stage_lines(rows: Rows, key: str, error_key: str | None = None) -> list[Line]:
    """A metric as a line a stage, at the steps that logged it."""
    stages = dict.fromkeys(row["stage"] for row in rows)
    lines = (
        metric_line(str(stage), [r for r in rows if r["stage"] == stage], key, error_key)
        for stage in stages
    )
    return [line for line in lines if line is not None]


def metric_line(label: str, rows: Rows, key: str, error_key: str | None = None) -> Line | None:
    """``None`` where no step logged the metric (null stands for NaN in the file)."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        return None
    errors = [row.get(error_key) or 0.0 for row in rows] if error_key else None
    return Line(label, [row["step"] for row in rows], [row[key] for row in rows], errors)


def curve_section(
    title: str,
    lines: Sequence[Line | None],
    ylabel: str,
    *,
    log: bool = False,
    share: bool = False,
    note: str = "",
) -> Section:
    """A section of curves, or what is missing."""
    there = [line for line in lines if line is not None]
    if not there:
        return Section(title, missing="No step logged a value.")
    return Section(title, svg=figures.curves(there, ylabel, log=log, share=share), note=note)


def share_clipped(rows: Rows) -> float:
    """Of the steps that had a gradient."""
    clipped = [bool(row.get("clipped")) for row in rows if row.get("grad_norm")]
    return statistics.fmean(clipped) if clipped else 0.0


def _pass_rate_sections(run: RunFiles) -> list[Section]:
    tables = run.tables
    if not tables:
        return [Section("Pass rates", missing="No pass rates were estimated yet.")]
    first, last = min(tables), max(tables)
    shown = {f"step {step}": tables[step]["pass_rate"] for step in sorted({first, last})}
    frame = tables[last]
    k, fewest = int(frame["num_rollouts"].max()), int(frame["num_rollouts"].min())
    each = f"{k}" if k == fewest else f"{fewest} to {k}"
    means = ", ".join(f"{rates.mean():.3f} at {label}" for label, rates in shown.items())
    once = " Estimated once in this run." if first == last else ""
    sections = [
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
    ]
    if len(tables) > 1:
        by_step = {step: table["pass_rate"] for step, table in tables.items()}
        drift = Section("Drift of pass rates", svg=figures.drift(by_step))
    else:
        drift = Section(
            "Drift of pass rates",
            missing="Pass rates were estimated once, so no drift can be shown.",
        )
    return [*sections, drift]


def _weights_note(frame: Any, rows: Rows) -> str:
    unused = int((frame["weight"] == 0).sum())
    note = f"Mean weight 1 over the training set; {unused} of {len(frame)} problems weigh 0."
    active = [row["weights/active_problems"] for row in rows if "weights/active_problems" in row]
    if active:
        note += f" On average {statistics.fmean(active):.1f} problems of a batch weighed more."
    return note


def _training_sections(rows: Rows) -> list[Section]:
    if not rows:
        return [Section("Training", missing="No optimizer step was taken yet.")]
    stages = stage_lines(rows, "loss")
    note = "Token sums weighted by problem, over the problems of a batch."
    if len(stages) > 1:
        note += " Each stage minimises its own divergence: their levels cannot be compared."
    skipped = sum(bool(row.get("skipped")) for row in rows)
    sections = [
        curve_section("Loss", stages, "loss as minimised (nats)", note=note),
        curve_section(
            "Divergence of a token",
            stage_lines(rows, "token_divergence"),
            "mean of a token (nats)",
            note="Student from teacher over the trained tokens, unweighted.",
        ),
        curve_section(
            "Gradient norm",
            stage_lines(rows, "grad_norm"),
            "global norm before clipping",
            log=True,
            note=f"{share_clipped(rows):.0%} of the steps were clipped, {skipped} skipped.",
        ),
    ]
    if len({row.get("learning_rate") for row in rows}) > 1:
        rates = stage_lines(rows, "learning_rate")
        sections.append(curve_section("Learning rate", rates, "learning rate"))
    validation = stage_lines(rows, "validation/accuracy", "validation/standard_error")
    if validation:
        note = "Held-out problems, with the standard error over problems."
        sections.append(curve_section("Validation", validation, "mean@k", note=note))
    else:
        missing = "No validation in this run: set trainer.val_check_interval and "
        missing += "data.validation_problems to have it."
        sections.append(Section("Validation", missing=missing))
    return sections


def _rollout_sections(rows: Rows) -> list[Section]:
    """The on-policy stage; nothing for a run without one."""
    gap = stage_lines(rows, "rollout/logprob_gap")
    shares = [
        metric_line("right", rows, "rollout/accuracy"),
        metric_line("truncated", rows, "rollout/truncated"),
    ]
    if not gap and shares == [None, None]:
        return []
    return [
        curve_section(
            "Trainer against rollout server",
            gap,
            "mean |gap| of a token (nats)",
            log=True,
            note="Gap between the log-probabilities of the sampled tokens by both: how far the "
            "sampler is from the student being trained.",
        ),
        curve_section("Training rollouts", shares, "share of the step's rollouts", share=True),
        curve_section(
            "Length of training rollouts", stage_lines(rows, "rollout/mean_length"), "mean tokens"
        ),
    ]


def _certificate_section(certificate: Certificate) -> Section:
    figures_of = [
        ["KL(BF16 || FP8) of a token, nats", ""],
        ["mean", f"{certificate.kl_mean:.3g}"],
        ["median", f"{certificate.kl_median:.3g}"],
        ["99th percentile", f"{certificate.kl_p99:.3g}"],
        ["largest", f"{certificate.kl_max:.3g}"],
        ["same likeliest token", f"{certificate.top1_agreement:.2%}"],
        ["gradient off by", f"{certificate.gradient_difference:.2%}"],
        ["cosine of the gradients", f"{certificate.gradient_cosine:.5f}"],
    ]
    versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    return Section(
        "Teacher in FP8",
        table=figures_of,
        note=f"Against the same teacher in full precision, before the first step, over "
        f"{certificate.tokens} tokens of {certificate.problems} {certificate.responses}. It drifts "
        "most where it is unsure, as on a student's mistakes. The gradient is "
        f"{certificate.divergence}'s with respect to the student's hidden states. Backend "
        f"{certificate.backend}, recipe {certificate.recipe}; {versions}.",
    )


def _timing_section(rows: Rows) -> Section:
    seconds: dict[str, dict[str, float]] = {}
    table = [["stage", "steps", "median s a step", "trained tokens a second"]]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        whole = sum(row.get("time/step_s") or 0.0 for row in own)
        parts = {
            part: sum(row.get(f"time/{part}_s") or 0.0 for row in own)
            for part in figures.TIMED_PARTS
        }
        seconds[stage] = parts | {"other": max(whole - sum(parts.values()), 0.0)}
        median = statistics.median(row.get("time/step_s") or 0.0 for row in own)
        tokens = sum(row.get("tokens") or 0 for row in own)
        rate = f"{tokens / whole:,.0f}" if whole else ""
        table.append([stage, str(len(own)), f"{median:.3g}", rate])
    return Section("Where the time went", svg=figures.timing(seconds), table=table)
