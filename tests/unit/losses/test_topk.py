import pytest
import torch

from nemo_paced.config import Precision
from nemo_paced.losses.divergence import divergence
from nemo_paced.losses.topk import TopKTeacher, topk_divergence
from nemo_paced.teacher.kind import SignalKind
from tests.dense import KINDS, dense_divergence, make_logits, of_kind

N, V, VALID, K = 11, 61, 55, 7
BOUNDED = [kind for kind in KINDS if kind != "adaptive_kl"]


def dense_outcomes(logits, ids, temperature=1.0):
    """Log-probabilities of the tokens of ``ids`` and of all others together, float64."""
    p = torch.softmax(logits.double() / temperature, -1)
    rest = p.scatter(1, ids, 0.0).sum(1, keepdim=True)
    return torch.cat([p.gather(1, ids), rest], 1).log()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["random", "bf16", "offset"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_match_dense_float64_on_the_merged_outcomes(kind, case, temperature):
    student, teacher = make_logits(case, N, V)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1))
    options = {"temperature": temperature, "vocab_size": VALID}
    top = TopKTeacher.from_logits(teacher, K, **options)
    student = student.clone().requires_grad_()
    of_temperature, others = of_kind(kind, options)
    loss = topk_divergence(student, top, of_temperature, **others)
    (loss * weights).sum().backward()

    dense = student.detach().double().requires_grad_()
    ids = top.ids.long()
    expected = dense_divergence(
        dense_outcomes(dense[:, :VALID], ids, temperature),
        dense_outcomes(teacher[:, :VALID], ids, temperature),
        kind,
    )
    (expected * weights).sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    tolerance = 5e-3 if case == "bf16" else 2e-6
    torch.testing.assert_close(student.grad.double(), dense.grad, rtol=0, atol=tolerance)


def test_the_top_is_the_likeliest_tokens_and_the_rest_the_remaining_mass():
    _, teacher = make_logits("random", N, V)
    top = TopKTeacher.from_logits(teacher, K, vocab_size=VALID)
    p = torch.softmax(teacher[:, :VALID].double(), -1)
    expected = p.topk(K, dim=1)
    assert torch.equal(top.ids.long(), expected.indices)
    torch.testing.assert_close(top.log_probs.double(), expected.values.log())
    mass = top.log_probs.exp().sum(1) + top.tail_log_prob.exp()
    torch.testing.assert_close(mass, torch.ones(N))


@pytest.mark.parametrize("kind", BOUNDED)
def test_it_is_a_lower_bound_that_grows_with_k_to_the_full_divergence(kind):
    student, teacher = make_logits("random", 200, V)
    full = divergence(student, teacher, kind)
    below = torch.zeros_like(full)
    for k in (1, 4, 16, V):
        value = topk_divergence(student, TopKTeacher.from_logits(teacher, k), kind)
        assert (value <= full + 1e-6).all() and (value >= below - 1e-6).all()
        below = value
    torch.testing.assert_close(below, full, rtol=1e-5, atol=1e-6)


def test_student_mass_outside_of_the_top_costs():
    """What a top-k renormalised on both sides does not see."""
    teacher = torch.tensor([[8.0, 7.0, 0.0, 0.0]])
    same_within = torch.tensor([[8.0, 7.0, 9.0, 9.0]])
    top = TopKTeacher.from_logits(teacher, 2)
    assert topk_divergence(same_within, top, "forward_kl") > 0.5
    student = same_within.requires_grad_()
    topk_divergence(student, top, "forward_kl").sum().backward()
    assert (student.grad[0, 2:] > 0).all() and (student.grad[0, :2] < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_confident_pair_stays_finite_and_exact(kind):
    """The tail's mass is 1e-20: one minus the top's would be 0 or rounding noise."""
    student, teacher = torch.zeros(1, 40), torch.zeros(1, 40)
    student[0, 0], teacher[0, 0] = 45.0, 50.0
    top = TopKTeacher.from_logits(teacher, 1)
    assert top.tail_log_prob.item() == pytest.approx(-50 + torch.tensor(39.0).log().item())
    student.requires_grad_()
    loss = topk_divergence(student, top, kind)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()


def test_minus_infinity_and_a_whole_vocabulary_on_top_are_no_tail():
    teacher = torch.randn(3, 8)
    teacher[:, 5:] = float("-inf")
    for k in (5, 8):
        top = TopKTeacher.from_logits(teacher, k)
        student = torch.randn(3, 8).requires_grad_()
        loss = topk_divergence(student, top, "forward_kl")
        loss.sum().backward()
        expected = divergence(student.detach(), teacher, "forward_kl")
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
        assert student.grad.isfinite().all()


def test_bytes_per_token_are_those_of_the_tensors():
    top = TopKTeacher.from_logits(torch.randn(5, 100), 64)
    held = [top.log_probs, top.ids, top.tail_log_prob]
    of_a_token = sum(x.numel() * x.element_size() for x in held) / 5
    assert SignalKind(64, 1.0, 100).bytes_per_token(32, 2) == of_a_token == 64 * 8 + 4
    hidden = torch.zeros(1, 32, dtype=torch.bfloat16)
    assert SignalKind(0, 1.0, 100).bytes_per_token(32, Precision.bf16.itemsize) == hidden.nbytes
    assert Precision.fp32.itemsize == torch.float32.itemsize


def test_the_signal_of_no_token_is_empty():
    """As of a micro-batch that fills up a data-parallel rank's share."""
    top = TopKTeacher.from_hidden(torch.zeros(0, 8), torch.ones(V, 8), K, chunk_size=4)
    assert top.log_probs.shape == top.ids.shape == (0, K)
    assert top.tail_log_prob.shape == (0,)


@pytest.mark.parametrize("k", [0, 56])
def test_an_impossible_k_is_named(k):
    with pytest.raises(ValueError, match=f"k is {k}"):
        TopKTeacher.from_logits(torch.randn(2, V), k, vocab_size=VALID)
