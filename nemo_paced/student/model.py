"""The trainable student: Megatron's DDP around a GPTModel, and Megatron's optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from nemo_paced.config import PacedConfig, Precision
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel.groups import Parallel
from nemo_paced.student.optimizer import chained, use_backend


@dataclass(frozen=True, slots=True)
class Student:
    """This rank's stage of the student, with everything that changes while it trains.

    Attributes:
        chunks: of layers, in their order in the model; one unless the pipeline is interleaved.
        ddp_chunks: the same chunks, each wrapped in Megatron's DDP.
        optimizer: Megatron's, over the parameters of all chunks.
        clip_norm: the global gradient norm to clip to; 0: no clipping.
    """

    chunks: Sequence[PacedGPTModel]
    ddp_chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    clip_norm: float

    def zero_grad(self) -> None:
        for ddp in self.ddp_chunks:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of every parameter group, times the group's ``lr_mult`` where it has one."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)

    def update(self) -> float | None:
        """Clip the reduced gradients and take one optimizer step; collective.

        Returns:
            The global L2 norm of the gradients before clipping, or ``None`` when they held NaN or
            Inf: then no weight has changed.
        """
        found_inf = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if found_inf or not torch.isfinite(torch.tensor(grad_norm)):
            return None
        if self.clip_norm > 0:
            parameters = [p for one in chained(self.optimizer) for p in one.get_parameters()]
            clip_grad_by_total_norm_fp32(parameters, max_norm=self.clip_norm, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        return grad_norm

    def sync_parameters(self) -> None:
        """Gather updated weights before they are read outside a forward pass; collective.

        Only ``overlap_param_gather`` needs it, which leaves that gathering to the next forward.
        """
        for ddp in self.ddp_chunks:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)

    def reset_optimizer(self) -> None:
        """Forget Adam's moments and step count, but not the master weights.

        This is ``stages[].reset_optimizer``.
        """
        for optimizer in chained(self.optimizer):
            if optimizer.optimizer is not None:
                optimizer.optimizer.state.clear()
                for group in optimizer.optimizer.param_groups:
                    group.pop("step", None)  # Transformer Engine's and Apex's Adam count there


def build_student(
    chunks: Sequence[PacedGPTModel],
    config: PacedConfig,
    parallel: Parallel,
    *,
    ddp_config: DistributedDataParallelConfig | None = None,
) -> Student:
    """Wrap a built model (weights loaded) for training.

    Args:
        ddp_config: in place of the one that ``model.optim`` asks for.

    Raises:
        ConfigError: the Adam that ``model.optim.backend`` names is not installed.
    """
    optim = config.model.optim
    ddp_config = ddp_config or DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
    )
    _accumulate_weight_gradients(chunks)
    bf16 = config.trainer.compute_precision is Precision.bf16
    model_config = chunks[0].config  # the chunks share it
    ddp_chunks = [
        DistributedDataParallel(
            config=model_config,
            ddp_config=ddp_config,
            module=gpt,
            # as Megatron does: the later chunks' gradients come while others are computed anyway
            disable_bucketing=number > 0,
            pg_collection=parallel.groups,
        )
        for number, gpt in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            decoupled_weight_decay=optim.name == "adamw",
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=config.trainer.gradient_clip_val,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        ),
        ddp_chunks,
        use_gloo_process_groups=False,
        pg_collection=parallel.groups,
    )
    use_backend(optimizer, optim, parallel.device)
    for group in optimizer.param_groups:
        # norms and biases do not decay; Megatron leaves that to its scheduler, which is not ours
        group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)
    model_config.finalize_model_grads_func = partial(
        finalize_model_grads, pg_collection=parallel.groups
    )
    model_config.grad_scale_func = optimizer.scale_loss
    no_sync = [ddp.no_sync for ddp in ddp_chunks]
    model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    for ddp in ddp_chunks:
        ddp.broadcast_params()
    return Student(chunks, ddp_chunks, optimizer, config.trainer.gradient_clip_val)


def _accumulate_weight_gradients(chunks: Sequence[PacedGPTModel]) -> None:
    """Let Transformer Engine's layers add weight gradients to Megatron's buffer in their GEMMs.

    This is ``gradient_accumulation_fusion`` for them alone: set for the model, Megatron's other
    layers would ask for Apex.
    """
    for gpt in chunks:
        for module in gpt.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
