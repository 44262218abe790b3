"""Choice of the problems of a global batch, a pure function of how many were consumed before.

Nothing is iterated and nothing is stored but one integer, so a resumed run draws exactly the
batches that an uninterrupted one would, also at another layout or global batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ProblemOrder:
    """Epochs of a training set, each in its own shuffled order.

    Attributes:
        num_problems: size N of the training set.
        seed: of the shuffles.
        shuffle: ``False`` walks the file in order, epoch after epoch.
    """

    num_problems: int
    seed: int
    shuffle: bool = True

    def take(self, consumed: int, count: int) -> list[int]:
        """Positions of the ``count`` problems that follow the first ``consumed`` ones.

        A batch that crosses the end of an epoch may hold a problem twice.
        """
        return [self._at(index) for index in range(consumed, consumed + count)]

    def _at(self, index: int) -> int:
        epoch, position = divmod(index, self.num_problems)
        if not self.shuffle:
            return position
        return int(_permutation(self.num_problems, self.seed, epoch)[position])


@functools.lru_cache(maxsize=4)
def _permutation(num_problems: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_problems)


def occurrences(ids: Sequence[str]) -> list[int]:
    """How often each id stood earlier in ``ids``, which tells repetitions in a batch apart."""
    seen: dict[str, int] = {}
    counts = []
    for problem_id in ids:
        counts.append(seen.get(problem_id, 0))
        seen[problem_id] = counts[-1] + 1
    return counts
