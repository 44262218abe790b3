"""Settings ``student`` and ``teacher``: the two models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from nemo_paced.settings.checks import positive, refuse_ignored, require
from nemo_paced.settings.choices import Fp8Backend, Fp8Recipe, PrivilegedContext, TeacherPlacement


@dataclass
class StudentConfig:
    """The model that is trained."""

    hf_path: str = ""  # Hugging Face directory: config, weights, tokenizer


@dataclass
class Fp8Config:
    """The frozen teacher's linear layers in FP8 (E4M3), weights and activations.

    Embedding, LM head, norms and attention itself stay as they are.
    """

    enabled: bool = False  # the other keys of this block need it
    backend: Fp8Backend = Fp8Backend.auto
    recipe: Fp8Recipe = Fp8Recipe.auto
    num_layers_at_start_in_bf16: int = 0  # first layers that stay in BF16, of all stages together
    num_layers_at_end_in_bf16: int = 0  # last layers that stay in BF16, of all stages together
    # Before the first step, measure how far FP8 moves the teacher; see fp8_certificate.json.
    certificate: bool = True
    certificate_problems: int = 16  # problems that the certificate is measured on
    # Largest mean KL(BF16 || FP8) that is let pass, nats a token. By Pinsker's inequality a token
    # with this KL has at most 10 % of its probability mass moved (sqrt(max_kl / 2)); a student that
    # starts 0.2 nats from its teacher is asked to move ten times as far.
    max_kl: float = 0.02

    def __post_init__(self) -> None:
        positive("teacher.fp8", self, "certificate_problems", "max_kl")
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            value = getattr(self, name)
            require(value >= 0, f"teacher.fp8.{name} is {value}: it must be 0 or above")
        if not self.enabled:
            self.refuse_ignored("enabled", tuple(f.name for f in dataclasses.fields(self)))
        elif not self.certificate:
            self.refuse_ignored("certificate", ("certificate_problems", "max_kl"))
        has_rows = self.backend is Fp8Backend.torch
        backends = {
            Fp8Recipe.auto: self.backend,
            Fp8Recipe.rowwise: Fp8Backend.torch,
        }
        wanted = backends.get(self.recipe, Fp8Backend.transformer_engine)
        require(
            self.backend in (Fp8Backend.auto, wanted),
            f"teacher.fp8.recipe is {self.recipe.value} and teacher.fp8.backend is "
            f"{self.backend.value}, which does not have it: choose "
            f"{'rowwise' if has_rows else 'tensorwise, blockwise or mxfp8'}, or leave it at auto",
        )

    def refuse_ignored(self, switch: str, names: tuple[str, ...]) -> None:
        """Raise ConfigError where one of these keys is set while ``switch`` is false."""
        refuse_ignored(
            "teacher.fp8",
            self,
            names,
            f"teacher.fp8.{switch} is false",
            f"set teacher.fp8.{switch}=true",
        )


@dataclass
class TeacherConfig:
    """The frozen teacher. An empty ``hf_path`` is self-distillation: a copy of the student."""

    hf_path: str = ""  # Hugging Face directory; empty: the student's
    privileged_context: PrivilegedContext = PrivilegedContext.expert_solution
    # Tensor-parallel size of the teacher's own layout; 0: the student's. The teacher never uses
    # context parallelism.
    tensor_model_parallel_size: int = 0
    pipeline_model_parallel_size: int = 0  # stages of the teacher's layers; 0: the student's
    expert_model_parallel_size: int = 0  # ranks of a teacher layer's experts; 0: the student's
    placement: TeacherPlacement = TeacherPlacement.colocated
    # Number of the job's last ranks that run the teacher alone; with placement=separate.
    separate_ranks: int = 0
    micro_batch_size: int = 0  # sequences that a rank runs at once; 0: model.micro_batch_size
    # What the loss gets of the teacher. 0: hidden states, from which it is exact; above: that many
    # likeliest tokens and the mass of the rest, from which it is a lower bound (of adaptive_kl an
    # estimate).
    top_k: int = 0
    # Directory that keeps the teacher's signals of stored responses (forward KL) for later epochs
    # and runs; with placement=cached it is RUN/teacher_cache unless set.
    cache_dir: str | None = None
    fp8: Fp8Config = field(default_factory=Fp8Config)

    def __post_init__(self) -> None:
        require(self.top_k >= 0, f"teacher.top_k is {self.top_k}: it must be 0 or above")
        separate = self.placement is TeacherPlacement.separate
        require(
            separate == (self.separate_ranks > 0) and self.separate_ranks >= 0,
            f"teacher.placement is {self.placement.value} and teacher.separate_ranks is "
            f"{self.separate_ranks}: placement=separate needs ranks, the others take none",
        )
        require(
            not (separate and self.cache_dir is not None),
            "teacher.placement is separate and teacher.cache_dir is set: a teacher a step ahead "
            "computes each signal; leave cache_dir out, or set placement=colocated",
        )
        for name in (
            "micro_batch_size",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
        ):
            value = getattr(self, name)
            require(
                value >= 0, f"teacher.{name} is {value}: it must be above 0, or 0 for model.{name}"
            )
