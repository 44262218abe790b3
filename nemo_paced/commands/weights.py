"""The commands ``weights`` and ``pass-rates --simulate``, which need no model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nemo_paced.compose import Parser, with_config
from nemo_paced.config import Estimator, WeightScheme, WeightsConfig
from nemo_paced.errors import ConfigError
from nemo_paced.grading.verdicts import Ground, Verdicts
from nemo_paced.records import Outcome
from nemo_paced.report import weight_errors
from nemo_paced.snr.power_law import PowerLaw, measured_ratio
from nemo_paced.snr.record import SnrRecord
from nemo_paced.snr.summary import summarise
from nemo_paced.weights.adaptive import prior_of
from nemo_paced.weights.pass_rates import PassRateTable
from nemo_paced.weights.prior import fit_prior
from nemo_paced.weights.simulation import DISTRIBUTIONS, from_counts, simulate
from nemo_paced.weights.summary import effective_sample_size, weight_shares
from nemo_paced.weights.theory import moment_matched_exponents, variance_ratio

ASSUMED_SIGNALS = (0.25, 0.34, 0.5)  # the paper's a_s = b_s


@dataclass(frozen=True, slots=True)
class MeasuredLaws:
    """SNR^2 and ||E g||^2 against pass rate, as ``nemo-paced snr`` has fitted them."""

    snr: PowerLaw
    signal: PowerLaw


def measured_laws(path: Path) -> MeasuredLaws:
    """The power laws of SNR^2 and ||E g||^2 in a file of ``nemo-paced snr``.

    Raises:
        ConfigError: no such file, or too few bins to fit or to bound the exponents.
    """
    summary = summarise(SnrRecord.read(path))
    snr, signal = summary.snr_law, summary.signal_law
    if snr is None or signal is None:
        raise ConfigError(
            f"{path} has too few bins with a signal to fit exponents to: measure more problems a "
            "bin (snr.max_problems_per_bin), or leave --snr out"
        )
    if not (snr.is_bounded and signal.is_bounded):
        raise ConfigError(
            f"{path} leaves an exponent unbounded: measure more problems a bin "
            "(snr.max_problems_per_bin), or leave --snr out"
        )
    return MeasuredLaws(snr, signal)


def weights(arguments: list[str]) -> None:
    """Print what a table of pass rates says of exponents, prior and weights."""
    parser = Parser("weights")
    parser.add_argument("--pass-rates", type=Path, required=True)
    parser.add_argument("--snr", type=Path)
    options, rest = parser.parse_known_args(arguments)
    table = PassRateTable.read(options.pass_rates)
    measured = None if options.snr is None else measured_laws(options.snr)
    _with_weights(rest, lambda config: show(config, table, options.pass_rates, Console(), measured))


def show(
    config: WeightsConfig,
    table: PassRateTable,
    path: Path,
    console: Console,
    measured: MeasuredLaws | None = None,
) -> None:
    """Print the weights of a pass-rate table under ``config``, and what follows from them.

    Args:
        measured: power laws of the run's gradients, for the variance ratio; ``None``: the paper's
            assumptions are taken.

    Raises:
        ConfigError: unequal numbers of rollouts under the plug-in estimate, or all weights 0.
    """
    table.check_estimator(config, path)
    weighted = table.reweighted(config)
    rates = weighted.pass_rates.tolist()
    values = list(weighted.weights().values())
    counts = _counts(table)
    known = counts[1] > 0
    lines = [
        f"{len(rates)} problems, {counts[1].mean():.3g} rollouts each (mean), student step "
        f"{table.student_step}; pass rate {np.mean(weighted.pass_rates[known]):.3f} (mean)",
        *_outcome_lines(table),
        _exponents_line(weighted.pass_rates[known].tolist(), counts[1][known].tolist()),
        "prior that fits the counts: weights.prior=[{:.3g},{:.3g}]".format(*fit_prior(*counts)),
        f"scheme {config.scheme.value}, estimator {config.estimator.value}, "
        f"alpha {config.alpha:g}, beta {config.beta:g}",
        f"effective sample size: {effective_sample_size(values):.1f} of {len(values)} problems "
        f"({100 * effective_sample_size(values) / len(values):.0f} %)",
    ]
    if config.scheme is WeightScheme.beta_kernel:
        lines += _variance_lines(config, measured)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_share_table(rates, values))


def simulate_pass_rates(arguments: list[str]) -> None:
    """Print RMS errors of weights against rollouts for each distribution of pass rates."""
    parser = Parser("pass-rates")
    parser.add_argument("--pass-rates", type=Path)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path)
    options, rest = parser.parse_known_args(arguments)
    _with_weights(rest, lambda config: _simulate(config, options, Console()))


def _simulate(config: WeightsConfig, options: argparse.Namespace, console: Console) -> None:
    config = replace(config, estimator=Estimator.posterior)
    draws = dict(DISTRIBUTIONS)
    if options.pass_rates is not None:
        counts = _counts(PassRateTable.read(options.pass_rates))
        prior = prior_of(config, *counts)
        draws = {str(options.pass_rates): from_counts(*counts, prior)}
    prior_name = "fitted to the counts" if config.fit_prior else f"Beta{tuple(config.prior)}"
    console.print(
        f"{options.problems} problems, {options.seeds} seeds from {options.seed}, alpha "
        f"{config.alpha:g}, beta {config.beta:g}, prior {prior_name}", highlight=False,
    )  # fmt: skip
    results = {}
    for name, draw in draws.items():
        results[name] = simulate(
            draw,
            config,
            num_problems=options.problems,
            num_seeds=options.seeds,
            seed=options.seed,
        )
        console.print(weight_errors.error_table(name, results[name]))
        for line in weight_errors.gain_lines(results[name]):
            console.print(line, highlight=False, soft_wrap=True)
    if options.csv is not None:
        weight_errors.write_csv(options.csv, results)
    if options.figure is not None:
        weight_errors.write_figures(options.figure, results)


def _with_weights(overrides: list[str], action: Callable[[WeightsConfig], None]) -> None:
    with_config(overrides, lambda config: action(config.weights))


def _counts(table: PassRateTable) -> tuple[np.ndarray, np.ndarray]:
    return (
        table.frame["effective_correct"].to_numpy(),
        table.frame["effective_rollouts"].to_numpy(),
    )


def _outcome_lines(table: PassRateTable) -> list[str]:
    """Shares of the outcomes of all rollouts; nothing where an earlier table does not tell them."""
    names = ("num_truncated", "num_unanswered", "num_timed_out")
    cut, silent, open_ones = (int(table.frame[name].sum()) for name in names)
    if not cut + silent + open_ones:
        return []
    right, count = int(table.frame["num_correct"].sum()), int(table.frame["num_rollouts"].sum())
    given = {
        Outcome.right: right,
        Outcome.wrong: count - right - cut - silent,
        Outcome.unanswered: silent,
        Outcome.truncated: cut,
        Outcome.timed_out: open_ones,
    }
    found = Verdicts((Ground(outcome, "", ""), number) for outcome, number in given.items())
    return [f"of {len(found)} responses: {found.outcomes_line()}"]


def _exponents_line(rates: list[float], num_rollouts: list[float]) -> str:
    try:
        found = moment_matched_exponents(rates, num_rollouts)
    except ConfigError as error:
        return f"no exponents by moment matching: {error}"
    clipped = " (clipped at 0: the pass rates are spread too widely)" if found.clipped else ""
    return (
        f"exponents by moment matching: weights.alpha={found.alpha:.3g} "
        f"weights.beta={found.beta:.3g}{clipped}, from {found.num_problems} problems between "
        f"1/K and 1-1/K of mean {found.mean:.3f} and variance {found.variance:.4f}"
    )


def _variance_lines(config: WeightsConfig, measured: MeasuredLaws | None) -> list[str]:
    """The ratio R under the measured exponents, else under the paper's three assumptions."""
    head = (
        f"variance of the weighted over the unweighted gradient, R (uniform pass rates, alpha "
        f"{config.alpha:g}, beta {config.beta:g}):"
    )
    if measured is not None:
        return [head, _measured_line(config, measured)]
    return [head, *(_assumed_line(config, half) for half in ASSUMED_SIGNALS)]


