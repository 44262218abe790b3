"""All figures of an SNR measurement: estimates by bin, exponents, delta, and both ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_paced.config import to_dict
from nemo_paced.snr.estimates import BinEstimate, SnrEstimate, estimate_bin
from nemo_paced.snr.power_law import PowerLaw, fit_power_law, measured_ratio
from nemo_paced.snr.profile import Deviation, End, Profile, compare_end, deviation
from nemo_paced.snr.record import BinRecord, SnrRecord


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """A bin's record beside its estimates.

    Attributes:
        found: ``None`` where the bin has no estimates.
    """

    bin: BinRecord
    found: BinEstimate | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures that follow from a measurement's sums; ``None`` where the data do not give one.

    Attributes:
        rows: every bin, in ascending order.
        snr_law: SNR^2 = c p^a' (1-p)^b'.
        signal_law: ||E g||^2 likewise, with exponents 2 a_s and 2 b_s.
        deviation: of the measured w* from the run's kernel.
        variance_ratio: R of the run's kernel with the measured a_s, b_s, a', b'; ``None`` where it
            has no interval.
        low_end, high_end: of the profile, compared with its middle.
    """

    rows: list[SummaryRow]
    snr_law: PowerLaw | None
    signal_law: PowerLaw | None
    deviation: Deviation | None
    variance_ratio: SnrEstimate | None
    low_end: End | None
    high_end: End | None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, for the JSON file."""
        return {
            "bins": [None if row.found is None else _figures(row.found) for row in self.rows],
            **{
                name: to_dict(getattr(self, name))
                for name in ("deviation", "variance_ratio", "low_end", "high_end")
            },
            "snr_law": _law(self.snr_law),
            "signal_law": _law(self.signal_law),
            "efficiency": self.deviation and self.deviation.efficiency,
            "guaranteed_efficiency": self.deviation and self.deviation.guaranteed_efficiency,
        }


def summarise(record: SnrRecord) -> Summary:
    """Compute all figures from the sums that a record keeps of its bins."""
    rows = [SummaryRow(b, None if b.sums is None else estimate_bin(b.sums)) for b in record.bins]
    measured = [row for row in rows if row.found is not None]
    profile = Profile(
        np.array([row.bin.expected_pass_rate for row in measured]),
        [row.found for row in measured if row.found is not None],
    )
    snr_law = fit_power_law(profile, lambda b: (b.snr_squared, b.without_B))
    signal_law = fit_power_law(profile, lambda b: (b.signal, b.signal_without_B))
    ratio = None
    if snr_law is not None and signal_law is not None:
        ratio = measured_ratio(record.alpha, record.beta, snr_law, signal_law)
    found = deviation(profile, record.alpha, record.beta) if measured else None
    ends = [compare_end(profile, at, record.alpha, record.beta) for at in (0, -1)]
    return Summary(
        rows=rows,
        snr_law=snr_law,
        signal_law=signal_law,
        deviation=found,
        variance_ratio=ratio,
        low_end=ends[0],
        high_end=ends[1],
    )


def _figures(found: BinEstimate) -> dict[str, Any]:
    names = ("plain", "snr_squared", "signal", "gradient_norm")
    figures = {name: asdict(getattr(found, name)) for name in names}
    return {"problems": found.problems, "snr": found.snr, **figures}


def _law(law: PowerLaw | None) -> dict[str, Any] | None:
    return None if law is None else {"a": asdict(law.a), "b": asdict(law.b), "scale": law.scale}
