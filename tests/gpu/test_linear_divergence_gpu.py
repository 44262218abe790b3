"""The loss fused with the LM head on a GPU: its gradients, and its memory at a real size."""

import pytest
import torch

from nemo_paced.losses.linear_divergence import HiddenTeacher, linear_loss
from nemo_paced.losses.options import Options
from tests.dense import KINDS, dense_divergence

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB = 151936


def make_inputs(tokens, width, teacher_width):
    """Student hidden, student head, teacher hidden, teacher head, with logits of deviation 3."""
    generator = torch.Generator("cuda").manual_seed(2)

    def normal(rows, columns, deviation):
        values = torch.randn(rows, columns, generator=generator, device="cuda")
        return values.mul_(deviation).bfloat16()

    return (
        normal(tokens, width, 1.0).requires_grad_(),
        normal(VOCAB, width, 3 / width**0.5).requires_grad_(),
        normal(tokens, teacher_width, 1.0),
        normal(VOCAB, teacher_width, 3 / teacher_width**0.5),
    )


def run(inputs, kind, *, factor, into_main_grad, chunk_size=None, targets=None):
    hidden, head, teacher_hidden, teacher_head = inputs
    scale = torch.full((), factor, device="cuda")
    result = linear_loss(
        hidden,
        head,
        HiddenTeacher(teacher_hidden, teacher_head),
        torch.linspace(0, 1, len(hidden), device="cuda"),
        Options.of(kind, (VOCAB, VOCAB), tp_group=None, vocab_size=None),
        chunk_size=chunk_size,
        targets_N=targets,
        gradient_scale=scale if into_main_grad else None,
    )
    (result.loss * scale).backward()
    return result


@pytest.mark.parametrize("into_main_grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_as_close_to_float64_as_bfloat16_logits_allow(kind, into_main_grad):
    inputs = make_inputs(96, 256, 384)
    hidden, head, teacher_hidden, teacher_head = inputs
    head.main_grad = torch.zeros_like(head, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    student, teacher = exact[0] @ exact[1].t(), teacher_hidden.double() @ teacher_head.double().t()
    per_token = dense_divergence(student, teacher, kind)
    weights = torch.linspace(0, 1, 96, device="cuda", dtype=torch.float64)
    ((per_token * weights).sum() * 3.0).backward()
    targets = torch.arange(96, device="cuda") * 1500
    # chunks of 40 tokens: the last one is shorter, and so is its last part
    options = {"factor": 3.0, "into_main_grad": into_main_grad, "chunk_size": 40}
    result = run(inputs, kind, targets=targets, **options)
    log_probs = student.detach().log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(result.target_log_probs_N.double(), log_probs, rtol=0, atol=0.06)
    torch.testing.assert_close(
        result.per_token_N.double(), per_token.detach(), rtol=0.03, atol=0.03
    )
    found = hidden.grad, head.main_grad if into_main_grad else head.grad
    assert (head.grad is None) == into_main_grad
    for gradient, leaf in zip(found, exact, strict=True):
        assert (gradient.double() - leaf.grad).norm() < 0.03 * leaf.grad.norm()


@pytest.mark.parametrize("into_main_grad", [False, True])
def test_the_peak_is_that_of_the_logits_of_a_chunk(into_main_grad):
    tokens, width = 8192, 2048
    inputs = make_inputs(tokens, width, 4096)
    head = inputs[1]
    if into_main_grad:
        head.main_grad = torch.zeros_like(head, dtype=torch.float32)
    run(inputs, "forward_kl", factor=1.0, into_main_grad=into_main_grad, chunk_size=128)
    inputs[0].grad = head.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs, "forward_kl", factor=1.0, into_main_grad=into_main_grad)
    peak = torch.cuda.max_memory_allocated() - before
    unit = 4 * tokens * VOCAB
    # else the head's gradient in float32 is a quarter of it
    assert peak <= (0.2 if into_main_grad else 0.46) * unit
