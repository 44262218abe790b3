"""Options of the divergence kernels: a divergence, and a rank's part of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup

from nemo_paced.losses.kinds import Divergence, DivergenceKind
from nemo_paced.losses.vocab_parallel import valid_columns


@dataclass(frozen=True, slots=True)
class Options:
    """A divergence and this rank's part of the vocabulary, as every kernel takes them.

    Attributes:
        tp_group: the group over which the vocabulary is split; ``None``: not split.
        valid: columns of this rank that belong to the true vocabulary.
        block_rows: rows of a block that stays in cache; ``None``: chosen by width and device.
    """

    divergence: Divergence
    tp_group: ProcessGroup | None
    valid: int
    block_rows: int | None = None

    @classmethod
    def of(
        cls,
        divergence: Divergence | DivergenceKind | str,
        widths: tuple[int, int],
        *,
        tp_group: ProcessGroup | None,
        vocab_size: int | None,
        block_rows: int | None = None,
    ) -> Options:
        """Options for a student's and a teacher's logits of these local vocabulary widths.

        Args:
            divergence: as for :meth:`Divergence.of`.
            widths: columns v/tp of the student's and of the teacher's logits on this rank.
            vocab_size: the true vocabulary over all ranks; ``None``: all columns belong to it.

        Raises:
            ValueError: widths that do not fit each other or ``vocab_size``, ``block_rows`` below 1,
                or an unknown kind.
        """
        if block_rows is not None and block_rows < 1:
            raise ValueError(f"chunk_size is {block_rows}: it must be at least 1 row")
        if tp_group is not None and widths[0] != widths[1]:
            raise ValueError(
                f"local vocabulary widths differ, {widths[0]} and {widths[1]}: under a "
                "tensor-parallel group both models' shards must hold the same columns"
            )
        if vocab_size is None and widths[0] != widths[1]:
            raise ValueError(
                f"padded vocabularies differ, {widths[0]} and {widths[1]}: give vocab_size"
            )
        ranks = 1 if tp_group is None else tp_group.size()
        if vocab_size is not None and not 0 < vocab_size <= min(widths) * ranks:
            raise ValueError(
                f"vocab_size {vocab_size} does not lie within the {min(widths) * ranks} columns "
                "given"
            )
        valid = valid_columns(widths[0], vocab_size, tp_group)
        return cls(Divergence.of(divergence), tp_group, valid, block_rows)
