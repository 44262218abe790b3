"""Gradients of single problems: their norms, and their sums by block, never kept one by one.

What is differentiated is the LM head's use of its weight (and, by ``snr.last_layers``, the last
layers with the final norm). All of it lies on the last pipeline stage, so nothing is ever sent
backward: earlier layers run without a graph, and a problem's gradient is taken in the forward step
of its micro-batch. With tied embeddings it is the head's part alone, not that of the embedding: the
same figure for tied and untied models, and at every pipeline layout.

Memory. Jackknife intervals need the product of each block's sum with the bin's, which is known only
when the bin is done. So one bin is worked at a time and its block sums wait in host memory, in
float32, spread over the data-parallel ranks: blocks x |parameters| x 4 bytes a tensor-parallel
group in all, whatever the number of replicas. On the device are one gradient and two sums. (Running
sums alone would need a second pass over all problems; keeping every bin's blocks ten times the
memory.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.distributed import ProcessGroup

from nemo_paced.data.packing import Cut, MicroBatch, TrainItem, cut_batch
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.losses.kinds import Divergence
from nemo_paced.parallel.groups import Parallel
from nemo_paced.parallel.pipeline import call_model, run_schedule
from nemo_paced.snr.estimates import BlockSums
from nemo_paced.snr.parameters import HeadGradientLayer, Measured, measure_layers
from nemo_paced.student.output_layer import MicroBatchLoss
from nemo_paced.teacher.signal import TeacherSignal
from nemo_paced.teacher.source import TeacherSource

ONE_PROBLEM = Cut(micro_batch_size=1)
DOT_ELEMENTS = 2**24  # elements that are widened to float64 at a time


class GradientMeter:
    """Collector of one bin's gradients, block after block; every call is collective.

    Args:
        gpt: this rank's stage of the student, weights loaded; it is frozen here.
        teacher: source of the teacher's signals.
        parallel: the student's layout.
        divergence: the one whose gradients are measured.
        chunk_size, vocab_size: as for :class:`~nemo_paced.student.step.Step`'s loss.
        last_layers: number of the model's last layers measured beside the LM head; as
            :func:`~nemo_paced.snr.plan.check_settings` allows.
    """

    def __init__(
        self,
        gpt: PacedGPTModel,
        teacher: TeacherSource,
        parallel: Parallel,
        *,
        divergence: Divergence,
        chunk_size: int | None,
        vocab_size: int,
        last_layers: int = 0,
    ) -> None:
        self.gpt = gpt.requires_grad_(False).eval()
        self.teacher = teacher
        self.parallel = parallel
        self.divergence = divergence
        self.chunk_size = chunk_size
        self.vocab_size = vocab_size
        self.measured: list[Measured] = []
        if parallel.is_last_stage:
            HeadGradientLayer.install(gpt)
            if last_layers:
                self.measured = measure_layers(gpt, last_layers)

    def begin_bin(self, num_blocks: int) -> None:
        """Start a bin of this many blocks with empty sums."""
        self._blocks: list[list[torch.Tensor] | None] = []
        self._total: list[torch.Tensor] | None = None
        self._scalars_KB = torch.zeros(5, num_blocks, dtype=torch.float64)

    def add_block(self, items: Sequence[TrainItem], *, stored: bool) -> None:
        """Add the gradients of a block's problems, each of its own loss with its token weight.

        Args:
            items: one for each problem; the same list on every rank.
            stored: whether their teacher signals may come from the cache, and go into it.
        """
        signal, _ = self.teacher.signal(items, stored=stored)
        batches = cut_batch(items, ONE_PROBLEM, self.parallel, teacher=False)
        sums = _BlockSum()
        squares: list[torch.Tensor] = []
        run_schedule(
            partial(self._forward_step, signal, sums, squares),
            batches,
            [self.gpt],
            self.parallel,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if self.parallel.is_last_stage:
            self._keep(sums, torch.stack(squares) if squares else None)

    def end_bin(self) -> BlockSums:
        """Scalars of the bin's blocks, the same on every rank; the block sums are freed."""
        scalars = self._scalars_KB
        if self.parallel.is_last_stage:
            assert self._total is not None, "a bin has a block"
            for number, block in enumerate(self._blocks):
                if block is not None and self.parallel.cp_rank == 0:
                    on_device = [part.to(self.parallel.device) for part in block]
                    scalars[3, number] = self._dot(on_device, self._total)
                    scalars[4, number] = self._dot(on_device, on_device)
        summed = scalars.to(self.parallel.device)
        torch.distributed.all_reduce(summed)
        self._blocks, self._total = [], None
        return BlockSums(*np.asarray(summed.cpu()))

    def _forward_step(
        self,
        signal: TeacherSignal,
        sums: _BlockSum,
        squares: list[torch.Tensor],
        data_iterator: Any,
        model: PacedGPTModel,
    ) -> tuple[torch.Tensor, Any]:
        batch: MicroBatch = next(data_iterator)
        loss = None
        if model.post_process:
            loss = self._loss_of(batch, signal)
            model.output_layer.loss = loss
        with torch.no_grad():
            output = call_model(model, batch)
        if loss is not None and batch.spans:
            gradient = self._gradient(loss)
            squares.append(self._dot(gradient, gradient))
            sums.add(gradient)
        return output, lambda output, non_loss_data: None

    def _loss_of(self, batch: MicroBatch, signal: TeacherSignal) -> MicroBatchLoss:
        options = self.gpt.output_layer.options(
            self.divergence, signal.head_weight, self.vocab_size
        )
        return MicroBatchLoss(
            batch=batch,
            teacher=signal.of(batch, self.teacher.kind.top_k),
            options=options,
            chunk_size=self.chunk_size,
            targets_N=None,
        )

    def _gradient(self, loss: MicroBatchLoss) -> list[torch.Tensor]:
        """Gradient of one problem: the head's, then those of the other measured parameters.

        Of each it has this rank's part (or copy), summed over all ranks that share the part.
        """
        assert loss.result is not None, "the output layer has computed it"
        layer = self.gpt.output_layer
        wanted = [layer.head, *(one.parameter for one in self.measured)]
        gradient = list(torch.autograd.grad(loss.result.loss, wanted))
        layer.head = None
        for part, one in zip(gradient[1:], self.measured, strict=True):
            if one.partial:
                _sum_over(part, self.parallel.tp_group)
        for part in gradient:  # a context-parallel rank has seen its slice of the response alone
            _sum_over(part, self.parallel.cp_group)
        return gradient

    def _dot(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
        """This rank's part of an inner product, float64: copied parameters count on one rank."""
        counted = [True, *(one.parts or self.parallel.tp_rank == 0 for one in self.measured)]
        parts = [_dot(x, y) for x, y, own in zip(a, b, counted, strict=True) if own]
        return torch.stack(parts).sum()

    def _keep(self, sums: _BlockSum, square_N: torch.Tensor | None) -> None:
        """Add a finished block to the bin's sum, and keep its own on the host of one replica."""
        number, parallel = len(self._blocks), self.parallel
        parts = sums.parts or self._zeros()  # a replica may have had none of the block's problems
        for part in parts:
            _sum_over(part, parallel.groups.dp)
        if self._total is None:
            self._total = [torch.zeros_like(part) for part in parts]
        torch._foreach_add_(self._total, parts)
        own = number % parallel.dp_size == parallel.dp_rank and parallel.cp_rank == 0
        self._blocks.append([part.cpu() for part in parts] if own else None)
        if square_N is not None:
            _sum_over(square_N, parallel.tp_group)
            if parallel.tp_rank == parallel.cp_rank == 0:
                self._scalars_KB[0, number] = len(square_N)
                self._scalars_KB[1, number] = square_N.sqrt().sum()
                self._scalars_KB[2, number] = square_N.sum()

    def _zeros(self) -> list[torch.Tensor]:
        gpt = self.gpt
        head = gpt.output_layer.weight
        if head is None:
            head = gpt.shared_embedding_or_output_weight()
        tensors = [head, *(one.parameter for one in self.measured)]
        return [torch.zeros_like(one, dtype=torch.float32) for one in tensors]


class _BlockSum:
    """Running float32 sum of a block's gradients, a tensor for each measured parameter."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def add(self, gradient: list[torch.Tensor]) -> None:
        if not self.parts:
            self.parts = [part.float() for part in gradient]
            return
        for own, part in zip(self.parts, gradient, strict=True):
            own.add_(part)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    pieces = zip(a.reshape(-1).split(DOT_ELEMENTS), b.reshape(-1).split(DOT_ELEMENTS), strict=True)
    return torch.stack([x.double() @ y.double() for x, y in pieces]).sum()


def _sum_over(tensor: torch.Tensor, group: ProcessGroup) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
