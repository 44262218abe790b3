"""The loss fused with the LM head: against dense float64, its matrix products, its main_grad."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_paced.losses.chunks import tokens_of_chunk, tokens_of_part
from nemo_paced.losses.kinds import Divergence
from nemo_paced.losses.linear_divergence import (
    HiddenTeacher,
    TopKChunks,
    linear_divergence,
    linear_loss,
)
from nemo_paced.losses.options import Options
from nemo_paced.losses.topk import TopKTeacher
from tests.dense import KINDS, dense_divergence, of_kind

V, VALID, H, H_TEACHER = 61, 55, 16, 24


def make_inputs(num_tokens, dtype=torch.float32, scale=1.0, seed=3):
    """Student hidden, student head, teacher hidden, teacher head, token weights."""
    generator = torch.Generator().manual_seed(seed)

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
    # a draw whose rounding is 7e-7 in float32; of others, up to 4e-6, as plain PyTorch's is
    inputs = make_inputs(13, scale=scale, seed=1)
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
    inputs = (hidden.requires_grad_(), *rest)
    loss = linear_divergence(*inputs, kind="forward_kl", token_weights=weights)
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


def loss_into_main_grad(hidden, head, inputs, kind, factor, chunk_size=4):
    """As a trainer has it that knows the factor ahead."""
    _, _, teacher_hidden, teacher_head, weights = inputs
    options = Options.of(kind, (V, V), tp_group=None, vocab_size=None)
    result = linear_loss(
        hidden,
        head,
        HiddenTeacher(teacher_hidden, teacher_head),
        weights,
        options,
        chunk_size=chunk_size,
        gradient_scale=torch.tensor(factor),
    )
    return result.loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_main_grad_is_added_to_in_place(kind):
    batches = [make_inputs(13), make_inputs(6)]
    head = batches[0][1].clone().requires_grad_()
    head.main_grad = torch.full((V, H), 0.5)
    place, expected = head.main_grad.data_ptr(), head.main_grad.clone()
    for inputs in batches:
        inputs = (inputs[0], head.detach(), *inputs[2:])
        hidden = inputs[0].clone().requires_grad_()
        loss = loss_into_main_grad(hidden, head, inputs, kind, 3.0)
        (loss * 3.0).backward()
        _, _, hidden_grad, head_grad = value_and_gradients(inputs, kind, chunk_size=4)
        expected += head_grad
        torch.testing.assert_close(hidden.grad, hidden_grad, rtol=1e-6, atol=2e-6)
    assert head.grad is None and head.main_grad.data_ptr() == place
    torch.testing.assert_close(head.main_grad, expected, rtol=1e-6, atol=2e-6)


def test_another_factor_than_the_announced_one_raises():
    inputs = make_inputs(5)
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    head.main_grad = torch.zeros(V, H)
    loss = loss_into_main_grad(hidden, head, inputs, "forward_kl", 3.0)
    with pytest.raises(RuntimeError, match="another factor than gradient_scale"):
        (loss * 2.0).backward()


def test_without_a_gradient_the_main_grad_is_left_alone():
    inputs = make_inputs(5)
    head = inputs[1].clone().requires_grad_()
    head.main_grad = torch.zeros(V, H)
    with torch.no_grad():
        loss_into_main_grad(inputs[0], head, inputs, "forward_kl", 3.0)
    assert not head.main_grad.any()


@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_targets_are_those_at_temperature_1(temperature, top_k):
    hidden, head, teacher_hidden, teacher_head, weights = make_inputs(13, scale=3.0)
    teacher = HiddenTeacher(teacher_hidden, teacher_head)
    if top_k:
        logits = teacher_hidden @ teacher_head.t()
        options = {"temperature": temperature, "vocab_size": VALID}
        teacher = TopKChunks(TopKTeacher.from_logits(logits, top_k, **options))
    targets = torch.arange(13) * 4
    result = linear_loss(
        hidden.requires_grad_(),
        head,
        teacher,
        weights,
        Options.of(
            Divergence("forward_kl", temperature=temperature),
            (V, V),
            tp_group=None,
            vocab_size=VALID,
        ),
        chunk_size=4,
        targets_N=targets,
    )
    exact = (hidden.detach().double() @ head.double().t())[:, :VALID].log_softmax(1)
    expected = exact.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(result.target_log_probs_N.double(), expected, rtol=0, atol=2e-5)


class Products(TorchDispatchMode):
    """Counts matrix products and their multiply-adds."""

    def __init__(self):
        super().__init__()
        self.calls, self.multiply_adds = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.calls[func.overloadpacket._qualified_op_name] += 1
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def test_four_products_are_taken_and_none_twice():
    hidden, head, teacher_hidden, teacher_head, weights = make_inputs(13)
    hidden.requires_grad_()
    head.requires_grad_()
    with Products() as products:
        linear_divergence(
            hidden, head, teacher_hidden, teacher_head, "jsd", weights, chunk_size=4
        ).backward()
    assert products.multiply_adds == 13 * V * (3 * H + H_TEACHER)
    # of four chunks, the last of one token; both models' logits in seven parts
    assert products.calls == {"aten::mm": 7 + 7 + 4, "aten::addmm": 4}


@pytest.mark.parametrize(
    ("width", "chunk"), [(151936, 2048), (128256, 2048), (151936 // 8, 16384), (2**30, 1)]
)
def test_chunks_on_a_gpu_are_powers_of_two(width, chunk):
    assert tokens_of_chunk(width, on_gpu=True) == chunk
    assert tokens_of_part(chunk) == max(1, chunk // 2)


def test_logits_take_a_fifth_of_8192_tokens_float32():
    chunk = tokens_of_chunk(151936, on_gpu=True)
    in_bf16 = 2 * (chunk + tokens_of_part(chunk))
    assert in_bf16 <= 4 * 8192 / 5
