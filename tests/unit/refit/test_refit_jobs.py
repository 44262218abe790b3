"""The GPU tests' jobs could start: a setting, route or flag that was renamed shows here already."""

import inspect

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.rl.online import api_router
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics import loggers

from nemo_paced.errors import ConfigError
from nemo_paced.preflight import servers
from nemo_paced.preflight.checks import check_inputs
from nemo_paced.preflight.findings import Severity
from nemo_paced.serving import backends, replicas, vllm_engine
from tests import refit_jobs
from tests.refit_jobs import CPU_JOBS, GPU_JOBS, composed


def on_gpus(monkeypatch, count):
    """As on a machine with so many GPUs and every package; nothing is started."""
    monkeypatch.setattr(backends, "importable", lambda package: True)
    for module in (servers, replicas, vllm_engine):
        monkeypatch.setattr(module, "gpu_count", lambda: count)


def errors(config, folder):
    found = check_inputs(config, folder / "run")
    return [str(finding) for finding in found if finding.severity is Severity.error]


def servers_of(config, folder):
    return replicas.Replicas(
        config.student.hf_path,
        config.rollout,
        max_model_len=32,
        dtype="bfloat16",
        log_path=folder / "server.log",
        trainer_gpus=config.trainer.devices,
    )


@pytest.mark.parametrize("name", GPU_JOBS)
def test_a_gpu_job_passes_every_check_with_its_number_of_gpus(monkeypatch, tmp_path, name):
    job = GPU_JOBS[name]
    config = composed(tmp_path, job)
    on_gpus(monkeypatch, job.gpus)
    assert errors(config, tmp_path) == []
    assert config.trainer.accelerator == "gpu" and config.is_on_policy
    assert config.trainer.compute_precision.value in refit_jobs.TOLERANCE
    served = servers_of(config, tmp_path)
    assert served.backend is config.rollout.refit and served.sleep == job.sleeps
    parser = make_arg_parser(FlexibleArgumentParser())
    for one in served.sidecars.values():
        command = one.engine.command(one.served)
        known = parser.parse_args(command[command.index("-m") + 2 :])
        assert known.enable_sleep_mode == job.sleeps
    if not job.sleeps:
        on_gpus(monkeypatch, job.gpus - 1)
        with pytest.raises(ConfigError, match="beside the trainer's"):
            servers_of(config, tmp_path)


@pytest.mark.parametrize("name", CPU_JOBS)
def test_a_cpu_job_is_of_the_same_kind(tmp_path, name):
    config = composed(tmp_path, CPU_JOBS[name])
    assert config.trainer.accelerator == "cpu" and config.is_on_policy
    assert errors(config, tmp_path) == []


def test_what_the_jobs_ask_a_server_for_is_in_vllm():
    assert '"/is_paused"' in inspect.getsource(api_router)
    source = inspect.getsource(loggers)
    assert '"vllm:engine_sleep_state"' in source and '"weights_offloaded"' in source
