"""Training steps on GPUs: Transformer Engine's layers, packing, recomputation, context parallelism.

bf16 on a GPU against fp32 on the CPU: the steps agree to bf16's rounding, whatever the layout.
"""

from dataclasses import replace

import pytest
import torch

from nemo_paced.config import OptimBackend, OptimConfig, Recompute, TeacherPlacement
from nemo_paced.parallel import groups
from nemo_paced.quickstart.models import VOCABULARY, write_tokenizer
from nemo_paced.teacher.build import serve_teacher
from nemo_paced.teacher.placement import HostCopy
from nemo_paced.training.setup import build_models
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import (
    LAYOUTS,
    LR,
    STAGES,
    STEPS,
    make_config,
    make_items,
    train_steps,
)
from tests.tiny import make_hf_model

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ONE, PACKED = (1, 1, 1, 2, False), (1, 1, 1, 1, False)
# GPUs, layout, settings of the `model` block, of the `teacher` block
CASES = {
    "padded": (1, ONE, {}, {}),
    "packed": (1, PACKED, {"packed_sequence_size": 48}, {}),
    "recompute": (1, ONE, {"recompute_granularity": Recompute.full}, {}),
    "recompute attention": (1, ONE, {"recompute_granularity": Recompute.selective}, {}),
    "torch's Adam": (1, ONE, {"optim": OptimConfig(lr=LR, backend=OptimBackend.torch)}, {}),
    "offloaded": (1, ONE, {}, {"placement": TeacherPlacement.offloaded}),
    "tp2 sp": (2, (2, 1, 2, 2, True), {}, {}),
    "pp2": (2, (1, 2, 2, 2, False), {}, {}),
    "cp2": (2, (1, 1, 2, 2, False), {"context_parallel_size": 2}, {}),
    "cp2 packed": (
        2,
        (1, 1, 2, 1, False),
        {"context_parallel_size": 2, "packed_sequence_size": 48},
        {},
    ),
    "separate": (2, ONE, {}, {"placement": TeacherPlacement.separate, "separate_ranks": 1}),
}


def train_on_gpus(rank, world_size, folder, case):
    _, layout, model, teacher = CASES[case]
    config = make_config(folder, layout, model=model, devices=world_size, **teacher)
    config = replace(config, trainer=replace(config.trainer, accelerator="gpu", precision="bf16"))
    parallel = groups.initialize(
        config.model,
        accelerator="gpu",
        timeout_s=120,
        teacher=config.teacher_model,
        separate_ranks=config.teacher.separate_ranks,
    )
    if parallel.link is not None and parallel.link.is_teacher:
        serve_teacher(config, parallel)
        return None
    models = build_models(config, parallel)
    results = [models.step(make_items(s), STAGES["forward_kl"], LR) for s in range(STEPS)]
    if models.step.teacher.remote is not None:
        models.step.teacher.remote.close()
    return [(r.loss, r.grad_norm) for r in results]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    # head dimensions that Transformer Engine's attention takes
    for name, seed in (("student", 0), ("teacher", 1)):
        make_hf_model("qwen3", folder / name, seed=seed, vocab_size=len(VOCABULARY) + 3)
        write_tokenizer(folder / name)
    return folder


@pytest.fixture(scope="module")
def on_cpu(models):
    return run_ranks(1, train_steps, str(models), LAYOUTS["tp1"], "forward_kl")[0][0]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_cpu_to_the_rounding_of_bf16(models, on_cpu, case):
    gpus = CASES[case][0]
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    results = run_ranks(gpus, train_on_gpus, str(models), case, timeout_s=300)
    for losses in [each for each in results if each is not None]:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(on_cpu), rtol=0.05, atol=0.02)


def test_a_model_in_host_memory_comes_back_while_it_computes():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    model = torch.nn.Sequential(torch.nn.Linear(2048, 2048, device="cuda").bfloat16(), *layers)
    model.requires_grad_(False)
    x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    expected = model(x)
    size = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    host = HostCopy(model, layers)
    assert host.nbytes == size and host._host.is_pinned()
    for _ in range(3):
        host.leave_device()
        assert before - torch.cuda.memory_allocated() >= 0.99 * size
        other = torch.full((size,), 255, dtype=torch.uint8, device="cuda")  # in the freed memory
        del other
        host.enter_device()
        assert torch.equal(model(x), expected)
