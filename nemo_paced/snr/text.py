"""A measurement of SNR in words: the table and the sentences that ``snr`` prints."""

from __future__ import annotations

import math
from pathlib import Path

from nemo_paced.config import Estimator
from nemo_paced.snr.estimates import SnrEstimate
from nemo_paced.snr.profile import End, EndVerdict
from nemo_paced.snr.record import SnrRecord
from nemo_paced.snr.summary import Summary

LARGER = 1.5  # ratio of an end's gradient norm to the middle's, above which it is called large
HEADINGS = ("pass rate", "mean p", "problems", "plain SNR", "SNR", "95 %", "mean ||g||")


def table_rows(summary: Summary) -> list[list[str]]:
    """The table of bins as strings: the headings, then a row for each bin.

    ``mean p`` is the posterior mean pass rate, ``problems`` the measured ones of all in the bin,
    ``SNR`` the unbiased one with its interval, ``mean ||g||`` the gradient norm with its standard
    error.
    """
    rows = [list(HEADINGS)]
    for row in summary.rows:
        place = f"{row.bin.low:.2f}-{row.bin.high:.2f}"
        found = row.found
        if found is None:
            measured = 0 if row.bin.sums is None else int(row.bin.sums.count_B.sum())
            rows.append([place, "-", f"{measured}/{row.bin.available}", "-", "-", "-", "-"])
            continue
        low, high = (max(x, 0) ** 0.5 for x in (found.snr_squared.low, found.snr_squared.high))
        rows.append(
            [
                place,
                f"{row.bin.expected_pass_rate:.3f}",
                f"{found.problems}/{row.bin.available}",
                f"{found.plain.value:.3f}",
                f"{found.snr:.3f}",
                f"{low:.3f}-{high:.3f}",
                f"{found.gradient_norm.value:.3g}±{found.gradient_norm.standard_error:.2g}",
            ]
        )
    return rows


def measured_weights(record: SnrRecord) -> str:
    """Name of the parameters whose gradient was measured."""
    layers = record.identity["last_layers"]
    if not layers:
        return "LM head"
    return "LM head and last layer" if layers == 1 else f"LM head and last {layers} layers"


def lead(record: SnrRecord) -> str:
    """One line that says what was measured.

    It names divergence, responses, parameters, model and pass rates, and any doubt about those.
    """
    text = f"{record.divergence} along {record.responses}, gradient of the "
    text += f"{measured_weights(record)}, {which_model(record)}, pass rates of "
    given = record.pass_rates_step is None
    text += "a table that was given" if given else f"step {record.pass_rates_step}"
    if reason := doubt(record):
        text += f" ({reason})"
    return text if record.complete else f"{text}; not complete yet"


def which_model(record: SnrRecord) -> str:
    """Name of the measured model: its step, or the folder's name where the step is not known."""
    return f"model {Path(record.model).name}" if record.step is None else f"step {record.step}"


def doubt(record: SnrRecord) -> str | None:
    """Reason why the pass rates may not be those of the measured model; ``None``: there is none."""
    if record.pass_rates_step is None:  # who gave the table by --pass-rates knows whose it is
        return None
    if record.step is None:
        return (
            f"{Path(record.model).name} does not say which step it is of, and the table is the "
            f"run's newest, of step {record.pass_rates_step}"
        )
    if record.pass_rates_step < record.step:
        return f"the student has moved since step {record.pass_rates_step}"
    return None


def sentences(record: SnrRecord, summary: Summary) -> list[str]:
    """The figures in sentences, one a line: exponents, variance ratio, delta, both ends."""
    lines = [*_law_lines(record, summary), *_deviation_lines(record, summary)]
    alike = [r.bin for r in summary.rows if r.bin.sums is not None and r.found is None]
    if alike:
        places = ", ".join(f"{b.low:.2f}-{b.high:.2f}" for b in alike)
        lines.append(f"no SNR in {places}: the gradients there do not differ (all 0, say)")
    for name, end in (("0", summary.low_end), ("1", summary.high_end)):
        if end is not None:
            lines += _end_lines(name, end)
    return lines


