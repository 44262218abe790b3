"""The recipes for GPUs at their full size on fake tensors, and small models in other layouts."""

import logging

import pytest

from nemo_paced.compose import with_config
from nemo_paced.config import Recompute, TeacherPlacement
from nemo_paced.preflight.dry_run import full_size
from tests.distributed.harness import run_ranks
from tests.public_models import OF_RECIPE
from tests.unit.preflight.test_full_size import TP4_PP2, apart, make_config, run, write_models

pytestmark = pytest.mark.slow


def _recipe(rank, world_size, name):
    logging.getLogger("megatron").setLevel(logging.WARNING)
    ranks = []
    with_config(
        ["--config-name", name, *OF_RECIPE[name]],
        lambda config: ranks.extend(full_size.full_run(config)),
    )
    return ranks


@pytest.mark.parametrize("name", sorted(OF_RECIPE))
def test_each_phase_of_a_recipe_holds_what_the_plan_says(name):
    """Within a tenth; what they came to on a day is in docs/training.md."""
    (ranks,) = run_ranks(1, _recipe, name, timeout_s=900)
    assert [phase.name for phase in ranks[0].phases] == [
        full_size.HELD,
        full_size.TEACHER,
        full_size.STUDENT,
        full_size.OPTIMIZER,
    ]
    assert not apart(ranks)


@pytest.mark.parametrize(
    ("model", "teacher"),
    [
        (
            {"micro_batch_size": 1, "packed_sequence_size": 2560},
            {"placement": TeacherPlacement.offloaded},
        ),
        (
            {**TP4_PP2, "recompute_granularity": Recompute.full},
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
        ),
        (
            {
                "context_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "micro_batch_size": 1,
            },
            {"top_k": 8},
        ),
    ],
    ids=["packed, offloaded", "recomputed, a teacher of another layout", "cp2 interleaved, top-k"],
)
def test_other_layouts_hold_what_the_plan_says(tmp_path, model, teacher):
    folder = write_models(tmp_path, "Qwen3-1.7B", num_hidden_layers=8)
    assert not apart(run(make_config(folder, model, **teacher)))
