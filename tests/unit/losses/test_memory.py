"""Peak memory in U = one float32 [N, v]; tensors counted by a tracker of live storages."""

import pytest
import torch

from benchmarks.memory import track_peak
from nemo_paced.losses.divergence import divergence
from nemo_paced.losses.linear_divergence import HiddenTeacher, linear_divergence, linear_loss
from nemo_paced.losses.options import Options
from nemo_paced.losses.topk import TopKTeacher, topk_divergence
from nemo_paced.losses.vocab_parallel import CACHE_ELEMENTS
from tests.dense import KINDS

N, V = 128, 20_000
U = N * V * 4


def row_blocks_bytes():
    """The few buffers of a row block, or adaptive KL's histogram of 2,048 numbers a token."""
    rows = -(-CACHE_ELEMENTS // V) * torch.get_num_threads()
    return 7 * rows * V * 4


def test_the_tracker_sees_what_is_held_and_what_is_gone():
    held = torch.empty(1000)
    with track_peak() as peak:
        for _ in range(5):
            torch.exp(held)
        assert peak.bytes == 4000
        kept = [torch.exp(held) for _ in range(3)]
        assert peak.bytes == peak.live == 12_000 and len(kept) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_holds_no_float32_copy_of_the_vocabulary(kind, dtype):
    student = torch.randn(N, V).to(dtype).requires_grad_()
    teacher = torch.randn(N, V).to(dtype)
    with track_peak() as peak:
        loss = divergence(student, teacher, kind, chunk_size=2)
        # adaptive KL's histogram has 2,048 numbers a token, whatever the vocabulary
        assert peak.bytes <= (0.25 if kind != "adaptive_kl" else 0.4) * U
        assert peak.live <= 0.01 * U, "kept for backward: a few numbers a token"
        loss.sum().backward()
    gradient = N * V * student.element_size()
    assert peak.bytes <= gradient + 0.25 * U
    assert student.grad.dtype == dtype


def test_top_k_holds_no_float32_copy_of_the_vocabulary():
    student, teacher = torch.randn(N, V).requires_grad_(), torch.randn(N, V)
    with track_peak() as peak:
        top = TopKTeacher.from_logits(teacher, 16)
        topk_divergence(student, top, "forward_kl").sum().backward()
    assert peak.bytes <= U + row_blocks_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_linear_divergence_holds_the_logits_of_one_chunk_whatever_the_number_of_tokens(kind):
    h, chunk = 8, 64

    def peak_of(num_tokens):
        student, teacher = (torch.randn(num_tokens, h).requires_grad_() for _ in range(2))
        head, teacher_head = torch.randn(V, h).requires_grad_(), torch.randn(V, h)
        weights = torch.rand(num_tokens)
        with track_peak() as peak:
            linear_divergence(
                student, head, teacher, teacher_head, kind, weights, chunk_size=chunk
            ).backward()
        # gradients of the inputs, not of the implementation's making
        return peak.bytes - head.numel() * 4 - student.numel() * 4

    few, many = peak_of(2 * chunk), peak_of(12 * chunk)
    # of the teacher those of half a chunk
    assert few <= 1.5 * chunk * V * 4 + row_blocks_bytes()
    assert many <= few + 0.002 * 12 * chunk * V * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [None, torch.arange(N)])
def test_with_a_main_grad_the_head_has_no_other_gradient(dtype, targets):
    h, chunk = 512, 16
    student, head, teacher, teacher_head = (torch.randn(n, h).to(dtype) for n in (N, V, N, V))
    head.requires_grad_().main_grad = torch.zeros(V, h)
    with track_peak() as peak:
        loss = linear_loss(
            student.requires_grad_(),
            head,
            HiddenTeacher(teacher, teacher_head),
            torch.ones(N),
            Options.of("forward_kl", (V, V), tp_group=None, vocab_size=None, block_rows=2),
            chunk_size=chunk,
            targets_N=targets,
            gradient_scale=torch.ones(()),
        ).loss
        loss.backward()
    size = head.element_size()
    # a CPU has no product from 16 bits into float32
    product = head.numel() * size if dtype is torch.bfloat16 else 0
    logits = chunk * V * size + max(product, chunk // 2 * V * size)
    assert peak.bytes <= student.numel() * size + logits + 7 * 2 * V * 4
    assert head.main_grad.abs().max() > 0


def test_without_gradients_linear_divergence_keeps_nothing():
    inputs = torch.randn(64, 8), torch.randn(V, 8), torch.randn(64, 8), torch.randn(V, 8)
    with track_peak() as peak:
        loss = linear_divergence(*inputs, "forward_kl", torch.ones(64), chunk_size=8)
        assert peak.live <= 10_000
    assert loss.isfinite()
