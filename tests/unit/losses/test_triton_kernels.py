"""The Triton kernels, in Triton's interpreter, against the PyTorch kernels and dense float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_paced.losses import kernels as torch_kernels
from nemo_paced.losses.divergence import _merge
from tests.dense import KINDS, dense_divergence
from tests.unit.losses import triton_interpreted as interpreted

FINITE = [case for case in interpreted.CASES if case not in ("not_a_number", "no_rows")]
FINITE += interpreted.EDGES


def run_python(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,  # the interpreter takes a core for most of a minute
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """What the Triton kernels gave, by kind and case."""
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    module = "tests.unit.losses.triton_interpreted"
    run_python("-m", module, str(path), TRITON_INTERPRET="1")
    return torch.load(path)


def dense_value_and_gradient(kind, case):
    student, teacher, options = interpreted.inputs(case)
    width = student.shape[1]
    valid = options.pop("vocab_size", width)
    teacher = teacher[:, :valid]
    # a probability of 0 without the infinities that the naive formula cannot take
    true = student[:, :valid].double().clamp_min(-1e5).requires_grad_()
    dense = dense_divergence(
        true, teacher.double().clamp_min(-1e5), kind, jsd_beta=interpreted.JSD_BETA, **options
    )
    (dense * interpreted.weights()).sum().backward()
    padded = torch.nn.functional.pad(true.grad, (0, width - valid))
    return dense.detach(), padded


def assert_same(result, expected, case, dtype):
    (loss, grad), (expected_loss, expected_grad) = result, expected
    # peaked: losses of hundreds of nats from logits that float32 resolves to 1e-5
    tolerance = 3e-5 if case == "peaked" else 2e-6
    torch.testing.assert_close(
        loss.double(), expected_loss.double(), rtol=tolerance, atol=tolerance
    )
    tolerance *= max(1.0, float(expected_grad.abs().max()))
    # one unit in the last place; the interpreter cuts bfloat16 off where a GPU rounds it
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: tolerance}[dtype]
    torch.testing.assert_close(grad.double(), expected_grad.double(), rtol=rounding, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FINITE, ids=str)
def test_value_and_gradient_match_dense_float64(triton, kind, case):
    dtype = interpreted.inputs(case)[0].dtype
    assert triton[kind, case][1].dtype == dtype
    assert_same(triton[kind, case], dense_value_and_gradient(kind, case), case, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FINITE, ids=str)
def test_value_and_gradient_match_the_pytorch_kernels(triton, kind, case):
    dtype = interpreted.inputs(case)[0].dtype
    assert_same(triton[kind, case], interpreted.value_and_gradient(kind, case), case, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["offset", "apart"])
def test_an_offset_of_1e4_changes_nothing(triton, kind, case):
    for moved, unmoved in zip(triton[kind, case], triton[kind, "on_grid"], strict=True):
        torch.testing.assert_close(moved, unmoved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_minus_infinity_have_no_gradient(triton, kind):
    assert (triton[kind, "padded"][1][:, interpreted.WIDTH :] == 0).all()
    assert (triton[kind, "no_mass_first"][1][:, :20] == 0).all()
    assert (triton[kind, "no_mass_last"][1][:, 20:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_that_is_not_a_number_shows_in_its_row_alone(triton, kind):
    loss, grad = triton[kind, "not_a_number"]
    assert loss.isnan().tolist() == [False, True]
    assert grad.isnan().any(1).tolist() == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_gives_no_value(triton, kind):
    loss, grad = triton[kind, "no_rows"]
    assert loss.shape == (0,)
    assert grad.shape == (0, interpreted.WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_may_overwrite_the_student(triton, kind):
    torch.testing.assert_close(triton[kind, "in_place"], triton[kind, "random"][1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_without_mass_or_columns_adds_nothing(triton, kind):
    gathered_RKN = triton[kind, "shards"]
    expected_RKN = interpreted.shard_statistics(torch_kernels, kind)
    torch.testing.assert_close(gathered_RKN, expected_RKN, rtol=2e-6, atol=2e-6)
    options = interpreted.options_of(kind)
    merged, alone = _merge(gathered_RKN, options), _merge(gathered_RKN[:1], options)
    torch.testing.assert_close(merged[0].numbers_9N, alone[0].numbers_9N, rtol=0, atol=0)
    torch.testing.assert_close(merged[1:], alone[1:], rtol=0, atol=0)
    sums_2N, grad_NV = triton[kind, "no_columns"]
    assert (sums_2N == 0).all()
    assert (grad_NV == 0).all()


@pytest.mark.parametrize("case", interpreted.SPLIT_CASES)
def test_the_head_is_found_over_two_ranks(triton, case):
    ranks = [results[case] for results in triton["two_ranks"]]
    loss, grad = interpreted.value_and_gradient("adaptive_kl", case)
    whole = ranks[0][0], torch.cat([own for _, own in ranks], 1)
    assert_same(whole, (loss, grad), case, grad.dtype)
    torch.testing.assert_close(ranks[1][0], ranks[0][0], rtol=0, atol=0)
