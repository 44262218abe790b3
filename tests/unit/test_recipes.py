"""The recipes of conf/: each composes, fits its GPUs by plan, and takes a step in a dry run."""

import re

import pytest

from nemo_paced.cli import main
from nemo_paced.compose import CONF, with_config
from tests.public_models import MODELS, OF_RECIPE

RECIPES = sorted(path.stem for path in CONF.glob("*.yaml"))
ON_GPUS = sorted(OF_RECIPE)


def test_every_recipe_for_gpus_has_its_models_here():
    on_cpus = {"default", "quickstart", "smollm2_self", "smollm2_gsm8k"}
    assert set(RECIPES) - on_cpus == set(OF_RECIPE)


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_recipe_is_of_the_nodes_and_gpus_in_its_name(name):
    nodes, gpus = re.search(r"_(\d+)n(\d+)g_", name).groups()
    found = []
    with_config(["--config-name", name], found.append)
    (config,) = found
    assert (config.trainer.num_nodes, config.trainer.devices) == (int(nodes), int(gpus))
    tensor = re.search(r"_tp(\d+)", name).group(1)
    assert config.model.tensor_model_parallel_size == int(tensor)
    assert ("fp8" in name) == config.teacher.fp8.enabled
    expert = re.search(r"_ep(\d+)", name)
    assert config.teacher.expert_model_parallel_size == (int(expert.group(1)) if expert else 0)


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_recipe_fits_its_gpus_by_plan(name, capsys):
    nodes = re.search(r"_(\d+)n", name).group(1)
    assert main(["plan", "--config-name", name, "--nodes", nodes, *OF_RECIPE[name]]) == 0
    assert "(H100 SXM 80GB): fits with" in capsys.readouterr().out


def test_shapes_are_those_that_the_models_are_published_with():
    from nemo_paced.hf.architectures import Architecture
    from tests.unit.sizing import shapes

    for name, known in {
        "Qwen3-1.7B": shapes.QWEN3_1_7B,
        "Qwen3-8B": shapes.QWEN3_8B,
        "Qwen3-30B-A3B": shapes.QWEN3_30B_A3B,
        "Llama-3.1-8B-Instruct": shapes.LLAMA3_8B,
    }.items():
        assert shapes.sizes(Architecture.read(MODELS / name, "hf_path")) == known


def test_a_plan_counts_no_server_where_nothing_is_sampled(capsys):
    name = "qwen3_1.7b_from_8b_2n8g_tp4"
    arguments = ["plan", "--config-name", name, "--nodes", "2", *OF_RECIPE[name]]
    colocated = "rollout.placement=colocated"
    free = []
    for settings in ([], ["schedule=forward_kl", "weights.scheme=unweighted"]):
        assert main([*arguments, colocated, *settings]) == 0
        told = capsys.readouterr().out
        free.append(float(re.search(r"fits with ([\d.]+) GiB", told).group(1)))
        assert ("rollout servers: none, nothing is sampled" in told) is bool(settings)
    assert free[1] > free[0] + 5, "the server's memory is the trainer's"
