"""Report sections on the training itself: losses, gradients, validation, rollouts."""

from __future__ import annotations

import statistics

from nemo_paced.report.run_files import Rows
from nemo_paced.report.sections.section import Section, curve_section, metric_line, stage_lines

LOSS_NOTE = "Token sums weighted by problem, over the problems of a batch."


def training_sections(rows: Rows) -> list[Section]:
    """Sections that every run has: losses, gradient norm, learning rate, validation."""
    if not rows:
        return [Section("Training", missing="No optimizer step was taken yet.")]
    losses = stage_lines(rows, "loss")
    note = LOSS_NOTE
    if len(losses) > 1:
        note += " Each stage minimises its own divergence: their levels cannot be compared."
    skipped = sum(bool(row.get("skipped")) for row in rows)
    sections = [
        curve_section("Loss", losses, "loss as minimised (nats)", note=note),
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
        sections.append(curve_section("Learning rate", rates, "learning rate", noisy=False))
    return [*sections, _validation_section(rows)]


def rollout_sections(rows: Rows) -> list[Section]:
    """Sections on the rollouts of an on-policy stage; none for a run without one."""
    gap = stage_lines(rows, "rollout/logprob_gap")
    shares = [
        metric_line("right", rows, "rollout/accuracy"),
        metric_line("cut at the token limit", rows, "rollout/truncated", colour=1),
        metric_line("without an answer", rows, "rollout/no_answer", colour=2),
    ]
    if not gap and not any(shares):
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


def share_clipped(rows: Rows) -> float:
    """Share of the steps that were clipped, of those whose gradient was not zero."""
    clipped = [bool(row.get("clipped")) for row in rows if row.get("grad_norm")]
    return statistics.fmean(clipped) if clipped else 0.0


def _validation_section(rows: Rows) -> Section:
    line = metric_line(
        "held-out problems", rows, "validation/accuracy", "validation/standard_error"
    )
    if line is None:
        missing = "No validation in this run: set trainer.val_check_interval and "
        return Section("Validation", missing=missing + "data.validation_problems to have it.")
    best = max(line.values)
    at = line.steps[list(line.values).index(best)]
    note = f"± standard error over the problems; highest {best:.3f} at step {at}."
    return curve_section("Validation", [line], "mean@k", note=note)
