"""Counts are exact: against transformers' models and the names of published ones."""

import dataclasses
import json
import subprocess
import sys

import pytest

from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.sizing.parameters import active_parameters, model_parameters, stage_parameters
from nemo_paced.sizing.shapes import Layout
from tests.tiny import FAMILIES, MOE_FAMILIES, make_hf_model
from tests.unit.sizing.shapes import LLAMA3_8B, QWEN3_1_7B, QWEN3_8B, QWEN3_30B_A3B, QWEN3_32B


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_every_family_has_transformers_number_of_parameters(family, tmp_path):
    import transformers

    make_hf_model(family, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    shape = Architecture.read(str(tmp_path), "student.hf_path")
    assert model_parameters(shape) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "billions"),
    [(QWEN3_1_7B, 1.72), (QWEN3_8B, 8.19), (QWEN3_32B, 32.8), (LLAMA3_8B, 8.03),
     (QWEN3_30B_A3B, 30.5)],
)  # fmt: skip
def test_published_models_have_their_published_size(shape, billions):
    assert model_parameters(shape) / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_mixture_activates_a_part():
    head = 2 * QWEN3_30B_A3B.vocab_size * QWEN3_30B_A3B.hidden_size
    assert (active_parameters(QWEN3_30B_A3B) + head) / 1e9 == pytest.approx(3.3, rel=0.03)


@pytest.mark.parametrize("shape", [QWEN3_8B, QWEN3_30B_A3B, QWEN3_1_7B])
def test_the_parts_of_all_ranks_make_the_whole(shape):
    """Norms and routers are on every tensor-parallel rank; a tied head on the last stage too."""
    experts = 2 if shape.experts else 1
    layout = Layout(tensor=4, pipeline=2, expert=experts)
    stages = [stage_parameters(shape, layout, stage, shape.vocab_size) for stage in range(2)]
    whole = stage_parameters(shape, Layout(), 0, shape.vocab_size)
    copies = dataclasses.replace(shape, num_heads=0, num_kv_heads=0, ffn_hidden_size=0)
    replicated = stage_parameters(copies, Layout(), 0, 0)  # norms and routers
    total = 4 * sum(s.dense for s in stages) - 3 * (replicated.dense)
    assert total == whole.dense
    assert experts * sum(s.experts for s in stages) == whole.experts
    again = shape.vocab_size * shape.hidden_size if shape.tied else 0
    assert 4 * sum(s.vocabulary for s in stages) == whole.vocabulary + again


def test_a_config_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"teacher.hf_path is 'nowhere'"):
        Architecture.read("nowhere", "teacher.hf_path")
    with pytest.raises(ConfigError, match=r"student.hf_path is empty"):
        Architecture.read("", "student.hf_path")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        Architecture.read(str(tmp_path), "student.hf_path")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Other"]}))
    with pytest.raises(ConfigError, match="Other is not supported"):
        Architecture.read(str(tmp_path), "student.hf_path")


def test_sizing_needs_no_torch():
    program = (
        "import sys\n"
        "from nemo_paced.sizing import report, search\n"
        "heavy = {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
