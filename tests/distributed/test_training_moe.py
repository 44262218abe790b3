"""Training steps with experts in the student, the teacher or both, at every expert layout."""

from pathlib import Path

import pytest
import torch

from nemo_paced import parallel as parallel_module
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
from nemo_paced.quickstart.models import VOCABULARY, write_tokenizer
from nemo_paced.training import checkpoint
from nemo_paced.training.setup import build_models, check_layouts
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import LR, STAGES, STEPS, make_items, reference_steps
from tests.tiny import make_hf_model

VOCAB = len(VOCABULARY)
# Adam moves a weight by up to 9e-3 in three steps, in a direction that rounding decides where the
# gradient is about 0
WEIGHTS_CLOSE = 1e-3
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
        teacher=TeacherConfig(hf_path=f"{folder}/{teacher}"),
    )


def train_steps(
    rank, world_size, folder, pair, layout, resume_from=None, save_to=None, steps=STEPS
):
    config = make_config(folder, pair, layout)
    parallel = parallel_module.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    first = 0
    if resume_from:
        first = checkpoint.load(Path(resume_from), models.student, parallel).step
    results = [models.step(make_items(s), STAGES["forward_kl"], LR) for s in range(first, steps)]
    if save_to:
        models.save(Path(save_to), step=steps, consumed_problems=0, skipped=0)
    weights = {
        n: t.clone() for n, t in iter_hf_tensors(models.student.gpt, parallel) if t is not None
    }
    return [(r.loss, r.grad_norm) for r in results], weights


@pytest.fixture(scope="module")
def single(models):
    return {
        pair: run_ranks(1, train_steps, str(models), pair, LAYOUTS["single"])[0] for pair in PAIRS
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_steps_equal_plain_pytorch(models, single, pair, tmp_path):
    losses, weights = single[pair]
    for name, folder in zip(("student", "teacher"), PAIRS[pair], strict=True):
        (tmp_path / name).symlink_to(models / folder)
    expected, model = reference_steps(tmp_path, "forward_kl")
    losses, expected = torch.tensor(losses), torch.tensor(expected)
    # routers and Adam's first steps make much of rounding: 1e-6 in the first step's gradient norm
    torch.testing.assert_close(losses[:1], expected[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, expected, rtol=3e-4, atol=3e-4)
    assert losses[:, 1].min() > 1, "every step is clipped"
    # transformers holds the experts in one tensor: compare what it reads from ours
    for name, value in weights.items():
        if ".mlp.experts." not in name:
            torch.testing.assert_close(value, model[name], rtol=0, atol=WEIGHTS_CLOSE, msg=name)
            continue
        before, _, rest = name.partition(".mlp.experts.")
        expert, part, _ = rest.split(".")
        merged = "down_proj" if part == "down_proj" else "gate_up_proj"
        whole = model[f"{before}.mlp.experts.{merged}"][int(expert)]
        if part != "down_proj":
            whole = whole.chunk(2)[part == "up_proj"]
        torch.testing.assert_close(value, whole, rtol=0, atol=WEIGHTS_CLOSE, msg=name)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_expert_layout_gives_the_same_steps(models, single, layout, pair):
    results = run_ranks(LAYOUTS[layout][3], train_steps, str(models), pair, LAYOUTS[layout])
    expected = torch.tensor(single[pair][0])
    for losses, _ in results:
        told = torch.tensor(losses)
        torch.testing.assert_close(told[:2], expected[:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)
    for name, value in single[pair][1].items():
        torch.testing.assert_close(results[0][1][name], value, rtol=0, atol=WEIGHTS_CLOSE, msg=name)


@pytest.mark.parametrize("after", ["single", "ep2", "tp2 ep2", "pp2 ep2"])
def test_a_resumed_run_goes_on_at_another_expert_layout(models, single, tmp_path, after):
    begin = (str(models), "both", LAYOUTS["ep2"], None, str(tmp_path), 1)
    run_ranks(2, train_steps, *begin)
    saved = str(checkpoint.checkpoint_dir(tmp_path, 1))
    layout = LAYOUTS[after]
    results = run_ranks(layout[3], train_steps, str(models), "both", layout, saved)
    losses = torch.tensor(results[0][0])
    expected = torch.tensor(single["both"][0][1:])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size is 2, and neither the st"),
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
