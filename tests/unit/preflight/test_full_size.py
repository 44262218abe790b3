"""A step at a recipe's full size on fake tensors: what it holds, notices and undoes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from nemo_paced.cli import main
from nemo_paced.config import (
    DataConfig,
    ModelConfig,
    PacedConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
)
from nemo_paced.parallel import cpu_megatron
from nemo_paced.preflight.dry_run import fake_tensors, full_size, short
from nemo_paced.quickstart.models import write_tokenizer
from nemo_paced.sizing import activations
from nemo_paced.student.model import Student
from nemo_paced.teacher.source import TeacherSource
from tests.distributed.harness import run_ranks
from tests.public_models import MODELS

SHAPE = {
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
MOE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 384}
SMALL_DATA = DataConfig(
    max_prompt_length=128, max_teacher_prompt_length=256, max_response_length=1920
)
TP4_PP2 = {
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
    "micro_batch_size": 1,
}
ONE = {"micro_batch_size": 1}


def write_models(folder, like, **changes):
    """Two directories that hold a ``config.json`` and nothing else."""
    published = json.loads((MODELS / like / "config.json").read_text())
    for name in ("student", "teacher"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**published, **SHAPE, **changes}))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("dense"), "Qwen3-1.7B")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("experts"), "Qwen3-30B-A3B", **MOE)


def make_config(folder, model, **teacher):
    return PacedConfig(
        trainer=TrainerConfig(num_nodes=2, devices=8, accelerator="gpu"),
        model=ModelConfig(**model),
        student=StudentConfig(hf_path=f"{folder}/student"),
        teacher=TeacherConfig(hf_path=f"{folder}/teacher", **teacher),
        data=SMALL_DATA,
    )


def _run(rank, world_size, config, break_it=""):
    del rank, world_size
    if break_it == "plan":  # it forgets what the MLP keeps
        activations._mlp = lambda *_: 0.0
    return list(full_size.full_run(config))


def run(config, break_it=""):
    (ranks,) = run_ranks(1, _run, config, break_it)
    return ranks


def apart(ranks):
    return {p.name: round(p.ratio, 3) for rank in ranks for p in rank.phases if not p.agrees}


def test_a_dense_model_holds_what_the_plan_says(dense):
    assert not apart(run(make_config(dense, TP4_PP2)))


def test_experts_hold_what_the_plan_says(experts):
    ranks = run(make_config(experts, {**TP4_PP2, "expert_model_parallel_size": 8}))
    assert [(r.rank, r.stage, r.layers) for r in ranks] == [(0, 0, 2), (8, 1, 2)]
    assert not apart(ranks)


def test_a_wrong_plan_is_noticed(dense):
    found = apart(run(make_config(dense, ONE), "plan"))
    assert set(found) == {full_size.STUDENT}


def _twice(rank, world_size, config, folder):
    """Everything that the run replaces, before and after it, and a short dry run behind it."""
    cpu_megatron.enable()  # for good
    before = _replaceable()
    list(full_size.full_run(config))
    assert _replaceable() == before
    assert not isinstance(torch.zeros(1), FakeTensor)
    return len(short.dry_run(config, Path(folder)))


def _replaceable():
    routing = fake_tensors._EvenRouting()
    replaced = (
        *fake_tensors._gpu_kernels(),
        *fake_tensors._megatron_and_ours(routing),
        *fake_tensors._torch(),
        (TeacherSource, "signal", None),
        (Student, "update", None),
    )
    table = fake_tensors.fake_impls.op_implementations_dict
    return [vars(owner)[name] for owner, name, _ in replaced], dict(table)


def test_all_that_it_replaces_is_as_before(dense, tmp_path):
    write_tokenizer(dense / "student")
    (ranks,) = run_ranks(1, _twice, make_config(dense, ONE), str(tmp_path))
    assert ranks == 1


def test_the_command_needs_no_tokenizer_and_shows_the_plan_beside(dense, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "nemo_paced.cli", "train", "--dry-run", "--full",
            f"student.hf_path={dense}/student", f"teacher.hf_path={dense}/teacher",
            "trainer.devices=2", "trainer.accelerator=gpu", "model.micro_batch_size=1",
            "teacher.fp8.enabled=true", "data.max_prompt_length=128",
            "data.max_teacher_prompt_length=256", "data.max_response_length=384",
        ],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2 (stage 0): 4 layers, 4 problems" in done.stderr
    assert "every shape of one step of every stage went through" in done.stderr
    for row in ("plan", full_size.HELD, full_size.TEACHER, full_size.STUDENT, full_size.OPTIMIZER):
        assert row in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_full_without_dry_run_is_refused_by_name(capsys):
    assert main(["train", "--full", "--config-name", "quickstart"]) == 2
    told = capsys.readouterr().err
    assert "--full is a kind of dry run, and --dry-run is not given: add it" in told
