"""The memory model against what a real training step holds, on the CPU."""

import pytest
import torch

from benchmarks.memory import track_peak
from nemo_paced.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    PacedConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
)
from nemo_paced.data.packing import TrainItem
from nemo_paced.hf.architectures import Architecture
from nemo_paced.parallel import groups
from nemo_paced.quickstart.models import write_tokenizer
from nemo_paced.sizing.memory import stage_memory
from nemo_paced.sizing.shapes import Accelerator, student_layout, teacher_plan, work_of
from nemo_paced.training.setup import build_models
from tests.distributed.harness import run_ranks
from tests.tiny import make_hf_model

SHAPE = {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
TOLERANCE = 0.05
MHA = {"num_key_value_heads": 8}
LAYOUTS = {
    "1 rank": {},
    "1 rank bf16": {"precision": "bf16"},
    "packed": {"micro_batch_size": 1, "packed_sequence_size": 256},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"distributed": True},
    "pp2, teacher tp2": {"pipeline_model_parallel_size": 2, "teacher": (2, 1)},
}


def ranks(layout):
    return 2 if "2" in layout.split(",")[0] else 1


def make_config(folder, name):
    layout = {"micro_batch_size": 4, "precision": "fp32", "teacher": (0, 0), "distributed": False}
    layout |= LAYOUTS[name]
    optim = OptimConfig(lr=1e-4, use_distributed_optimizer=layout.pop("distributed"))
    precision, (tensor, pipeline) = layout.pop("precision"), layout.pop("teacher")
    return PacedConfig(
        trainer=TrainerConfig(devices=ranks(name), accelerator="cpu", precision=precision),
        model=ModelConfig(global_batch_size=12, optim=optim, **layout),
        student=StudentConfig(hf_path=f"{folder}/student"),
        teacher=TeacherConfig(
            hf_path=f"{folder}/teacher",
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
        ),
        data=DataConfig(max_prompt_length=32, max_teacher_prompt_length=32, max_response_length=96),
    )


def make_items(config):
    data = config.data
    return [
        TrainItem(
            response_id=f"r{i}",
            problem_id=f"p{i}",
            student_prompt_ids=(2,) * data.max_prompt_length,
            teacher_prompt_ids=(3,) * data.max_teacher_prompt_length,
            response_ids=(4,) * data.max_response_length,
            token_weight=0.1,
        )
        for i in range(config.model.global_batch_size)
    ]


def expected(config, rank):
    """The plan's figures for this rank."""
    student = Architecture.read(config.student.hf_path, "student.hf_path")
    teacher = Architecture.read(config.teacher.hf_path, "teacher.hf_path")
    work = work_of(config, mean_prompt=32, mean_response=96, accelerator=Accelerator.cpu)
    layout = student_layout(config)
    stage = rank // (layout.world_size // layout.pipeline)
    return stage_memory(student, teacher, layout, teacher_plan(config), work, stage)


def held(rank, world_size, folder, layout):
    """(bytes by kind, peak of a step, the plan's figures)."""
    config = make_config(folder, layout)
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    items = make_items(config)
    models.step(items, StageConfig(), 1e-4)  # moments and lasting buffers exist from here on
    student = models.student
    bf16 = config.trainer.precision == "bf16"
    optimizer = sum(
        value.nbytes
        for each in getattr(student.optimizer, "chained_optimizers", [student.optimizer])
        for group in each.optimizer.state.values()
        for value in group.values()
        if torch.is_tensor(value) and value.ndim
    )
    if bf16:
        masters = student.optimizer.get_parameters()
        optimizer += sum(master.nbytes for master in masters if master.dtype == torch.float32)
    with models.step.teacher.held.resident() as teacher:
        teacher_bytes = sum(p.nbytes for p in teacher.gpt.parameters())
    buffers = [
        b for ddp in student.ddp_chunks for b in (*ddp.buffers, *ddp.expert_parallel_buffers)
    ]
    counted = {
        "weights": sum(p.nbytes for gpt in student.chunks for p in gpt.parameters()),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer": optimizer,
        "teacher": teacher_bytes,
    }
    with track_peak() as peak:
        models.step(items, StageConfig(), 1e-4)
    return counted, peak.bytes, expected(config, rank)


def make_models(folder, family, **changes):
    make_hf_model(family, folder / "student", **{**SHAPE, **changes})
    make_hf_model(family, folder / "teacher", seed=1, **{**SHAPE, "num_hidden_layers": 2})
    for name in ("student", "teacher"):
        write_tokenizer(folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"), "qwen3")


def check(results, tolerance=TOLERANCE):
    for counted, peak, plan in results:
        for part in ("weights", "gradients", "optimizer"):
            # a distributed optimizer pads its buckets
            padding = 0.001 if part != "weights" and plan.optimizer < 2 * plan.weights else 0
            assert counted[part] == pytest.approx(getattr(plan, part), rel=padding, abs=0), part
        assert counted["teacher"] == plan.teacher, "its head is not among them"
        assert plan.student_phase > plan.teacher_phase, "so that the peak is the student's"
        assert plan.activations + plan.loss + plan.signal == pytest.approx(peak, rel=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_holds_what_the_plan_says(models, layout):
    check(run_ranks(ranks(layout), held, str(models), layout))


@pytest.mark.parametrize(("family", "changes"), [("llama", MHA), ("qwen2", {})])
def test_without_grouped_queries_and_without_their_norms(tmp_path, family, changes):
    """What attention keeps differs; one rank, both of their ways to keep it."""
    make_models(tmp_path, family, **changes)
    check(run_ranks(1, held, str(tmp_path), "1 rank"))


def test_with_experts(tmp_path):
    """Which experts the tokens go to decides how much is kept; the plan counts an even spread."""
    make_models(tmp_path, "qwen3_moe")
    check(run_ranks(1, held, str(tmp_path), "1 rank"), tolerance=0.1)
