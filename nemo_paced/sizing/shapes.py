"""Inputs of a plan beside two architectures: layouts and the work of a step, as numbers only.

This folder does without torch: a plan takes two ``config.json`` files and no GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from nemo_paced.config import (
    ModelConfig,
    PacedConfig,
    Recompute,
    ResponseSource,
    TeacherPlacement,
)
from nemo_paced.hf.architectures import Architecture
from nemo_paced.parallel.row_length import round_up, row_multiple


class Accelerator(Enum):
    """Kind of device that layers run on, which decides what they keep (``activations.py``)."""

    gpu = "gpu"
    cpu = "cpu"


@dataclass(frozen=True, slots=True)
class Layout:
    """How one model is cut over ``world_size`` ranks.

    Attributes:
        tensor, pipeline, context, expert: parallel sizes.
        data: data-parallel replicas.
        virtual: interleaved chunks of layers a stage.
        distributed_optimizer: master weights and moments are divided over data x context ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    virtual: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = Recompute.none
    distributed_optimizer: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def layers(self, of: int, stage: int) -> list[int]:
        """Numbers, from 0, of the layers on pipeline stage ``stage``, of ``of`` layers in all."""
        a_chunk = of // (self.pipeline * self.virtual)
        firsts = ((self.pipeline * k + stage) * a_chunk for k in range(self.virtual))
        return [first + layer for first in firsts for layer in range(a_chunk)]

    @property
    def expert_data(self) -> int:
        """Number of ranks that hold the same experts, which tensor parallelism does not cut."""
        return self.world_size // (self.expert * self.pipeline)


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """The teacher's layout, placement and precision.

    Attributes:
        fp8: whether the linear layers' weights are held in 8 bits.
    """

    layout: Layout
    placement: TeacherPlacement = TeacherPlacement.colocated
    fp8: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a step; longest lengths decide memory, mean ones decide time.

    Attributes:
        micro_batch_size, teacher_micro_batch_size: sequences.
        global_batch_size: problems, each with one response.
        response, prompt, teacher_prompt: longest, tokens.
        mean_response, mean_prompt: mean tokens of a problem, as assumed or measured.
        precision_bytes: of weights and activations: 2 for bf16, 4 for fp32.
        top_k: tokens in the teacher's signal; 0: hidden states.
        vocab_multiple: ``model.make_vocab_size_divisible_by``.
        packed: ``model.packed_sequence_size``: tokens of a row; 0: sequences are padded.
        chunk_size: ``loss.chunk_size``; ``None``: the loss's own choice.
        on_policy: share of the steps that train on fresh rollouts.
        num_rollouts: K, rollouts of a problem for its pass rate.
        max_steps: optimizer steps of the run.
    """

    micro_batch_size: int
    global_batch_size: int
    teacher_micro_batch_size: int
    prompt: int
    teacher_prompt: int
    response: int
    mean_prompt: float
    mean_response: float
    precision_bytes: int = 2
    top_k: int = 0
    vocab_multiple: int = 128
    packed: int = 0
    chunk_size: int | None = None
    on_policy: float = 0.0
    num_rollouts: int = 8
    max_steps: int = 1
    accelerator: Accelerator = Accelerator.gpu

    def sequence(self, layout: Layout, *, teacher: bool = False) -> int:
        """Tokens of a row, over all context-parallel ranks, as ``data/packing.py`` cuts it."""
        multiple = row_multiple(
            tp_size=layout.tensor,
            cp_size=layout.context,
            on_gpu=self.accelerator is Accelerator.gpu,
        )
        longest = (self.teacher_prompt if teacher else self.prompt) + self.response
        row = max(self.packed, longest) if self.packed else longest
        return round_up(row, multiple)

    def attended(self, layout: Layout, *, teacher: bool = False) -> float:
        """Tokens of a row that see each other; packed sequences see nothing of each other."""
        if self.packed:
            return self._mean_tokens(teacher=teacher)
        return self.sequence(layout, teacher=teacher)

    def responses_of_a_row(self, layout: Layout) -> int:
        """Most response tokens that a row may hold."""
        return self.sequence(layout) if self.packed else self.response

    def micro_batches(self, layout: Layout, *, teacher: bool = False) -> int:
        """Number of micro-batches of each data-parallel rank in a step."""
        if self.packed:
            tokens = self.share(layout) * self._mean_tokens(teacher=teacher)
            return max(1, math.ceil(tokens / self.sequence(layout, teacher=teacher)))
        size = self.teacher_micro_batch_size if teacher else self.micro_batch_size
        return max(1, -(-self.share(layout) // size))

    def _mean_tokens(self, *, teacher: bool) -> float:
        """Mean tokens of a sequence; the teacher's prompt fills its limit as the student's does."""
        longer = self.teacher_prompt / self.prompt if teacher else 1.0
        return self.mean_prompt * longer + self.mean_response

    def share(self, layout: Layout) -> int:
        """Problems of a data-parallel rank in a step, at most."""
        return -(-self.global_batch_size // layout.data)


def padded_vocab(student: Architecture, teacher: Architecture, work: Work, tensor: int) -> int:
    """Rows of both LM heads over all ranks of the student's layout."""
    multiple = work.vocab_multiple * tensor
    return -(-max(student.vocab_size, teacher.vocab_size) // multiple) * multiple


def student_layout(config: PacedConfig) -> Layout:
    """The student's layout as the configuration asks for it."""
    return _layout(config.model, config.student_ranks)


def teacher_plan(config: PacedConfig) -> TeacherPlan:
    """The teacher's layout, placement and precision as the configuration asks for them."""
    layout = _layout(config.teacher_model, config.teacher_ranks)
    return TeacherPlan(layout, config.teacher.placement, config.teacher.fp8.enabled)


def _layout(model: ModelConfig, world_size: int) -> Layout:
    return Layout(
        tensor=model.tensor_model_parallel_size,
        pipeline=model.pipeline_model_parallel_size,
        context=model.context_parallel_size,
        expert=model.expert_model_parallel_size,
        data=world_size // model.model_parallel_size,
        virtual=model.virtual_pipeline_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
        recompute=model.recompute_granularity,
        distributed_optimizer=model.optim.use_distributed_optimizer,
    )


def work_of(
    config: PacedConfig, *, mean_prompt: float, mean_response: float, accelerator: Accelerator
) -> Work:
    """Work of a configuration's step, with an assumed mean number of tokens of a problem."""
    data, model = config.data, config.model
    on_policy = sum(s.fraction for s in config.stages if s.responses is ResponseSource.rollouts)
    return Work(
        micro_batch_size=model.micro_batch_size,
        global_batch_size=model.global_batch_size,
        teacher_micro_batch_size=config.teacher.micro_batch_size or model.micro_batch_size,
        prompt=data.max_prompt_length,
        teacher_prompt=data.max_teacher_prompt_length,
        response=data.max_response_length,
        mean_prompt=mean_prompt,
        mean_response=mean_response,
        precision_bytes=config.trainer.compute_precision.itemsize,
        top_k=config.teacher.top_k,
        vocab_multiple=model.make_vocab_size_divisible_by,
        packed=model.packed_sequence_size,
        chunk_size=config.loss.chunk_size,
        on_policy=on_policy,
        num_rollouts=config.weights.num_rollouts,
        max_steps=config.trainer.max_steps,
        accelerator=accelerator,
    )