def _law_lines(record: SnrRecord, summary: Summary) -> list[str]:
    law, signal = summary.snr_law, summary.signal_law
    if law is None:
        return ["SNR^2 ~ p^a' (1-p)^b': too few bins with a SNR^2 above two standard errors to fit"]
    lines = [f"SNR^2 ~ p^a' (1-p)^b': a' = {_with_interval(law.a)}, b' = {_with_interval(law.b)}"]
    ratio = summary.variance_ratio
    if signal is not None and ratio is not None:
        lines.append(
            f"variance of the weighted over the unweighted gradient: R = {_with_interval(ratio)} "
            f"(uniform pass rates; alpha {record.alpha:g}, beta {record.beta:g}; measured a_s = "
            f"{signal.a.value / 2:.2f}, b_s = {signal.b.value / 2:.2f}, a' = {law.a.value:.2f}, "
            f"b' = {law.b.value:.2f})"
        )
    elif signal is not None:
        lines.append(
            "variance ratio R: none, these problems leave open whether the fitted noise has a mean "
            "over pass rates"
        )
    return lines


def _deviation_lines(record: SnrRecord, summary: Summary) -> list[str]:
    found = summary.deviation
    if found is None:
        return ["delta: no two bins have a SNR^2 above two standard errors; measure more problems"]
    kernel = f"p^{record.alpha:g} (1-p)^{record.beta:g}"
    high = f"{found.high:.2f}" if math.isfinite(found.high) else "unbounded"
    lines = [
        f"delta of {kernel} (half the range of log w*/kernel): {found.corrected:.2f}, 95 % "
        f"interval {found.low:.2f} to {high}; {found.delta:.2f} before the correction for noise, "
        f"which alone would show {found.noise:.2f}",
        f"efficiency sech^2(delta), for the best scale of the weights: {found.efficiency:.2f}; "
        "guaranteed with 95 % confidence, over the pass rates measured: "
        f"{found.guaranteed_efficiency:.2f}",
        *_plug_in_lines(record),
    ]
    measured = sum(row.found is not None for row in summary.rows)
    if found.bins < measured:
        lines.append(
            f"only {found.bins} of {measured} bins have a SNR^2 above two standard errors: the "
            "point estimate of delta is of those alone, its interval of all"
        )
    if not math.isfinite(found.high):
        lines.append("delta is unbounded: in some bin SNR may be 0; more problems would bound it")
    return lines


def _plug_in_lines(record: SnrRecord) -> list[str]:
    """Warning that delta does not cover ``weights.estimator=plug_in`` at pass rates 0 and 1.

    The kernel of ``delta`` is taken at posterior means, which are never 0 or 1.
    """
    none, every = record.alpha > 0, record.beta > 0
    if record.estimator != Estimator.plug_in.value or not (none or every):
        return []
    solved = " or ".join(["no rollout"] * none + ["every rollout"] * every)
    return [
        f"that is not for problems that {solved} solved: with weights.estimator=plug_in their "
        "weight, and so its efficiency, is exactly 0; posterior gives each a weight"
    ]


def _end_lines(name: str, end: End) -> list[str]:
    at = f"at pass rate {end.pass_rate:.3f}"
    measured = (
        f"{at} w* is {end.ratio:.2f} ± {end.standard_error:.2f} times the middle's, the kernel "
        f"{end.kernel:.2f} times"
    )
    if end.verdict is EndVerdict.falls:
        return [f"SNR falls towards pass rate {name}: {measured}"]
    if end.is_level:
        return [
            f"whether SNR falls towards pass rate {name} is not shown, since the kernel itself "
            f"hardly falls up to the outermost bin: {measured}"
        ]
    if end.verdict is EndVerdict.not_shown:
        return [
            f"whether SNR falls towards pass rate {name} cannot be told from so many problems "
            f"(snr.max_problems_per_bin): {measured}"
        ]
    lines = [f"SNR does NOT fall towards pass rate {name} as the kernel does: {measured}"]
    if end.norm_ratio > LARGER:
        hopeless = "hopeless" if name == "0" else "mastered"
        lines.append(
            f"what the kernel does there: it holds down the gradients of {hopeless} problems, "
            f"whose norm is {end.norm_ratio:.1f} times that of problems in the middle; its "
            "derivation from SNR does not cover that"
        )
    else:
        lines.append(
            f"what the kernel does there: it gives up gradients with a signal, whose norm is "
            f"{end.norm_ratio:.2f} times that of problems in the middle"
        )
    return lines


def _with_interval(estimate: SnrEstimate) -> str:
    if not math.isfinite(estimate.standard_error):
        return f"unbounded (the fit ends at {estimate.value:.0f})"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
