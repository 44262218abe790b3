"""Every setting of a run: the blocks of ``settings/`` together, and what must hold between them.

Defaults live on these dataclasses and nowhere else; YAML under ``conf/`` holds only differences and
an unknown key is refused by omegaconf. A combination that cannot work raises
:class:`~nemo_paced.errors.ConfigError` here, before a process group, a model or a server exists,
with the dotted name of the key, its value and the remedy. Names follow NeMo's
(``trainer``, ``exp_manager``, ``model``, ``model.optim``), where NeMo has one.

This module imports neither torch nor NeMo: ``--help`` and ``--cfg job`` stay fast.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from nemo_paced.losses.kinds import DivergenceKind as DivergenceKind
from nemo_paced.settings import template
from nemo_paced.settings.checks import require
from nemo_paced.settings.checks import to_dict as to_dict
from nemo_paced.settings.choices import Duplicates as Duplicates
from nemo_paced.settings.choices import Estimator as Estimator
from nemo_paced.settings.choices import Fp8Backend as Fp8Backend
from nemo_paced.settings.choices import Fp8Recipe as Fp8Recipe
from nemo_paced.settings.choices import OptimBackend as OptimBackend
from nemo_paced.settings.choices import Precision as Precision
from nemo_paced.settings.choices import PrivilegedContext as PrivilegedContext
from nemo_paced.settings.choices import Recompute as Recompute
from nemo_paced.settings.choices import Reduction as Reduction
from nemo_paced.settings.choices import Reestimation as Reestimation
from nemo_paced.settings.choices import ReferenceSource as ReferenceSource
from nemo_paced.settings.choices import RefitBackend as RefitBackend
from nemo_paced.settings.choices import ResponseSource as ResponseSource
from nemo_paced.settings.choices import RolloutPlacement as RolloutPlacement
from nemo_paced.settings.choices import TeacherPlacement as TeacherPlacement
from nemo_paced.settings.choices import Unanswered as Unanswered
from nemo_paced.settings.choices import WeightScheme as WeightScheme
from nemo_paced.settings.choices import WeightSwap as WeightSwap
from nemo_paced.settings.choices import WrongReferences as WrongReferences
from nemo_paced.settings.data import DataConfig as DataConfig
from nemo_paced.settings.data import GradingConfig as GradingConfig
from nemo_paced.settings.data import ReferencesConfig as ReferencesConfig
from nemo_paced.settings.data import check_chat
from nemo_paced.settings.evaluation import EvaluationConfig as EvaluationConfig
from nemo_paced.settings.evaluation import LmEvalConfig as LmEvalConfig
from nemo_paced.settings.model import ModelConfig as ModelConfig
from nemo_paced.settings.model import OptimConfig as OptimConfig
from nemo_paced.settings.model import SchedConfig as SchedConfig
from nemo_paced.settings.rollout import RolloutConfig as RolloutConfig
from nemo_paced.settings.snr import SnrConfig as SnrConfig
from nemo_paced.settings.stages import LossConfig as LossConfig
from nemo_paced.settings.stages import StageConfig as StageConfig
from nemo_paced.settings.stages import two_stages as two_stages
from nemo_paced.settings.teacher import Fp8Config as Fp8Config
from nemo_paced.settings.teacher import StudentConfig as StudentConfig
from nemo_paced.settings.teacher import TeacherConfig as TeacherConfig
from nemo_paced.settings.trainer import CheckpointCallbackParams as CheckpointCallbackParams
from nemo_paced.settings.trainer import ExpManagerSettings as ExpManagerSettings
from nemo_paced.settings.trainer import TrainerConfig as TrainerConfig
from nemo_paced.settings.trainer import TrainingConfig as TrainingConfig
from nemo_paced.settings.weights import AdaptiveConfig as AdaptiveConfig
from nemo_paced.settings.weights import WeightsConfig as WeightsConfig


@dataclass
class PacedConfig:
    """The whole configuration of a run."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerSettings = field(default_factory=ExpManagerSettings)
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    references: ReferencesConfig = field(default_factory=ReferencesConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    stages: list[StageConfig] = field(default_factory=two_stages)
    loss: LossConfig = field(default_factory=LossConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    snr: SnrConfig = field(default_factory=SnrConfig)

    def __post_init__(self) -> None:
        self._check_stages()
        self._check_layouts()
        self._check_packing()
        self._check_teacher()
        self._check_validation()
        self._check_free_reestimation()

    def _check_stages(self) -> None:
        require(bool(self.stages), "stages is empty: at least one stage is needed")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stages have the names {names}: they must differ")
        total = sum(stage.fraction for stage in self.stages)
        require(abs(total - 1) < 1e-6, f"stages[].fraction sum to {total:g}: they must sum to 1")
        require(
            not self.is_on_policy or self.rollout.top_p == 1.0,
            f"rollout.top_p is {self.rollout.top_p} with on-policy stages: their samples must come "
            "from the student's whole distribution; set rollout.top_p=1",
        )

    def _check_layouts(self) -> None:
        separate = self.teacher.separate_ranks
        require(
            separate < self.world_size,
            f"teacher.separate_ranks is {separate} of the {self.world_size} ranks of "
            "trainer.num_nodes x trainer.devices: none is left for the student",
        )
        for key, model, ranks in (
            ("model", self.model, self.student_ranks),
            ("teacher", self.teacher_model, self.teacher_ranks),
        ):
            total = f"trainer.num_nodes x trainer.devices is {self.world_size}"
            if separate:
                total += f", {ranks} of them the {'student' if key == 'model' else key}'s"
            needed = model.model_parallel_size
            require(
                ranks % needed == 0,
                f"{total}, which does not fit {key}.tensor_model_parallel_size "
                f"{model.tensor_model_parallel_size} x pipeline "
                f"{model.pipeline_model_parallel_size} x context {model.context_parallel_size}: "
                f"a multiple of {needed} ranks is needed; set trainer.devices={needed + separate}",
            )
            needed = model.expert_layout_size
            require(
                ranks % needed == 0,
                f"{total}, which does not fit {key}.expert_model_parallel_size "
                f"{model.expert_model_parallel_size} x pipeline "
                f"{model.pipeline_model_parallel_size}: a multiple of {needed} ranks is needed",
            )

    def _check_packing(self) -> None:
        size = self.model.packed_sequence_size
        if not size:
            return
        longest = self.data.max_prompt_length + self.data.max_response_length
        require(
            size >= longest,
            f"model.packed_sequence_size is {size}, below data.max_prompt_length + "
            f"data.max_response_length {longest}: raise it, or lower them",
        )
        require(
            self.teacher.micro_batch_size in (0, 1),
            f"teacher.micro_batch_size is {self.teacher.micro_batch_size} and "
            "model.packed_sequence_size is set: a packed micro-batch is one row; set it to 1",
        )

    def _check_teacher(self) -> None:
        require(
            not (self.is_on_policy and self.teacher.placement is TeacherPlacement.cached),
            "teacher.placement is cached and a stage trains on rollouts: signals of fresh samples "
            "cannot be computed beforehand; set teacher.placement=offloaded, or keep to stages "
            "with responses=references",
        )
        require(
            self.needs_references or self.teacher.cache_dir is None,
            "teacher.cache_dir is set and every stage trains on rollouts: fresh samples never come "
            "again, and nothing would be kept; leave it out",
        )
        fp8 = self.teacher.fp8
        require(
            not (self.teacher.separate_ranks and fp8.enabled and fp8.certificate),
            "teacher.placement is separate and teacher.fp8.certificate is true: the certificate is "
            "measured where both models are; certify once with placement=colocated, then set "
            "teacher.fp8.certificate=false",
        )
        require(
            self.teacher.hf_path != "" or self._teacher_knows_more,
            "teacher.hf_path is empty (self-distillation) and teacher.privileged_context is none: "
            "teacher and student would be identical and every loss 0; set "
            "teacher.privileged_context to answer or expert_solution",
        )
        shown = template.fields(self.data.teacher_prompt_template)
        require(
            self.teacher.privileged_context is PrivilegedContext.none
            or not shown.isdisjoint({"context", "answer", "solution"}),
            f"teacher.privileged_context is {self.teacher.privileged_context.value} and "
            "data.teacher_prompt_template holds none of {context}, {answer}, {solution}: the "
            "teacher would not see it; add one, or set teacher.privileged_context=none",
        )

    def _check_validation(self) -> None:
        keep = self.exp_manager.checkpoint_callback_params
        require(
            not keep.save_best_k or bool(self.trainer.val_check_interval),
            f"exp_manager.checkpoint_callback_params.save_best_k is {keep.save_best_k} and "
            "trainer.val_check_interval is 0: nothing says which is best; set the interval",
        )
        require(
            not keep.save_best_k or keep.every_n_train_steps % self.trainer.val_check_interval == 0,
            f"exp_manager.checkpoint_callback_params.every_n_train_steps is "
            f"{keep.every_n_train_steps} and trainer.val_check_interval "
            f"{self.trainer.val_check_interval}: with save_best_k each checkpoint must be "
            "validated; make the first a multiple of the second",
        )
        require(
            not self.trainer.val_check_interval or bool(self.data.validation_problems),
            f"trainer.val_check_interval is {self.trainer.val_check_interval} and "
            "data.validation_problems is not set: give a file, or set the interval to 0",
        )
        check_chat(
            "evaluation",
            self.data.use_chat_template,
            system_prompt=self.evaluation.system_prompt,
            chat_template_kwargs=self.evaluation.chat_template_kwargs,
        )

    def _check_free_reestimation(self) -> None:
        weights = self.weights
        if weights.reestimate is not Reestimation.free:
            return
        require(
            self.is_on_policy,
            "weights.reestimate is free and no stage has responses=rollouts: nothing would be "
            "sampled to estimate from; set weights.reestimate=every_n_steps, or never",
        )
        # token_mean counts the tokens of problems of weight 0 as well: all are sampled
        skips = weights.may_be_zero and self.loss.reduction is not Reduction.token_mean
        require(
            not skips or weights.exploration > 0,
            f"weights.reestimate is free, and under weights.scheme {weights.scheme.value} with "
            "weights.estimator plug_in a problem of weight 0 is never sampled again; set "
            "weights.exploration above 0 (0.1, say), or weights.estimator=posterior",
        )
        require(
            skips or weights.exploration == 0,
            f"weights.exploration is {weights.exploration} and every problem of a batch is sampled "
            "anyway: it would be ignored; leave it out",
        )

    @property
    def _teacher_knows_more(self) -> bool:
        """Whether the teacher's prompt differs from the student's, by context or by its chat."""
        data = self.data
        system, variables = data.teacher_system_prompt, data.teacher_chat_template_kwargs
        return (
            self.teacher.privileged_context is not PrivilegedContext.none
            or (system is not None and system != (data.system_prompt or ""))
            or {**data.chat_template_kwargs, **variables} != data.chat_template_kwargs
        )

    @property
    def is_on_policy(self) -> bool:
        """Whether any stage trains on fresh samples of the student."""
        return any(stage.responses is ResponseSource.rollouts for stage in self.stages)

    @property
    def student_ranks(self) -> int:
        return self.world_size - self.teacher.separate_ranks

    @property
    def teacher_ranks(self) -> int:
        """Ranks that the teacher is spread over: the student's, or its own."""
        return self.teacher.separate_ranks or self.world_size

    @property
    def world_size(self) -> int:
        return self.trainer.num_nodes * self.trainer.devices

    @property
    def data_parallel_size(self) -> int:
        return self.student_ranks // self.model.model_parallel_size

    @property
    def teacher_model(self) -> ModelConfig:
        """The ``model`` block with the teacher's layout in place of the student's."""
        model, own = self.model, self.teacher
        tensor = own.tensor_model_parallel_size or model.tensor_model_parallel_size
        longest = self.data.max_teacher_prompt_length + self.data.max_response_length
        return dataclasses.replace(
            model,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=(
                own.pipeline_model_parallel_size or model.pipeline_model_parallel_size
            ),
            expert_model_parallel_size=(
                own.expert_model_parallel_size or model.expert_model_parallel_size
            ),
            virtual_pipeline_model_parallel_size=1,
            context_parallel_size=1,
            sequence_parallel=tensor > 1,  # the same numbers in less memory; experts need it
            micro_batch_size=own.micro_batch_size or model.micro_batch_size,
            packed_sequence_size=(
                model.packed_sequence_size and max(model.packed_sequence_size, longest)
            ),
        )

    @property
    def needs_references(self) -> bool:
        """Whether a stage trains on stored responses."""
        return any(stage.responses is ResponseSource.references for stage in self.stages)

    @property
    def sends_weights(self) -> bool:
        """Whether the rollout servers have to follow the student while it is trained."""
        weighted = self.weights.scheme is not WeightScheme.unweighted
        follows = (
            stage.responses is ResponseSource.rollouts or (stage.reestimate_pass_rates and weighted)
            for stage in self.stages
        )
        periodic = self.weights.reestimate is Reestimation.every_n_steps
        return any(follows) or periodic or self.trainer.val_check_interval > 0

    def asks_student(self, *, resumed: bool) -> bool:
        """Whether a start samples from the student at all, and needs its rollout servers.

        Args:
            resumed: it goes on from a checkpoint, which has the pass rates.
        """
        estimates = self.weights.pass_rates is None and self.weights.estimates
        return self.sends_weights or (estimates and not resumed)

    @property
    def teacher_hf_path(self) -> str:
        """The teacher's Hugging Face directory: the student's under self-distillation."""
        return self.teacher.hf_path or self.student.hf_path
