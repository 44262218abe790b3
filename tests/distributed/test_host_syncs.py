"""Reads of tensors by the CPU while a step runs, each of which makes it wait for a GPU."""

import collections
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_paced.parallel import groups
from nemo_paced.training.setup import build_models
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import LR, STAGES, make_config, make_items, models

assert models  # the fixture
ROOT = Path(__file__).parents[2]
# what a GPU has to be waited for: scalars, sizes that depend on values
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
CPU_ONLY = "cpu_megatron.py"  # stands between Megatron and torch where there is no GPU
METHODS = ("tolist", "cpu", "numpy")
# places of the numbers that a step ends with: losses and counts, the gradients' norm
AT_THE_END = {
    "distributed/finalize_model_grads.py:finalize_model_grads",
    "student/step.py:_sum_over_ranks",
    "core/utils.py:local_multi_tensor_l2_norm",
    "optimizer/clip_grads.py:get_grad_norm_fp32",
    "student/model.py:update",
}


class Reads(TorchDispatchMode):
    """Counts reads of tensors by the place in a repository's code that asks for them."""

    def __init__(self):
        super().__init__()
        self.places = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if func._schema.name in READS or masked:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self):
        for frame in reversed(traceback.extract_stack()[:-2]):
            place = Path(frame.filename)
            if "torch" not in place.parts and "tests" not in place.parts and place.name != CPU_ONLY:
                self.places[f"{'/'.join(place.parts[-2:])}:{frame.name}"] += 1
                return


def _count(rank, world_size, folder, micro_batch_size, kind):
    config = make_config(folder, (1, 1, 1, micro_batch_size, False))
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    built = build_models(config, parallel)
    first, second = make_items(0), make_items(1)
    built.step(first, STAGES[kind], LR)
    with counted() as reads:
        built.step(second, STAGES[kind], LR)
    return dict(reads.places)


@contextmanager
def counted():
    reads = Reads()
    originals = {name: getattr(torch.Tensor, name) for name in METHODS}
    for name, original in originals.items():

        def noted(self, *args, original=original, **kwargs):
            reads.note()
            return original(self, *args, **kwargs)

        setattr(torch.Tensor, name, noted)
    with reads:
        yield reads
    for name, original in originals.items():
        setattr(torch.Tensor, name, original)


@pytest.mark.parametrize("kind", STAGES)
def test_a_step_reads_a_few_numbers_at_its_end_and_none_a_micro_batch(models, kind):
    """Seven responses in one micro-batch and in seven.

    Packed rows are left out: their attention and rotary embedding on a CPU, which read lengths, are
    Transformer Engine's on a GPU.
    """
    one, many = (run_ranks(1, _count, str(models), size, kind)[0] for size in (7, 1))
    assert one == many
    # on a GPU that is a fused one, or steps of torch's that lie on the CPU
    many.pop("optimizer/optimizer.py:step_with_ready_grads")
    assert many.keys() <= AT_THE_END and 3 <= sum(many.values()) <= 7


def test_every_way_to_read_is_counted():
    x = torch.arange(4.0)
    with counted() as reads:
        for read in (
            x.tolist,
            x.sum().item,
            x.cpu,
            x.nonzero,
            lambda: x[x > 1],
            lambda: bool(x[0]),
        ):
            before = sum(reads.places.values())
            read()
            assert sum(reads.places.values()) == before + 1
