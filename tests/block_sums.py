"""Block sums by their definition, from gradients that are all at hand; a measurement of them."""

import numpy as np

from nemo_paced.snr.estimates import BlockSums
from nemo_paced.snr.record import BinRecord, SnrRecord


def block_sums(gradients_ND, block_N):
    """float64 [N, D]; block_N counts from 0."""
    blocks = range(int(block_N.max()) + 1)
    sums_BD = np.stack([gradients_ND[block_N == b].sum(0) for b in blocks])
    square_N = (gradients_ND**2).sum(1)
    return BlockSums(
        count_B=np.bincount(block_N).astype(np.float64),
        norm_B=np.bincount(block_N, weights=np.sqrt(square_N)),
        square_B=np.bincount(block_N, weights=square_N),
        dot_B=sums_BD @ sums_BD.sum(0),
        block_B=(sums_BD**2).sum(1),
    )


def snr_record(snr_of, norm_of, problems=400):
    """Gradients with the given SNR and noise by pass rate."""
    rng = np.random.default_rng(0)
    bins = []
    for index in range(10):
        rate = (index + 0.5) / 10
        gradients = rng.normal(0, 200**-0.5, size=(problems, 200))
        gradients[:, 0] += snr_of(rate)
        sums = block_sums(gradients * norm_of(rate), np.arange(problems) % 20)
        bins.append(BinRecord(index / 10, (index + 1) / 10, problems, rate, rate, sums))
    return SnrRecord(
        {"last_layers": 0}, "m", 3, 3, "forward_kl", "references", 1.0, 1.0, bins, complete=True
    )
