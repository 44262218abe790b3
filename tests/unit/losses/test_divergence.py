import pytest
import torch

from nemo_paced.losses.divergence import divergence
from nemo_paced.losses.kinds import Divergence, DivergenceKind
from tests.dense import KINDS, dense_divergence, make_logits, of_kind

CASES = ("random", "peaked", "tied", "bf16")


def value_and_gradient(student, teacher, kind, weights, **options):
    student = student.clone().requires_grad_()
    kind, options = of_kind(kind, options)
    loss = divergence(student, teacher, kind, **options)
    (loss * weights).sum().backward()
    return loss.detach(), student.grad


def dense_value_and_gradient(student, teacher, kind, weights, **options):
    student = student.double().requires_grad_()
    loss = dense_divergence(student, teacher, kind, **options)
    (loss * weights).sum().backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "jsd_beta": 0.2, "skew": 0.3}], ids=["defaults", "others"]
)
def test_value_and_gradient_match_dense_float64(kind, case, options):
    student, teacher = make_logits(case, 13, 40)
    weights = torch.rand(13, generator=torch.Generator().manual_seed(1))
    weights[3] = 0
    loss, grad = value_and_gradient(student, teacher, kind, weights, chunk_size=5, **options)
    dense_loss, dense_grad = dense_value_and_gradient(student, teacher, kind, weights, **options)
    # peaked: losses of hundreds of nats from logits that float32 resolves to 1e-5
    tolerance = 3e-5 if case == "peaked" else 2e-6
    torch.testing.assert_close(loss.double(), dense_loss, rtol=tolerance, atol=tolerance)
    tolerance = 5e-3 if case == "bf16" else tolerance * max(1.0, float(dense_grad.abs().max()))
    torch.testing.assert_close(grad.double(), dense_grad, rtol=tolerance, atol=tolerance)
    assert grad.dtype == student.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_no_loss_and_no_gradient(kind):
    student, teacher = make_logits("equal", 7, 40)
    loss, grad = value_and_gradient(student, teacher, kind, torch.ones(7))
    assert loss.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_an_offset_of_1e4_changes_nothing(kind):
    student, teacher = make_logits("random", 7, 40)
    # an offset that float32 represents together with these logits
    student, teacher = (student * 64).round() / 64, (teacher * 64).round() / 64
    loss, grad = value_and_gradient(student, teacher, kind, torch.ones(7))
    moved_loss, moved_grad = value_and_gradient(student + 1e4, teacher + 1e4, kind, torch.ones(7))
    torch.testing.assert_close(moved_loss, loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(moved_grad, grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind):
    student, teacher = make_logits("random", 5, 40)
    for sign in (1, -1):
        loss, grad = value_and_gradient(student * 1e4, sign * teacher * 1e4, kind, torch.ones(5))
        assert loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [7.0, float("-inf")])
def test_padded_columns_carry_no_mass_and_no_gradient(kind, padding):
    student, teacher = make_logits("random", 6, 40)
    weights = torch.ones(6)
    loss, grad = value_and_gradient(student, teacher, kind, weights)
    wide_student = torch.cat([student, torch.full((6, 8), padding)], 1)
    wide_teacher = torch.cat([teacher, torch.full((6, 24), padding)], 1)
    padded_loss, padded_grad = value_and_gradient(
        wide_student, wide_teacher, kind, weights, vocab_size=40
    )
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_grad[:, :40], grad)
    assert (padded_grad[:, 40:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity_in_both_models_is_no_mass(kind):
    student, teacher = make_logits("random", 6, 40)
    student[:, 30:] = float("-inf")
    teacher[:, 30:] = float("-inf")
    loss, grad = value_and_gradient(student, teacher, kind, torch.ones(6))
    short_loss, short_grad = value_and_gradient(
        student[:, :30], teacher[:, :30], kind, torch.ones(6)
    )
    torch.testing.assert_close(loss, short_loss)
    torch.testing.assert_close(grad[:, :30], short_grad)
    assert (grad[:, 30:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 40), (1, 40), (2, 3, 40)])
def test_any_token_axes_and_no_token(kind, shape):
    student = torch.randn(shape, requires_grad=True)
    loss = divergence(student, torch.randn(shape), kind)
    assert loss.shape == shape[:-1]
    loss.sum().backward()
    assert student.grad.shape == shape


def test_the_teacher_gets_no_gradient():
    teacher = torch.randn(3, 8, requires_grad=True)
    divergence(
        torch.randn(3, 8, requires_grad=True), teacher, DivergenceKind.forward_kl
    ).sum().backward()
    assert teacher.grad is None


def test_forward_kl_is_of_teacher_from_student():
    # the teacher is sure of token 0, the student is flat: KL(T || S) = log 4
    teacher = torch.tensor([[50.0, 0, 0, 0]])
    loss = divergence(torch.zeros(1, 4), teacher, DivergenceKind.forward_kl)
    torch.testing.assert_close(loss, torch.tensor([4.0]).log())


@pytest.mark.parametrize(
    ("options", "shapes", "told"),
    [
        ({}, ((2, 8), (3, 8)), "token axes"),
        ({}, ((2, 8), (2, 9)), "vocab_size"),
        ({"vocab_size": 9}, ((2, 8), (2, 8)), "8 columns"),
    ],
)
def test_misfits_are_named(options, shapes, told):
    with pytest.raises(ValueError, match=told):
        divergence(torch.zeros(shapes[0]), torch.zeros(shapes[1]), "forward_kl", **options)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0"),
        ({"jsd_beta": 1.0}, "jsd_beta is 1.0: it must lie between 0 and 1"),
        ({"skew": 0.0}, "skew is 0.0"),
        ({"akl_head_mass": 1.5}, "akl_head_mass is 1.5"),
    ],
)
def test_parameters_out_of_range_are_named(parameters, told):
    with pytest.raises(ValueError, match=told):
        Divergence("jsd", **parameters)
