"""The Triton kernels' machine code for an H100 stays small: a machine without a GPU compiles it."""

from dataclasses import replace

import pytest
import sass

from tests.dense import KINDS

pytestmark = pytest.mark.skipif(
    not all((sass.TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump")),
    reason=f"Triton's ptxas or cuobjdump is not in {sass.TOOLS}",
)

# instructions of a column: what they are with Triton 3.6 and 3.9, and half of one
BUDGETS = {
    "statistics, forward_kl": 20.0,
    "statistics, reverse_kl": 20.0,
    "statistics, adaptive_kl": 21.5,
    "statistics, mixtures": 17.5,
    "mixture sums, jsd": 20.5,
    "mixture sums, skew_forward_kl": 27.5,
    "mixture sums, skew_reverse_kl": 27.5,
    "gradient, forward_kl": 16.1,
    "gradient, reverse_kl": 16.1,
    "gradient, adaptive_kl": 21.3,
    "gradient, jsd": 25.6,
    "gradient, skew_forward_kl": 24.5,
    "gradient, skew_reverse_kl": 28.3,
    "border of the head": 15.9,
    "gaps of head and tail": 28.7,
}
# what an H100's memory gives, TB/s; the search for adaptive KL's head stays a little below
MEMORY, SEARCH = 3.0, 2.8
# of the one warp that counts its ties; the ALU bounds it no more than all instructions do
TIES = {"gaps of head and tail": 5}


@pytest.fixture(scope="module")
def counts():
    return {one.name: one for one in sass.count(sass.kernels(), "bf16")}


def assert_no_thread_waits(one):
    assert one.spills == one.barriers == 0
    assert one.shuffles == TIES.get(one.name, 0)
    assert one.wide_loads == 1.0
    assert one.registers <= 64
    assert not one.float64


def test_every_kernel_has_a_budget(counts):
    assert counts.keys() == BUDGETS.keys()
    assert {f"gradient, {kind}" for kind in KINDS} <= BUDGETS.keys()


@pytest.mark.parametrize("name", BUDGETS)
def test_a_column_takes_few_instructions_and_no_thread_waits(counts, name):
    one = counts[name]
    assert one.instructions <= BUDGETS[name]
    assert one.alu <= (14 if name in TIES else 10)
    assert one.tb_per_s >= (SEARCH if name == "border of the head" else MEMORY)
    assert_no_thread_waits(one)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_no_thread_waits_in_other_dtypes(dtype):
    statistics = next(kernel for kernel in sass.kernels() if "adaptive" in kernel.name)
    (one,) = sass.count([statistics], dtype)
    assert one.instructions <= 23
    assert_no_thread_waits(one)


def test_a_width_or_stride_of_1_reaches_the_kernel_as_a_constant():
    for kernel in sass.kernels():
        if kernel.name in ("statistics, forward_kl", "gradient, forward_kl"):
            sass.build(kernel, "bf16", valid=1, stride_s=1, width_t=1)


def test_the_count_of_ties_compiles():
    kernel = next(kernel for kernel in sass.kernels() if kernel.name == "border of the head")
    sass.build(replace(kernel, constants={"COUNT": True}), "bf16")
