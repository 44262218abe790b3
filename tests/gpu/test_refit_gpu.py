"""Weights from a trainer on GPUs into vLLM on GPUs, over every transport; servers that sleep."""

import pytest
import torch

from nemo_paced.serving.backends import importable
from tests.refit_jobs import GPU_JOBS, check_job

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", GPU_JOBS)
def test_servers_hold_the_students_weights_and_sleep_while_it_trains(name, tmp_path):
    job = GPU_JOBS[name]
    if torch.cuda.device_count() < job.gpus:
        pytest.skip(f"needs {job.gpus} GPUs: trainer and servers have {torch.cuda.device_count()}")
    if "nccl_m2n" in name and not importable("nccl.m2n"):
        pytest.skip("needs the packages nccl-extensions and nccl4py")
    look = check_job(tmp_path, job)
    if job.sleeps:  # keys and values alone are most of rollout.gpu_memory_utilization=0.3
        total = torch.cuda.get_device_properties(0).total_memory
        assert look.freed > 0.15 * total, f"asleep it leaves {look.freed / 2**30:.1f} GiB more"
