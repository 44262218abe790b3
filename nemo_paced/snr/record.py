"""The file of an ``snr`` measurement, ``snr/step_XXXXXXXX_DIVERGENCE.json`` of a run directory.

With ``snr.last_layers`` N its name ends in ``_last_layers_N``.

    {"complete": true,
     "identity": {...},              what decides the figures; with another they are measured anew
     "model": "...", "step": 40,     of the student; 0: as training began; null: an exported model
     "pass_rates_step": 20,          of the student that the pass rates are of; null: --pass-rates
     "divergence": "forward_kl", "responses": "references",
     "alpha": 1.0, "beta": 1.0,      of the run's kernel
     "estimator": "plug_in",         what the run takes the kernel of; null: it has another scheme
     "bins": [{"low": 0.0, "high": 0.1, "available": 80,
               "pass_rate": 0.0,     mean c / K of the measured problems
               "expected_pass_rate": 0.03,     posterior mean under the prior of the table
               "sums": {"count_B": [...], "norm_B": [...], "square_B": [...], "dot_B": [...],
                        "block_B": [...]} or null},    as ``BlockSums``
              ...],
     "estimates": {...}}             what ``summary.py`` makes of the rest; not read back

The file is written after every bin, so that a later start goes on with the bins that are missing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nemo_paced.errors import ConfigError
from nemo_paced.files import write_json
from nemo_paced.snr.estimates import BlockSums

FOLDER = "snr"  # of a run directory


@dataclass(frozen=True, slots=True)
class BinRecord:
    """One bin of a measurement; the fields are those of :class:`~nemo_paced.snr.plan.PlannedBin`.

    Attributes:
        sums: ``None`` where the bin has too few problems, or is not measured yet.
    """

    low: float
    high: float
    available: int
    pass_rate: float
    expected_pass_rate: float
    sums: BlockSums | None


@dataclass(slots=True)
class SnrRecord:
    """Measurement of SNR, complete or under way; the module says what its fields mean."""

    identity: dict[str, Any]
    model: str
    step: int | None
    pass_rates_step: int | None
    divergence: str
    responses: str
    alpha: float
    beta: float
    bins: list[BinRecord]
    complete: bool = False
    estimator: str | None = None

    def write(self, path: Path, estimates: dict[str, Any] | None = None) -> None:
        """Write the file, in place of an earlier one only when it is whole.

        Args:
            estimates: what ``summary.py`` makes of the record, as plain data.
        """
        names = (f.name for f in fields(self) if f.name != "bins")
        tree = {name: getattr(self, name) for name in names}
        tree["bins"] = [_bin_tree(one) for one in self.bins]
        tree["estimates"] = estimates
        write_json(path, tree)

    @staticmethod
    def read(path: Path) -> SnrRecord:
        """The record that :meth:`write` has written, without its estimates.

        Raises:
            ConfigError: the file is missing, damaged or no measurement.
        """
        try:
            tree = json.loads(path.read_text())
            del tree["estimates"]
            tree["bins"] = [_bin_of(one) for one in tree["bins"]]
            return SnrRecord(**tree)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is no measurement that can be read ({error!r}): remove it to measure again"
            ) from error


def _bin_tree(one: BinRecord) -> dict[str, Any]:
    tree = {f.name: getattr(one, f.name) for f in fields(one)}
    if one.sums is not None:
        tree["sums"] = {f.name: getattr(one.sums, f.name).tolist() for f in fields(one.sums)}
    return tree


def _bin_of(tree: dict[str, Any]) -> BinRecord:
    for name in ("pass_rate", "expected_pass_rate"):
        tree[name] = math.nan if tree[name] is None else tree[name]
    if tree["sums"] is not None:
        tree["sums"] = BlockSums(**{k: np.array(v, dtype=float) for k, v in tree["sums"].items()})
    return BinRecord(**tree)
