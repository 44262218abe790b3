"""The divergences on a GPU, at the vocabulary of a real model."""

import pytest
import torch

from nemo_paced.losses.divergence import divergence
from nemo_paced.losses.kinds import Divergence
from tests.dense import KINDS, dense_divergence, make_logits

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB = 151936


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_match_dense_float64(kind, dtype, temperature):
    student, teacher = (logits.cuda().to(dtype) for logits in make_logits("random", 8, VOCAB))
    exact = student.double().requires_grad_()
    dense = dense_divergence(exact, teacher, kind, temperature=temperature)
    dense.sum().backward()
    student.requires_grad_()
    loss = divergence(student, teacher, Divergence(kind, temperature=temperature))
    loss.sum().backward()
    # adaptive: where the cumulative mass ends the head, float32 may count a token more or less
    tolerance = 1e-4 if kind == "adaptive_kl" else 1e-5
    torch.testing.assert_close(loss.double(), dense, rtol=tolerance, atol=tolerance)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(
        student.grad.double(),
        exact.grad,
        rtol=2**-8 if dtype is torch.bfloat16 else tolerance,
        atol=tolerance * float(exact.grad.abs().max()),
    )


# adaptive is left out: the search for its head goes over row blocks in PyTorch
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adaptive_kl"])
def test_no_float32_copy_of_the_vocabulary_is_made(kind):
    rows = 2048
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    student = torch.randn(rows, VOCAB, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(rows, VOCAB, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    divergence(student, teacher, kind).sum().backward()
    inputs_and_gradient = 3 * rows * VOCAB * 2
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= inputs_and_gradient + 0.25 * rows * VOCAB * 4


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_rows_beyond_2_31_elements_are_reached(kind):
    rows = 2**31 // VOCAB + 2
    student = torch.zeros(rows, VOCAB, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.zeros(rows, VOCAB, device="cuda", dtype=torch.bfloat16)
    teacher[-1, 5] = 9.0
    loss = divergence(student, teacher, kind)
    loss.sum().backward()
    assert loss[:-1].abs().max() < 1e-5
    assert loss[-1] > 1e-5
    # the student is to raise the token that the teacher raises
    assert student.grad[-1, 5] < 0
