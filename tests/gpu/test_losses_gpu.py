"""The divergences on a GPU, at the vocabulary of a real model."""

import pytest
import torch

from nemo_paced.losses import adaptive_kl
from nemo_paced.losses.divergence import divergence, finish, solve
from nemo_paced.losses.kinds import Divergence
from nemo_paced.losses.options import Options
from tests.dense import KINDS, dense_divergence, make_logits

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB = 151936
INF = float("inf")


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 1023, 1024, 1025, 50257])
def test_rests_of_a_tile_and_rows_apart_match_dense_float64(kind, dtype, width):
    made = (torch.nn.functional.pad(z, (0, 3), value=50.0) for z in make_logits("random", 4, width))
    student, teacher = (logits.cuda().to(dtype)[:, :width] for logits in made)
    teacher += 47.0
    if width > 8:  # nothing in a thread's first load, and no student mass in the last column
        student[0, :8], teacher[0, :8] = -INF, -INF
        student[1, -1], teacher[1, -1] = -INF, -INF
    exact = student.double().clamp_min(-1e5).requires_grad_()
    dense = dense_divergence(exact, teacher.double().clamp_min(-1e5), kind)
    dense.sum().backward()
    student = student.detach().requires_grad_()
    loss = divergence(student, teacher, kind)
    loss.sum().backward()
    tolerance = 1e-4 if kind == "adaptive_kl" else 1e-5
    torch.testing.assert_close(loss.double(), dense, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        student.grad.double(),
        exact.grad,
        rtol=tolerance if dtype is torch.float32 else 2**-8,
        atol=tolerance * max(1.0, float(exact.grad.abs().max())),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_of_1e4_between_the_models_changes_nothing(kind):
    # logits that float32 represents together with the offset
    on_grid = [(logits.cuda() * 64).round() / 64 for logits in make_logits("random", 8, VOCAB)]
    results = []
    for offset in (0.0, 1e4):
        student = (on_grid[0] + offset).requires_grad_()
        loss = divergence(student, on_grid[1] - offset, kind)
        loss.sum().backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
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


def test_the_head_is_that_of_the_pytorch_search():
    student, teacher = (logits.cuda().bfloat16() for logits in make_logits("random", 64, VOCAB))
    from nemo_paced.losses import triton_adaptive_kl

    options = Options.of("adaptive_kl", (VOCAB, VOCAB), tp_group=None, vocab_size=None)
    numbers = finish(solve(student, teacher, options)).numbers
    gaps_2N, expected_2N = (
        module.head_tail_gaps(student, teacher, numbers, options)
        for module in (triton_adaptive_kl, adaptive_kl)
    )
    # tokens of one logit are many here; rounding may count a few more of them
    torch.testing.assert_close(gaps_2N, expected_2N, rtol=1e-4, atol=1e-5)
