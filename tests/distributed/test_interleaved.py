"""Interleaved pipelines: several chunks of layers a stage give the steps of one process."""

import pytest
import torch
from safetensors.torch import load_file

from nemo_paced.config import ModelConfig, OptimConfig
from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.quickstart.models import VOCABULARY, write_tokenizer
from nemo_paced.run import checkpoint, convert
from tests.distributed.harness import assert_same_steps, run_ranks
from tests.distributed.test_convert import make_config as make_conversion
from tests.distributed.test_training import LAYOUTS, LR, train_steps
from tests.tiny import make_hf_model

VOCAB = len(VOCABULARY)
# student, layout as in test_training, settings of the `model` block
INTERLEAVED = {
    "pp2 vp2": ("tied", (1, 2, 2, 2, False), {}),
    "pp2 vp4": ("deep", (1, 2, 2, 3, False), {"virtual_pipeline_model_parallel_size": 4}),
    "pp4 vp2": ("deep", (1, 4, 4, 1, False), {}),
    "pp2 vp2 dp2": ("tied", (1, 2, 4, 1, False), {}),
    "pp2 vp2 dp2 overlapped": (
        "tied",
        (1, 2, 4, 1, False),
        {"optim": OptimConfig(lr=LR, overlap_grad_reduce=True, overlap_param_gather=True)},
    ),
    "pp2 vp2 tp2 sp": ("tied", (2, 2, 4, 2, True), {}),
    "pp2 vp2 cp2": ("tied", (1, 2, 4, 2, False), {"context_parallel_size": 2}),
    "pp2 vp2 packed": ("tied", (1, 2, 2, 1, False), {"packed_sequence_size": 40}),
    "pp2 vp2 ep2": ("moe", (1, 2, 4, 2, False), {"expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, family, layers in (
        ("tied", "qwen3_tied", 4),
        ("deep", "qwen3", 8),
        ("moe", "qwen3_moe", 4),
    ):
        home = folder / name
        shape = {"vocab_size": VOCAB + 3, "num_hidden_layers": layers}
        make_hf_model(family, home / "student", **shape)
        make_hf_model("qwen3", home / "teacher", seed=1, num_hidden_layers=4, vocab_size=VOCAB + 11)
        write_tokenizer(home / "student")
        write_tokenizer(home / "teacher")
    return folder


@pytest.fixture(scope="module")
def single(models):
    return {
        name: run_ranks(1, train_steps, str(models / name), LAYOUTS["tp1"], "forward_kl")[0]
        for name in ("tied", "deep", "moe")
    }


def options(models, name, **more):
    """Arguments of ``train_steps`` behind the ranks."""
    student, layout, settings = INTERLEAVED[name]
    model = {"virtual_pipeline_model_parallel_size": 2, **settings}
    places = {"resume_from": None, "save_to": None, "steps": 3, "teacher": "teacher", **more}
    return layout[2], (str(models / student), layout, "forward_kl", *places.values(), model, True)


@pytest.mark.parametrize("name", INTERLEAVED)
def test_chunks_give_the_same_steps(models, single, name):
    """Seven responses make an odd number of micro-batches: they are filled up to the stages'."""
    ranks, arguments = options(models, name)
    expected, expected_weights = single[INTERLEAVED[name][0]]
    for losses, _ in (results := run_ranks(ranks, train_steps, *arguments)):
        assert_same_steps(losses, expected, later=1e-4)
    for key, value in expected_weights.items():
        assert (results[0][1][key] - value).square().mean().sqrt() < 3e-5, key


def _export(rank, world_size, source, out):
    convert.export_hf(make_conversion((1, 1, 1, 1)), source, out)


def test_a_checkpoint_of_chunks_is_read_without_them_and_the_other_way_round(
    models, single, tmp_path
):
    expected = torch.tensor(single["tied"][0][1:])
    home, plain = str(models / "tied"), LAYOUTS["tp1"]
    for folder, first, second in (("a", True, False), ("b", False, True)):
        saved = str(tmp_path / folder)
        for interleaved, more in (
            (first, {"save_to": saved, "steps": 1}),
            (second, {"resume_from": str(checkpoint.checkpoint_dir(tmp_path / folder, 1))}),
        ):
            ranks, arguments = options(models, "pp2 vp2", **more)
            if not interleaved:
                ranks, arguments = 1, (home, plain, *arguments[2:-2], {}, True)
            results = run_ranks(ranks, train_steps, *arguments)
        losses = torch.tensor(results[0][0])
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    run_ranks(1, _export, checkpoint.checkpoint_dir(tmp_path / "a", 1), tmp_path / "out")
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == load_file(models / "tied/student/model.safetensors").keys()


def test_chunks_that_do_not_fit_are_refused_by_name(models):
    with pytest.raises(ConfigError, match=r"virtual_pipeline_model_parallel_size is 2 with mod"):
        ModelConfig(virtual_pipeline_model_parallel_size=2)
    architecture = Architecture.from_config(load_hf_config(models / "tied/student"))
    architecture.check_layout(1, 2, virtual=2)
    with pytest.raises(ConfigError, match=r"virtual_pipeline_model_parallel_size is 4, .* the 2 l"):
        architecture.check_layout(1, 2, virtual=4)
