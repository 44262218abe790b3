import pytest
import torch

from nemo_paced.losses.linear_divergence import linear_divergence
from tests.dense import KINDS, dense_divergence, of_kind

V, VALID, H, H_TEACHER = 61, 55, 16, 24


def make_inputs(num_tokens, dtype=torch.float32, scale=1.0):
    """Student hidden, student head, teacher hidden, teacher head, token weights."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) * scale**0.5).to(dtype)

    heads = normal(num_tokens, H), normal(V, H), normal(num_tokens, H_TEACHER)
    weights = torch.rand(num_tokens, generator=generator)
    weights[::4] = 0
    return (*heads, normal(V, H_TEACHER), weights)


def value_and_gradients(inputs, kind, factor=3.0, **options):
    hidden, head, teacher_hidden, teacher_head, weights = inputs
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    kind, options = of_kind(kind, options)
    loss, per_token = linear_divergence(
        hidden, head, teacher_hidden, teacher_head, kind, weights, return_per_token=True, **options
    )
    (loss * factor).backward()
    return loss.detach(), per_token, hidden.grad, head.grad


def dense_value_and_gradients(inputs, kind, factor=3.0, vocab_size=V, **options):
    hidden, head, teacher_hidden, teacher_head, weights = (x.double() for x in inputs)
    hidden.requires_grad_()
    head.requires_grad_()
    student, teacher = hidden @ head.t(), teacher_hidden @ teacher_head.t()
    per_token = dense_divergence(
        student[..., :vocab_size], teacher[..., :vocab_size], kind, **options
    )
    loss = (per_token * weights).sum()
    (loss * factor).backward()
    return loss.detach(), per_token.detach(), hidden.grad, head.grad


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("loss", "per token", "hidden", "head"), actual, expected, strict=True):
        bound = tolerance * max(1.0, float(e.abs().max())) if e.numel() else 0.0
        torch.testing.assert_close(a.double(), e, rtol=0, atol=bound, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("kind", KINDS)
# peaked: GEMMs in float32 round logits of hundreds by 2e-5
@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 2e-6), (12.0, 6e-5)])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "vocab_size": VALID}])
def test_value_and_gradients_match_dense_float64(kind, scale, tolerance, options):
    inputs = make_inputs(13, scale=scale)
    actual = value_and_gradients(inputs, kind, chunk_size=4, **options)
    assert_close(actual, dense_value_and_gradients(inputs, kind, **options), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_close_as_its_logits_allow(kind):
    inputs = make_inputs(13, torch.bfloat16)
    actual = value_and_gradients(inputs, kind, chunk_size=5)
    assert actual[2].dtype == actual[3].dtype == torch.bfloat16
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert_close(actual, dense_value_and_gradients(inputs, kind), 4e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 13, 100, None])
def test_the_chunk_size_changes_only_rounding(kind, chunk_size):
    inputs = make_inputs(13)
    expected = value_and_gradients(inputs, kind, chunk_size=4)
    actual = value_and_gradients(inputs, kind, chunk_size=chunk_size)
    assert_close(actual, [e.double() for e in expected], 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_loss_and_no_gradient(kind):
    hidden, head, _, _, weights = make_inputs(9)
    results = value_and_gradients((hidden, head, hidden, head, weights), kind, chunk_size=4)
    assert all(float(r.abs().max()) < 2e-6 for r in results)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_one_token_and_no_token(num_tokens):
    inputs = make_inputs(num_tokens)
    actual = value_and_gradients(inputs, "reverse_kl")
    assert_close(actual, dense_value_and_gradients(inputs, "reverse_kl"), 2e-6)


def test_tokens_may_have_several_axes():
    hidden, head, teacher_hidden, teacher_head, weights = make_inputs(12)
    flat = value_and_gradients((hidden, head, teacher_hidden, teacher_head, weights), "jsd")
    shaped = (hidden.view(3, 4, -1), head, teacher_hidden.view(3, 4, -1), teacher_head)
    loss, per_token, grad, _ = value_and_gradients((*shaped, weights.view(3, 4)), "jsd")
    assert per_token.shape == (3, 4) and grad.shape == (3, 4, H)
    torch.testing.assert_close(loss, flat[0])


def test_a_token_of_weight_zero_has_no_gradient():
    inputs = make_inputs(9)
    grad = value_and_gradients(inputs, "forward_kl")[2]
    assert (grad[inputs[4] == 0] == 0).all() and (grad[inputs[4] > 0] != 0).any(1).all()


def test_only_what_asks_for_a_gradient_gets_one():
    hidden, head, teacher_hidden, teacher_head, weights = make_inputs(5)
    teacher_head.requires_grad_()
    loss = linear_divergence(
        hidden.requires_grad_(), head, teacher_hidden, teacher_head, "forward_kl", weights
    )
    loss.backward()
    assert hidden.grad is not None and head.grad is None and teacher_head.grad is None
    with torch.no_grad():
        alone = linear_divergence(hidden, head, teacher_hidden, teacher_head, "forward_kl", weights)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, loss.detach())


def test_a_second_backward_raises_instead_of_scaling_twice():
    hidden, *rest, weights = make_inputs(5)
    loss = linear_divergence(hidden.requires_grad_(), *rest, "forward_kl", weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over by a first backward"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"token_weights": torch.ones(4)}, r"token axes .* differ: \(5,\), \(5,\), \(4,\)"),
        ({"student_weight": torch.ones(V, H + 1)}, "student_hidden is 16 wide"),
        ({"teacher_weight": torch.ones(V + 3, H_TEACHER)}, "give vocab_size"),
        ({"vocab_size": V + 1}, f"within the {V} columns"),
    ],
)
def test_misfits_are_named(change, told):
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    arguments = dict(zip((*names, "token_weights"), make_inputs(5), strict=True))
    with pytest.raises(ValueError, match=told):
        linear_divergence(kind="forward_kl", **{**arguments, **change})
