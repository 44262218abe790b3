"""Each check finds what it is for, names it with a remedy, and finds nothing in a sound run."""

import json
from dataclasses import replace

import pytest

from nemo_paced.config import (
    DataConfig,
    ExpManagerSettings,
    ModelConfig,
    PacedConfig,
    Precision,
    Recompute,
    ReferencesConfig,
    ReferenceSource,
    RolloutPlacement,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
    WeightsConfig,
)
from nemo_paced.hf.architectures import Architecture
from nemo_paced.preflight import files, loggers
from nemo_paced.preflight import models as model_checks
from nemo_paced.preflight.checks import check_inputs
from nemo_paced.preflight.findings import (
    Finding,
    PreflightFailed,
    Severity,
    error,
    refuse,
    show,
    warning,
)
from nemo_paced.quickstart.models import write_tokenizer
from tests import chat_templates
from tests.tiny import make_hf_model

ROWS = 60  # of the embeddings; the tokenizer has 55 tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("student", "teacher"):
        make_hf_model("qwen3", folder / name, vocab_size=ROWS)
        write_tokenizer(folder / name)
    rows = [
        {"id": "p1", "problem": "solve s1 f2 =", "answer": "s3", "solution": "s4 s3"},
        {"id": "p2", "problem": "solve s1 =", "answer": "s3"},
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    (folder / "unsolved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(models):
    return PacedConfig(
        trainer=TrainerConfig(accelerator="cpu", devices=2, precision="fp32"),
        model=ModelConfig(tensor_model_parallel_size=2, global_batch_size=4),
        student=StudentConfig(hf_path=str(models / "student")),
        teacher=TeacherConfig(hf_path=str(models / "teacher")),
        data=DataConfig(
            problems=str(models / "problems.jsonl"),
            prompt_template="{problem}",
            teacher_prompt_template="hint {context} ; {student_prompt}",
            use_chat_template=False,
            max_prompt_length=8,
            max_teacher_prompt_length=16,
            max_response_length=16,
        ),
    )


def found(config, run_dir):
    return [f for f in check_inputs(config, run_dir) if f.severity is not Severity.note]


def changed(folder, name, change):
    """A copy of a model directory's JSON file, changed."""
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def model_copy(models, tmp_path, name="teacher"):
    import shutil

    shutil.copytree(models / name, tmp_path / name)
    return tmp_path / name


def test_a_sound_run_has_no_finding_and_leaves_nothing_behind(config, tmp_path):
    run_dir = tmp_path / "run"
    assert found(config, run_dir) == []
    assert not run_dir.exists()


def test_everything_is_found_at_once(config, tmp_path):
    config.trainer.devices = 12
    config.model.tensor_model_parallel_size = 4
    config.model.pipeline_model_parallel_size = 3
    config.data.max_prompt_length = 3
    config.data.max_response_length = 120
    told = [str(f) for f in found(config, tmp_path)]
    assert len(told) == 7, told  # with the batch, mostly idle in three stages
    for who in ("student", "teacher"):
        layout = [line for line in told if line.startswith(f"error: layout of the {who}")]
        assert "is 4, which does not divide the 2 key-value heads" in layout[0]
        assert "is 3, which does not divide the 2 layers" in layout[1]
        limit = [line for line in told if f"128 positions of the {who}" in line]
        assert len(limit) == (1 if who == "teacher" else 0)
    assert any("1 of 1 student prompts are above data.max_prompt_length 3" in line for line in told)


def test_validation_that_the_context_limits_is_a_warning(config, models, tmp_path):
    assert not found(config, tmp_path), "nothing is evaluated while training"
    config.trainer.val_check_interval = 1
    config.data.validation_problems = str(models / "problems.jsonl")
    (finding,) = found(config, tmp_path)
    assert finding.severity is Severity.warning
    assert "is 30000 and the student's 128 positions leave 120 tokens" in finding.what
    config.evaluation.max_response_length = 120
    assert not found(config, tmp_path)


def test_padding_of_both_vocabularies_is_told(config, tmp_path):
    (note,) = [f for f in check_inputs(config, tmp_path) if f.severity is Severity.note]
    assert "60 rows of the student and 60 rows of the teacher" in note.what
    assert "both padded to 256" in note.what and "55 tokens" in note.what


def test_a_tokenizer_larger_than_the_embedding_is_an_error(config, models, tmp_path):
    folder = model_copy(models, tmp_path)
    changed(folder, "config.json", lambda c: c.update(vocab_size=50))
    config.teacher.hf_path = str(folder)
    (finding,) = found(config, tmp_path / "run")
    assert finding.where == "teacher.hf_path" and "ids up to 54" in finding.what
    assert "only 50 rows" in finding.what and finding.severity is Severity.error


def test_a_top_k_above_the_vocabulary_is_an_error(config, tmp_path):
    config.teacher.top_k = 56
    assert [f.where for f in found(config, tmp_path)] == ["teacher.top_k"]


def test_a_token_id_of_two_meanings_is_an_error(config, models, tmp_path):
    folder = model_copy(models, tmp_path)

    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["s7"], vocabulary["s8"] = vocabulary["s8"], vocabulary["s7"]

    changed(folder, "tokenizer.json", swap)
    config.teacher.hf_path = str(folder)
    (finding,) = found(config, tmp_path / "run")
    assert "2 token ids differ" in finding.what and "'s7' to the student" in finding.what
    assert finding.severity is Severity.error and "family" in finding.remedy


def test_special_tokens_ends_and_templates_that_differ_are_warnings(config, models, tmp_path):
    folder = model_copy(models, tmp_path)
    changed(folder, "tokenizer_config.json", lambda c: c.update(eos_token="s9", chat_template="x"))
    config.teacher.hf_path = str(folder)
    findings = found(config, tmp_path / "run")
    assert {f.severity for f in findings} == {Severity.warning}
    assert any("special to one of the two models only" in f.what for f in findings)
    assert any("the teacher also ends with 's9'" in f.what for f in findings)
    config.data.use_chat_template = True
    assert any("the student's tokenizer has no chat template" in f.what
               for f in found(config, tmp_path / "run"))  # fmt: skip
    config.student.hf_path, config.teacher.hf_path = str(folder), config.student.hf_path
    assert any("different chat templates" in f.what for f in found(config, tmp_path / "run"))


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_on_a_cpu_that_is_slow_in_it_is_a_warning(config, tmp_path, monkeypatch, fast):
    monkeypatch.setattr(model_checks, "computes_bf16", lambda: fast)
    config.trainer.precision = "bf16-mixed"
    told = [f.where for f in found(config, tmp_path)]
    assert told == ([] if fast else ["trainer.precision"])


def test_a_template_that_thinks_has_to_be_told_whether_to(config, models, tmp_path):
    folder = model_copy(models, tmp_path)
    template = (chat_templates.FOLDER / "qwen3_5_think.jinja").read_text()
    changed(folder, "tokenizer_config.json", lambda c: c.update(chat_template=template))
    config.student.hf_path = config.teacher.hf_path = str(folder)
    config.data.use_chat_template = True
    config.data.max_prompt_length, config.data.max_teacher_prompt_length = 100, 110
    config.data.max_response_length = 10
    config.references = ReferencesConfig(source=ReferenceSource.solution)
    told = [(f.where, f.what) for f in found(config, tmp_path / "run")]
    assert [where for where, _ in told] == ["data.chat_template_kwargs", "references.source"]
    assert "does not say enable_thinking" in told[0][1] and "never end" in told[1][1]
    config.data.chat_template_kwargs = {"enable_thinking": False}
    assert not found(config, tmp_path / "run")
    config.data.chat_template_kwargs = {"think": False}
    (finding,) = found(config, tmp_path / "run")
    assert finding.severity is Severity.error and "holds 'think', which the chat" in finding.what


@pytest.mark.parametrize("name", ["validation_problems", "forgetting_problems"])
def test_evaluated_prompts_are_limited_by_the_context_alone(config, tmp_path, name):
    rows = [{"id": "long", "problem": "s1 " * 60, "answer": "s3"}]
    path = tmp_path / "evaluated.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n")
    setattr(config.data, name, str(path))
    assert not found(config, tmp_path / "run"), "longer than data.max_prompt_length"
    path.write_text(json.dumps(rows[0] | {"problem": "s1 " * 128}) + "\n")
    (finding,) = found(config, tmp_path / "run")
    assert finding.where == f"data.{name}" and "has 128 tokens" in finding.what


def test_a_missing_solution_is_named_with_its_problem(config, models, tmp_path):
    config.data.problems = str(models / "unsolved.jsonl")
    (finding,) = found(config, tmp_path)
    assert "1 of 2 problems have no solution (p2)" in finding.what
    config.references = ReferencesConfig(source=ReferenceSource.solution)
    assert [f.where for f in found(config, tmp_path)] == [
        "teacher.privileged_context",
        "references.source",
    ]


@pytest.mark.parametrize("name", ["problems", "validation_problems", "forgetting_problems"])
def test_a_problem_file_that_cannot_be_read_is_named_by_its_key(config, tmp_path, name):
    (tmp_path / "broken.jsonl").write_text("{")
    setattr(config.data, name, str(tmp_path / "broken.jsonl"))
    (finding,) = found(config, tmp_path / "run")
    assert finding.where == f"data.{name}" and "broken.jsonl:1: not JSON" in finding.what


def test_models_that_cannot_be_read_are_found_once_each(config, tmp_path):
    config.student.hf_path, config.teacher.hf_path = "", str(tmp_path / "nowhere")
    findings = found(config, tmp_path)
    assert [f.where for f in findings] == ["student.hf_path"] + ["teacher.hf_path"] * 2


def test_stored_inputs_that_are_not_there_are_named(config, tmp_path):
    config.references = ReferencesConfig(source=ReferenceSource.file, path="no.jsonl")
    config.weights = WeightsConfig(pass_rates="no.parquet")
    assert [f.where for f in found(config, tmp_path)] == ["references.path", "weights.pass_rates"]


def test_stages_without_steps_and_other_runs_are_found(config, tmp_path):
    config.trainer.max_steps = 1
    assert [f.where for f in found(config, tmp_path)] == ["stages"]
    config.trainer.max_steps = 10
    (tmp_path / "data_fingerprint.json").write_text('{"other": "1"}')
    (finding,) = found(config, tmp_path)
    assert finding.where == "exp_manager.name" and "1 removed (other)" in finding.what


def test_uneven_batches_pass_and_mostly_empty_ones_are_told(config, tmp_path):
    config.model = ModelConfig(tensor_model_parallel_size=2, micro_batch_size=2)
    config.model.global_batch_size = 31  # 32 sequences
    assert found(config, tmp_path) == []
    config.model.global_batch_size = 3  # 4 sequences
    (finding,) = found(config, tmp_path)
    assert "leave 25% of them empty" in finding.what
    config.model = ModelConfig(pipeline_model_parallel_size=2, global_batch_size=2)
    (finding,) = found(config, tmp_path)
    assert "are idle 50% of the time" in finding.what


def test_recomputing_attention_alone_is_told_of_on_a_gpu(config, tmp_path, monkeypatch):
    config.model = ModelConfig(recompute_granularity=Recompute.selective)
    assert found(config, tmp_path) == [], "of a run on a CPU"
    config.trainer.accelerator = "auto"
    assert found(config, tmp_path) == [], "of a machine without a GPU"
    monkeypatch.setattr(model_checks, "_gpu_bytes", lambda: 80 * 2**30)
    (finding,) = found(config, tmp_path)
    assert finding.where == "model.recompute_granularity"
    assert "computes attention twice" in finding.what


def test_room_for_the_checkpoints_that_are_kept_and_one_more(config, tmp_path, monkeypatch):
    shape = Architecture.read(config.student.hf_path, "student.hf_path")
    each = files.checkpoint_bytes(shape, Precision.bf16)
    config.trainer.precision = "bf16"
    monkeypatch.setattr(model_checks, "computes_bf16", lambda: True)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(config.student.hf_path)
    assert each == 14 * sum(p.numel() for p in model.parameters())
    # 200 steps, one checkpoint in 100 steps: 2 kept of the 3 asked for, and one being written
    monkeypatch.setattr(files, "_free", lambda path: 3 * each)
    assert found(config, tmp_path) == []
    monkeypatch.setattr(files, "_free", lambda path: 3 * each - 1)
    (finding,) = found(config, tmp_path)
    assert finding.where == "exp_manager.exp_dir" and "2 kept and one being" in finding.what


def test_room_for_the_teacher_cache(config, tmp_path, monkeypatch):
    config.teacher = replace(config.teacher, top_k=4, cache_dir=str(tmp_path / "cache"))
    assert found(config, tmp_path) == []
    monkeypatch.setattr(files, "_free", lambda path: 10 if path.name == "cache" else 10**12)
    (finding,) = found(config, tmp_path)
    assert finding.where == "teacher.cache_dir" and finding.severity is Severity.warning


def test_a_gpu_that_is_too_small_is_a_warning(config, tmp_path, monkeypatch):
    config.trainer.accelerator = "auto"
    monkeypatch.setattr(model_checks, "_gpu_bytes", lambda: 80 * 2**30)
    assert found(config, tmp_path) == []
    monkeypatch.setattr(model_checks, "_gpu_bytes", lambda: 2**22)
    assert found(config, tmp_path) == [], "the server has a GPU of its own"
    beside = replace(
        config.rollout, placement=RolloutPlacement.colocated, gpu_memory_utilization=0.9
    )
    for small, rollout in ((2**22, beside), (2**16, config.rollout)):
        monkeypatch.setattr(model_checks, "_gpu_bytes", lambda small=small: small)
        (finding,) = found(replace(config, rollout=rollout), tmp_path)
        assert finding.where == "memory" and "nemo-paced plan" in finding.remedy


def test_a_logger_without_its_package_is_an_error(config, tmp_path, monkeypatch):
    asked = replace(config, exp_manager=ExpManagerSettings(create_wandb_logger=True))
    monkeypatch.setattr(loggers, "PACKAGES", {"create_wandb_logger": "no_such_package"})
    (one,) = found(asked, tmp_path / "run")
    assert one.severity is Severity.error and one.where == "exp_manager.create_wandb_logger"
    assert "pip install no_such_package" in one.remedy
    monkeypatch.setattr(loggers, "PACKAGES", {"create_wandb_logger": "json"})
    assert found(asked, tmp_path / "run") == []


def test_errors_refuse_and_warnings_do_not(capsys):
    refuse([warning("w", "is odd", "mend it"), Finding(Severity.note, "n", "is so")])
    assert capsys.readouterr().err == "warning: w: is odd; mend it\n"
    findings = [warning("w", "is odd"), error("e", "is wrong", "mend [it]")]
    with pytest.raises(PreflightFailed, match="1 error found"):
        refuse(findings)
    assert capsys.readouterr().err == "error: e: is wrong; mend [it]\nwarning: w: is odd\n"
    with pytest.raises(PreflightFailed) as told:
        refuse(findings, shown=False)
    assert str(told.value) == "" and capsys.readouterr().err == ""


def test_a_terminal_gets_a_table(capsys):
    from rich.console import Console

    console = Console(force_terminal=True, width=60, no_color=True)
    show([error("a.key", "is wrong [sic]", "mend it")], console)
    table = capsys.readouterr().out
    assert "remedy" in table and "a.key" in table and "[sic]" in table
