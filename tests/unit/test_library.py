"""The code of docs/library.md for plain PyTorch and TRL, run as it stands."""

import json
import os
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch

from tests.dense import dense_divergence
from tests.documents import ROOT, python_of

PAGE = ROOT / "docs" / "library.md"
BLOCKS = python_of(PAGE)
KINDS = ("forward_kl", "reverse_kl")


@pytest.fixture(scope="module")
def plain():
    """What the section on plain PyTorch has defined and computed when it is through."""
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS["Plain PyTorch"]:
        exec(compile(block, PAGE, "exec"), names)
    return names


def in_float64(model):
    return deepcopy(model).double().train(False)


def dense_loss(student, teacher, sequences, kind):
    """(1/N) sum w_i sum_t D_it, one sequence at a time: prompt, teacher's prompt, response, w."""
    total = 0.0
    for prompt, teacher_prompt, response, weight in sequences:

        def logits(model, prompt, response=response):
            ids = torch.tensor([prompt + response])
            return model(ids).logits[0, len(prompt) - 1 : -1]

        per_token = dense_divergence(logits(student, prompt), logits(teacher, teacher_prompt), kind)
        total = total + weight * per_token.sum()
    return total / len(sequences)


def test_the_loss_of_the_plain_loop_goes_down_in_both_stages(plain):
    for losses in (plain["forward"], plain["reverse"]):
        assert all(np.isfinite(losses)) and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_plain_loop_equal_dense_float64(plain, kind):
    batch = [3, 30, 7, 19, 11, 2, 25]
    weights = [0.0 if i == 30 else 0.2 + 0.1 * i for i in range(len(plain["problems"]))]
    student, teacher = plain["student"], in_float64(plain["teacher"])
    student.zero_grad()
    loss = plain["backward"](batch, plain["references"], weights, kind, micro_batch_size=3)
    dense = in_float64(student)
    sequences = [
        (plain["prompts"][i], plain["teacher_prompts"][i], plain["references"][i], weights[i])
        for i in batch
    ]
    expected = dense_loss(dense, teacher, sequences, kind)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    largest = max(parameter.grad.abs().max() for parameter in dense.parameters())
    for own, wanted in zip(student.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), wanted.grad, rtol=1e-3, atol=1e-5 * largest)
    student.zero_grad()


def test_weights_of_the_page_are_the_kernel_of_counted_pass_rates(plain, monkeypatch):
    rolls = iter(range(8))
    problems, encode = plain["problems"], plain["tokenizer"].encode

    def sample(model, prompts):
        """Problem i is right in i % 9 of 8 rollouts."""
        roll = next(rolls)
        return [encode(p["answer"] if roll < i % 9 else "solve") for i, p in enumerate(problems)]

    monkeypatch.setitem(plain, "sample", sample)
    rates = np.arange(len(problems)) % 9 / 8
    kernel = rates * (1 - rates)
    np.testing.assert_allclose(plain["measured_weights"](), kernel / kernel.mean())


def test_a_student_in_the_midst_of_training_is_sampled_like_any_other(plain):
    student = deepcopy(plain["student"])
    torch.manual_seed(1)
    expected = plain["sample"](student, plain["prompts"])
    student.train()
    student.gradient_checkpointing_enable()
    torch.manual_seed(1)
    assert plain["sample"](student, plain["prompts"]) == expected


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """What :func:`run_trl` found, in a process of its own: TRL changes transformers for good."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.unit.test_library import run_trl; run_trl()"],
        cwd=tmp_path_factory.mktemp("trl"), capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
             "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def run_trl():
    """Run TRL's section after what it follows; its steps, what the first had to be, as JSON."""
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS["Plain PyTorch"][:2]:
        exec(compile(block, PAGE, "exec"), names)
    student, teacher = in_float64(names["student"]), in_float64(names["teacher"])
    prompts = names["prompts"]
    # its teacher sees the student's prompts
    sequences = list(zip(prompts, prompts, names["references"], names["weights"], strict=True))
    loss = dense_loss(student, teacher, sequences, "forward_kl")
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    (block,) = BLOCKS["TRL"]
    exec(compile(block, PAGE, "exec"), names)
    found = {key: names[key] for key in ("forward", "reverse")}
    print()  # behind whatever wrote last
    print(json.dumps({**found, "loss": loss.item(), "norm": norm.item()}))


def test_the_loss_of_the_trl_trainer_goes_down_in_both_stages(trl):
    for stage in ("forward", "reverse"):
        losses = [step["loss"] for step in trl[stage]]
        assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]


def test_a_step_of_the_trl_trainer_equals_dense_float64(trl):
    """Its four micro-batches hold all problems, in whatever order."""
    first = trl["forward"][0]
    assert first["loss"] == pytest.approx(trl["loss"], rel=1e-4)
    assert first["grad_norm"] == pytest.approx(trl["norm"], rel=1e-3)


def test_losses_and_weights_need_no_megatron_and_no_settings_file():
    code = (
        "import sys; from nemo_paced.config import WeightsConfig; "
        "from nemo_paced.losses import linear_divergence, topk; "
        "from nemo_paced.weights import schemes; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv)))"
    )
    others = ("megatron", "nemo", "transformers", "omegaconf", "hydra", "vllm", "pandas")
    done = subprocess.run(
        [sys.executable, "-c", code, *others], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[]\n", done.stderr
