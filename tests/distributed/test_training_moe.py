"""Training steps with experts in the student, the teacher or both, at every expert layout."""

from functools import partial
from pathlib import Path

import pytest
import torch

from nemo_paced.config import (
    ModelConfig,
    OptimConfig,
    PacedConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
)
from nemo_paced.errors import ConfigError
from nemo_paced.hf.export_weights import iter_hf_tensors
from nemo_paced.parallel import groups
from nemo_paced.preflight.models import check_layouts
from nemo_paced.quickstart.models import VOCABULARY, write_tokenizer
from nemo_paced.run import checkpoint
from nemo_paced.training.setup import build_models
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import LR, STAGES, STEPS, make_items, reference_steps
from tests.tiny import make_hf_model

VOCAB = len(VOCABULARY)
# tensor (sequence-parallel above 1), pipeline, expert, ranks
LAYOUTS = {
    "single": (1, 1, 1, 1),
    "ep2": (1, 1, 2, 2),
    "dp2": (1, 1, 1, 2),
    "tp2": (2, 1, 1, 2),
    "tp2 ep2": (2, 1, 2, 2),
    "ep2 dp4": (1, 1, 2, 4),
    "tp2 ep4": (2, 1, 4, 4),
    "pp2 ep2": (1, 2, 2, 4),
}
# student, teacher
PAIRS = {
    "both": ("moe", "moe_teacher"),
    "student": ("moe", "dense_teacher"),
    "teacher": ("dense", "moe_teacher"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_hf_model("qwen3_moe", folder / "moe", vocab_size=VOCAB + 3)
    make_hf_model("qwen3_tied", folder / "dense", vocab_size=VOCAB + 3)
    wider = {"seed": 1, "vocab_size": VOCAB + 11, "hidden_size": 64}
    make_hf_model("qwen3_moe", folder / "moe_teacher", num_experts=8, **wider)
    make_hf_model("qwen3", folder / "dense_teacher", **wider)
    for name in ("moe", "dense", "moe_teacher", "dense_teacher"):
        write_tokenizer(folder / name)
    return folder


def make_config(folder, pair, layout, **model):
    tensor, pipeline, expert, ranks = layout
    student, teacher = PAIRS[pair]
    teacher_layout = {}
    if pair == "teacher":  # a student without experts is refused an expert layout
        expert, teacher_layout = 1, {"expert_model_parallel_size": expert}
    return PacedConfig(
        trainer=TrainerConfig(
            devices=ranks, accelerator="cpu", precision="fp32", gradient_clip_val=1.0
        ),
        model=ModelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            expert_model_parallel_size=expert,
            sequence_parallel=tensor > 1,
            micro_batch_size=2,
            make_vocab_size_divisible_by=8,
            optim=OptimConfig(lr=LR),
            **model,
        ),
        student=StudentConfig(hf_path=f"{folder}/{student}"),
        teacher=TeacherConfig(hf_path=f"{folder}/{teacher}", **teacher_layout),
    )


def train_steps(
    rank,
    world_size,
    folder,
    pair,
    layout,
    resume_from=None,
    save_to=None,
    steps=STEPS,
    teacher=None,
    fully_reshardable=False,
    **model,
):
    config = make_config(folder, pair, layout, **model)
    config.exp_manager.checkpoint_callback_params.fully_reshardable = fully_reshardable
    for key, value in (teacher or {}).items():
        setattr(config.teacher, key, value)
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    first = 0
    if resume_from:
        first = checkpoint.load(Path(resume_from), models.student, parallel).step
    results = [models.step(make_items(s), STAGES["forward_kl"], LR) for s in range(first, steps)]
    if save_to:
        models.save(Path(save_to), step=steps, consumed_problems=0, skipped=0)
    weights = {
        n: t.clone() for n, t in iter_hf_tensors(models.student.chunks, parallel) if t is not None
    }
    return [(r.loss, r.grad_norm) for r in results], weights


@pytest.fixture(scope="module")
def single(models):
    return {
        pair: run_ranks(1, train_steps, str(models), pair, LAYOUTS["single"])[0] for pair in PAIRS
    }


def check_steps(losses, expected, *, rtol=1e-5, norm_rtol=1e-4):
    """Losses and gradient norms.

    Norms after an update differ more: Adam divides by the size of gradients, so that of an expert
    which hardly any token went to is mostly rounding, and it moves as far as any other.
    """
    losses, expected = torch.tensor(losses), torch.tensor(expected)
    torch.testing.assert_close(losses[:, 0], expected[:, 0], rtol=rtol, atol=rtol)
    torch.testing.assert_close(losses[:, 1], expected[:, 1], rtol=norm_rtol, atol=norm_rtol)
    if len(losses) == STEPS:
        torch.testing.assert_close(losses[0, 1], expected[0, 1], rtol=1e-5, atol=1e-5)


def check_weight(name, value, expected):
    """Weights move by up to 3e-3 a step; where a gradient is rounding, one element may stray."""
    assert (value - expected).square().mean().sqrt() < 3e-5, name


@pytest.mark.parametrize("pair", PAIRS)
def test_steps_equal_plain_pytorch(models, single, pair, tmp_path):
    losses, weights = single[pair]
    for name, folder in zip(("student", "teacher"), PAIRS[pair], strict=True):
        (tmp_path / name).symlink_to(models / folder)
    expected, model = reference_steps(tmp_path, "forward_kl")
    check_steps(losses, expected, rtol=1e-4, norm_rtol=3e-4)
    assert min(norm for _, norm in losses) > 1, "every step is clipped"
    # transformers holds the experts in one tensor: compare what it reads from ours
    for name, value in weights.items():
        if ".mlp.experts." not in name:
            check_weight(name, value, model[name])
            continue
        before, _, rest = name.partition(".mlp.experts.")
        expert, part, _ = rest.split(".")
        merged = "down_proj" if part == "down_proj" else "gate_up_proj"
        whole = model[f"{before}.mlp.experts.{merged}"][int(expert)]
        if part != "down_proj":
            whole = whole.chunk(2)[part == "up_proj"]
        check_weight(name, value, whole)


@pytest.mark.parametrize(
    ("layout", "pair"),
    [
        *((layout, "both") for layout in LAYOUTS if layout != "single"),
        *((layout, pair) for layout in ("ep2", "tp2 ep2") for pair in ("student", "teacher")),
    ],
)
def test_every_expert_layout_gives_the_same_steps(models, single, layout, pair):
    results = run_ranks(LAYOUTS[layout][3], train_steps, str(models), pair, LAYOUTS[layout])
    expected = single[pair][0]
    for losses, _ in results:
        check_steps(losses, expected)
    for name, value in single[pair][1].items():
        check_weight(name, results[0][1][name], value)


def _with_context_parallelism(rank, world_size, folder, layout):
    return train_steps(rank, world_size, folder, "both", layout, context_parallel_size=2)[0]


def test_experts_lie_across_context_parallel_ranks(models, single):
    results = run_ranks(2, _with_context_parallelism, str(models), (1, 1, 2, 2))
    expected = single["both"][0]
    for losses in results:
        check_steps(losses, expected)


def _with_a_teacher_of_its_own(rank, world_size, folder, layout, teacher):
    return train_steps(rank, world_size, folder, "both", layout, teacher=teacher)[0]


@pytest.mark.parametrize(
    ("layout", "teacher"),
    [
        ((1, 1, 1, 2), {"expert_model_parallel_size": 2}),
        ((1, 2, 1, 2), {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 1}),
        ((1, 1, 2, 4), {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2}),
    ],
)
def test_the_teachers_experts_have_a_layout_of_their_own(models, single, layout, teacher):
    options = (str(models), layout, teacher)
    expected = single["both"][0]
    for losses in run_ranks(layout[3], _with_a_teacher_of_its_own, *options):
        check_steps(losses, expected)


@pytest.mark.parametrize(
    ("after", "fully_reshardable"),
    [("ep2", False), ("ep2 dp4", False), ("single", True), ("tp2 ep2", True), ("pp2 ep2", True)],
)
def test_a_resumed_run_goes_on_at_another_expert_layout(
    models, single, tmp_path, after, fully_reshardable
):
    begin = partial(train_steps, fully_reshardable=fully_reshardable)
    run_ranks(2, begin, str(models), "both", LAYOUTS["ep2"], None, str(tmp_path), 1)
    saved = str(checkpoint.checkpoint_dir(tmp_path, 1))
    layout = LAYOUTS[after]
    results = run_ranks(layout[3], train_steps, str(models), "both", layout, saved)
    check_steps(results[0][0], single["both"][0][1:], rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_model_parallel_size": 2}, "model.expert_model_parallel_size is 2, and this Qwe"),
        ({"moe_aux_loss_coeff": 0.01}, r"moe_aux_loss_coeff is 0.01, and the student \(Qwen3For"),
    ],
)
def test_keys_for_experts_are_refused_where_there_are_none(models, changes, message):
    config = make_config(models, "teacher", LAYOUTS["dp2"])
    config.teacher.hf_path = f"{models}/dense_teacher"
    for key, value in changes.items():
        setattr(config.model, key, value)
    with pytest.raises(ConfigError, match=message):
        check_layouts(config)


def _with_a_balancing_loss(rank, world_size, folder, layout, context=1):
    more = {"steps": 1, "moe_aux_loss_coeff": 1.0, "context_parallel_size": context}
    return train_steps(rank, world_size, folder, "student", layout, **more)[0]


def test_the_routers_balancing_loss_is_of_the_whole_micro_batch(models, single):
    """It moves the gradient and not the loss that is told, alike however the sequence is cut."""
    (((loss, norm),),) = run_ranks(1, _with_a_balancing_loss, str(models), LAYOUTS["single"])
    without = single["student"][0][0]
    assert loss == pytest.approx(without[0], rel=1e-6) and abs(norm - without[1]) > 1e-3
    for layout, context in ((LAYOUTS["tp2"], 1), (LAYOUTS["tp2 ep2"], 1), ((1, 1, 2, 2), 2)):
        for losses in run_ranks(2, _with_a_balancing_loss, str(models), layout, context):
            assert losses[0] == pytest.approx((loss, norm), rel=1e-5)