def _measured_line(config: WeightsConfig, of: MeasuredLaws) -> str:
    exponents = of.signal.a.value / 2, of.signal.b.value / 2, of.snr.a.value, of.snr.b.value
    given = _exponents("measured", *exponents)
    ratio = measured_ratio(config.alpha, config.beta, of.snr, of.signal)
    if ratio is None:
        return (
            f"  none with {given}: the problems measured leave open whether the unweighted "
            "gradient has a finite variance (2 a_s - a' and 2 b_s - b' must be above -1)"
        )
    return f"  R = {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] with {given}"


def _assumed_line(config: WeightsConfig, half: float) -> str:
    given = _exponents("assumed", half, half, config.alpha, config.beta)
    try:
        ratio = variance_ratio(config.alpha, config.beta, half, half, config.alpha, config.beta)
    except ConfigError as error:
        return f"  none with {given}: {error}"
    return f"  R = {ratio:.3f} with {given}"


def _exponents(how: str, a_s: float, b_s: float, a_prime: float, b_prime: float) -> str:
    """The exponents of ||E g|| ~ p^a_s (1-p)^b_s and SNR^2 ~ p^a' (1-p)^b', in words."""
    return (
        f"{how} a_s = {a_s:.3g}, b_s = {b_s:.3g} (signal), a' = {a_prime:.3g}, "
        f"b' = {b_prime:.3g} (SNR^2)"
    )


def _share_table(rates: list[float], values: list[float]) -> Table:
    problems, shares = weight_shares(rates, values)
    table = Table()
    for title in ("pass rate", "problems", "share of all weight", "weight of one, mean"):
        table.add_column(title, justify="right")
    for index, (count, share) in enumerate(zip(problems, shares, strict=True)):
        each = f"{share * len(values) / count:.3f}" if count else "-"
        table.add_row(
            f"{index / 10:.1f} to {(index + 1) / 10:.1f}", str(count), f"{100 * share:.1f} %", each
        )
    return table
