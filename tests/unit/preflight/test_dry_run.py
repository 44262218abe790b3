"""A recipe of many ranks in one process: what goes through, what is refused, what is noticed."""

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_paced.cli import main
from nemo_paced.config import (
    ModelConfig,
    PacedConfig,
    StudentConfig,
    TeacherConfig,
    TeacherPlacement,
    TrainerConfig,
)
from nemo_paced.data import packing
from nemo_paced.hf.architectures import Architecture
from nemo_paced.preflight.dry_run import short as dry_run_module
from nemo_paced.quickstart.models import write_tokenizer
from nemo_paced.sizing.parameters import stage_parameters
from nemo_paced.sizing.shapes import Accelerator, padded_vocab, student_layout, work_of
from tests.distributed.harness import run_ranks
from tests.tiny import make_hf_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4}
    make_hf_model("qwen3_tied", folder / "student", num_hidden_layers=8, **sizes)
    make_hf_model("qwen3", folder / "teacher", num_hidden_layers=4, hidden_size=64, **sizes)
    for name in ("student", "teacher"):
        write_tokenizer(folder / name)
        (folder / name / "model.safetensors").unlink()  # no weight is read
    return folder


def arguments(models, *overrides):
    return [
        "train",
        "--dry-run",
        f"student.hf_path={models}/student",
        f"teacher.hf_path={models}/teacher",
        "data.max_prompt_length=16",
        "data.max_teacher_prompt_length=32",
        "data.max_response_length=32",
        "trainer.num_nodes=2",
        "trainer.devices=8",
        "model.tensor_model_parallel_size=4",
        "model.pipeline_model_parallel_size=2",
        "model.sequence_parallel=true",
        *overrides,
    ]


def test_a_recipe_of_16_ranks_runs_dry(models, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nemo_paced.cli", *arguments(models)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 16 (stage 0): 2 layers" in done.stderr
    assert "rank 8 of 16 (stage 1): 2 layers" in done.stderr
    assert "12 problems" in done.stderr and "went through" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_divide_are_refused_by_name(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(models, "model.tensor_model_parallel_size=8", "trainer.num_nodes=4")) == 2
    told = capsys.readouterr().err
    for who in ("student", "teacher"):
        assert f"layout of the {who}: model.tensor_model_parallel_size is 8, which does not" in told
    assert "4 key-value heads" in told and "Traceback" not in told


def make_config(folder, model, **teacher):
    return PacedConfig(
        trainer=TrainerConfig(num_nodes=3, devices=8),
        model=ModelConfig(**model),
        student=StudentConfig(hf_path=f"{folder}/student"),
        teacher=TeacherConfig(hf_path=f"{folder}/teacher", **teacher),
    )


TP2_PP4 = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 4,
    "sequence_parallel": True,
}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
PACKED_CP2 = {
    "context_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "micro_batch_size": 1,
    "packed_sequence_size": 16384,
}


def _run(rank, world_size, config, folder, break_it=False):
    if break_it:  # a sequence that the ranks of a group cannot share
        packing.round_up = lambda value, multiple: value
        dry_run_module.RESPONSE = 7
    return dry_run_module.dry_run(config, Path(folder))


def test_first_middle_and_last_stage_hold_what_the_plan_counts(models, tmp_path):
    config = make_config(models, TP2_PP4)
    (ranks,) = run_ranks(1, _run, config, _new(tmp_path / "run"))
    assert [(r.rank, r.stage) for r in ranks] == [(0, 0), (6, 1), (18, 3)]
    config = dry_run_module.shortened(config, Path(_new(tmp_path / "again")))
    student, teacher = (
        Architecture.read(path, "hf_path")
        for path in (config.student.hf_path, config.teacher_hf_path)
    )
    layout = student_layout(config)
    work = work_of(config, mean_prompt=1, mean_response=1, accelerator=Accelerator.cpu)
    rows = padded_vocab(student, teacher, work, layout.tensor)
    for of in ranks:
        assert of.parameters == stage_parameters(student, layout, of.stage, rows).total


@pytest.mark.parametrize(
    ("model", "teacher"),
    [
        (TP2_PP4, {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1}),
        (PACKED_CP2, {}),
        (INTERLEAVED, {}),
        (PACKED_CP2, {"top_k": 4, "placement": TeacherPlacement.offloaded}),
    ],
)
def test_other_layouts_of_either_model_run_dry(models, tmp_path, model, teacher):
    (ranks,) = run_ranks(1, _run, make_config(models, model, **teacher), str(tmp_path))
    assert len(ranks) == (3 if model is TP2_PP4 else 2)


def test_experts_run_dry(tmp_path):
    for name in ("student", "teacher"):
        make_hf_model("qwen3_moe", tmp_path / name, num_hidden_layers=8)
        write_tokenizer(tmp_path / name)
    model = {**TP2_PP4, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4}
    (ranks,) = run_ranks(1, _run, make_config(tmp_path, model), _new(tmp_path / "run"))
    assert [r.rank for r in ranks] == [0, 12]


def test_a_rank_that_fails_is_named(models, tmp_path):
    with pytest.raises(AssertionError, match=r"PacedError: dry run: rank 0 \(pipeline stage 0\)"):
        run_ranks(1, _run, make_config(models, TP2_PP4), str(tmp_path), True)


def _new(folder):
    folder.mkdir()
    return str(folder)
