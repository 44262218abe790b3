"""The main job with a teacher in FP8, as a user starts it."""

import json
import shutil

import pytest

from tests.jobs import command, metrics, run, train_arguments

pytestmark = pytest.mark.slow


def arguments(folder, name, *overrides):
    return train_arguments(
        folder,
        name,
        "trainer.max_steps=2",
        "weights.num_rollouts=2",
        "model.global_batch_size=8",
        "teacher.fp8.enabled=true",
        "teacher.fp8.certificate_problems=12",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        "teacher.fp8.max_kl=0.1",  # the tiny teacher's drift is about a tenth of it
        *overrides,
    )


def test_a_run_certifies_its_teacher_before_it_trains(tmp_path):
    """On stored responses, and where there are none on what the student samples first."""
    table = f"weights.pass_rates={tmp_path}/forward_kl/pass_rates.parquet"
    for schedule, responses, overrides in (
        ("forward_kl", "references", ()),
        ("reverse_kl", "rollouts", (table,)),
    ):
        options = arguments(tmp_path, schedule, f"schedule={schedule}", *overrides)
        out = run(*options)
        assert "FP8 teacher: mean KL" in out
        assert len(metrics(tmp_path, schedule)) == 2
        certificate = json.loads((tmp_path / schedule / "fp8_certificate.json").read_text())
        assert certificate["problems"] == 12 and certificate["tokens"] >= 12
        assert 0 < certificate["kl_mean"] < 0.1 and certificate["top1_agreement"] > 0.9
        assert certificate["divergence"] == schedule
        assert certificate["responses"] == responses
    path = tmp_path / "reverse_kl" / "fp8_certificate.json"
    measured = path.stat().st_mtime_ns
    last = tmp_path / "reverse_kl" / "checkpoints" / "step_00000002"
    shutil.rmtree(last)
    out = run(*options)
    assert "certified before" in out and "at step 1" in out and last.is_dir()
    shutil.rmtree(last)
    process = command(*options, "teacher.fp8.max_kl=1e-9")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2 and "the FP8 teacher has drifted" in out, out[-3000:]
    assert path.stat().st_mtime_ns == measured
