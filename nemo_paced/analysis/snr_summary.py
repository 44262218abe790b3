"""What a measurement of SNR says: figures by bin, exponents, delta and sentences about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_paced.analysis.snr import BinEstimate, estimate_bin
from nemo_paced.analysis.snr_ends import End, compare_end
from nemo_paced.analysis.snr_profile import (
    Deviation,
    PowerLaw,
    Profile,
    deviation,
    fit_power_law,
)
from nemo_paced.analysis.snr_record import BinRecord, SnrRecord
from nemo_paced.config import to_dict
from nemo_paced.errors import ConfigError
from nemo_paced.weights.theory import variance_ratio


@dataclass(frozen=True, slots=True)
class Row:
    """A bin; ``found`` is ``None`` where it has no estimate."""

    bin: BinRecord
    found: BinEstimate | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Attributes:
    rows: every bin.
    snr_law: SNR^2 = c p^a' (1-p)^b'.
    signal_law: ||E g||^2 likewise, with exponents 2 a_s and 2 b_s.
    deviation: from the run's kernel.
    variance_ratio: R of the run's kernel with the measured a_s, b_s, a', b'.
    low_end, high_end: of the profile.
    """

    rows: list[Row]
    snr_law: PowerLaw | None
    signal_law: PowerLaw | None
    deviation: Deviation | None
    variance_ratio: float | None
    low_end: End | None
    high_end: End | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the JSON file."""
        return {
            "bins": [None if row.found is None else _figures(row.found) for row in self.rows],
            **{
                name: to_dict(getattr(self, name))
                for name in ("snr_law", "signal_law", "deviation", "low_end", "high_end")
            },
            "efficiency": self.deviation and self.deviation.efficiency,
            "guaranteed_efficiency": self.deviation and self.deviation.guaranteed_efficiency,
            "variance_ratio": self.variance_ratio,
        }


def summarise(record: SnrRecord) -> Summary:
    """All figures that the record's scalars give."""
    rows = [Row(b, None if b.sums is None else estimate_bin(b.sums)) for b in record.bins]
    measured = [row for row in rows if row.found is not None]
    profile = Profile(
        np.array([row.bin.expected_pass_rate for row in measured]),
        [row.found for row in measured if row.found is not None],
    )
    snr_law = fit_power_law(profile, lambda b: (b.snr_squared, b.without_B))
    signal_law = fit_power_law(profile, lambda b: (b.signal, b.signal_without_B))
    found = deviation(profile, record.alpha, record.beta) if measured else None
    ends = [compare_end(profile, at, record.alpha, record.beta) for at in (0, -1)]
    return Summary(
        rows=rows,
        snr_law=snr_law,
        signal_law=signal_law,
        deviation=found,
        variance_ratio=_variance_ratio(record, snr_law, signal_law),
        low_end=ends[0],
        high_end=ends[1],
    )


def _figures(found: BinEstimate) -> dict[str, Any]:
    names = ("plain", "snr_squared", "signal", "gradient_norm")
    figures = {name: asdict(getattr(found, name)) for name in names}
    return {"problems": found.problems, "snr": found.snr, **figures}


def _variance_ratio(
    record: SnrRecord, snr_law: PowerLaw | None, signal_law: PowerLaw | None
) -> float | None:
    if snr_law is None or signal_law is None:
        return None
    a_s, b_s = signal_law.a.value / 2, signal_law.b.value / 2
    try:
        return variance_ratio(record.alpha, record.beta, a_s, b_s, snr_law.a.value, snr_law.b.value)
    except ConfigError:  # the fitted noise has no mean over uniform pass rates
        return None
