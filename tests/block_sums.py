"""Block sums by their definition, from gradients that are all at hand."""

import numpy as np

from nemo_paced.analysis.snr import BlockSums


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
