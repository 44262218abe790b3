import pytest
from safetensors import safe_open

from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.rows import ParameterLayout
from tests.tiny import make_hf_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3, QWEN3 | {"tie_word_embeddings": True}])
def test_the_table_names_every_tensor_of_transformers(config):
    """Names and shapes, none too many, against the class itself."""
    import torch
    import transformers

    with torch.device("meta"):
        kind = getattr(transformers, config["architectures"][0])
        model = kind(kind.config_class(**config))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    architecture = Architecture.from_config(config)
    found = [
        (name.format(layer=layer), shape)
        for row, layer in architecture.rows()
        for name, shape in zip(row.hf, architecture.hf_shapes(row), strict=True)
    ]
    assert len(found) == len(dict(found)) and dict(found) == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_tied", "qwen3_moe_mixed"])
def test_the_table_names_every_tensor_that_transformers_writes_for_experts(tmp_path, family):
    """In memory it merges the experts; on disk, as on the hub, each is by itself."""
    folder = make_hf_model(family, tmp_path / "m")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    architecture = Architecture.from_config(load_hf_config(folder))
    found = [
        (name.format(layer=layer), shape)
        for row, layer in architecture.rows()
        for name, shape in zip(row.hf, architecture.hf_shapes(row), strict=True)
    ]
    assert len(found) == len(dict(found)) and dict(found) == expected


def test_the_hubs_own_key_for_the_number_of_experts_is_read():
    """Releases of transformers write ``num_experts`` or ``num_local_experts``."""
    other = {k: v for k, v in QWEN3_MOE.items() if k != "num_experts"} | {"num_local_experts": 8}
    assert Architecture.from_config(QWEN3_MOE) == Architecture.from_config(other)
    experts = Architecture.from_config(QWEN3_MOE).experts
    assert experts.count == 8 and experts.per_token == 2 and experts.layers == {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"decoder_sparse_step": 2}, {1}),
        ({"mlp_only_layers": [0]}, {1, 2}),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]}, {1}),
    ],
)
def test_which_layers_have_experts(changes, layers):
    assert Architecture.from_config(QWEN3_MOE | changes).experts.layers == layers


@pytest.mark.parametrize(
    ("tensor", "expert", "sequence_parallel", "message"),
    [
        (1, 3, False, "teacher.expert_model_parallel_size is 3, .* the 8 experts of this Qwen3Moe"),
        (2, 2, False, "teacher.sequence_parallel is false with teacher.tensor_model_parallel_si"),
        (2, 4, True, None),
        (1, 8, False, None),
    ],
)
def test_layouts_of_eight_experts(tensor, expert, sequence_parallel, message):
    architecture = Architecture.from_config(QWEN3_MOE)
    layout = {"expert": expert, "sequence_parallel": sequence_parallel, "prefix": "teacher"}
    if message is None:
        architecture.check_layout(tensor, 1, **layout)
    else:
        with pytest.raises(ConfigError, match=message):
            architecture.check_layout(tensor, 1, **layout)


@pytest.mark.parametrize(
    ("written", "base", "scaled"),
    [
        ({}, 1e4, False),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, False),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, True),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, True),
    ],
)
def test_both_ways_of_writing_rope_are_read(written, base, scaled):
    architecture = Architecture.from_config(LLAMA | written)
    assert architecture.rope_base == base
    assert (architecture.rope_scaling is not None) == scaled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported; choose"),
        ({"architectures": None}, r"architecture \? is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "num_experts_per_tok, moe_inter.* missing"),
        (QWEN3_MOE | {"num_experts": 0}, "num_experts is missing"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "llama3: low_freq_factor, .* missing",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Architecture.from_config(LLAMA | changes, "models/a/config.json")
    assert str(caught.value).startswith("models/a/config.json: ")


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "rms_norm_eps"])
def test_a_missing_key_is_named(key):
    config = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(ConfigError, match=f"models/a/config.json: {key} is missing"):
        Architecture.from_config(config, "models/a/config.json")


@pytest.mark.parametrize(
    ("tensor", "pipeline", "message"),
    [
        (2, 1, "model.tensor_model_parallel_size is 2, .* the 9 attention heads of this Llama"),
        (9, 1, "model.tensor_model_parallel_size is 9, .* the 3 key-value heads of this Llama"),
        (1, 4, "model.pipeline_model_parallel_size is 4, .* the 30 layers of this Llama"),
        (3, 1, None),
        (1, 2, None),
        (3, 2, None),
    ],
)
def test_layouts_of_nine_heads_in_three_groups(tensor, pipeline, message):
    shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    architecture = Architecture.from_config(
        LLAMA | shape | {"hidden_size": 576, "intermediate_size": 1536}
    )
    if message is None:
        architecture.check_layout(tensor, pipeline)
    else:
        with pytest.raises(ConfigError, match=message):
            architecture.check_layout(tensor, pipeline)


def test_tied_embeddings_have_one_row():
    def vocabulary_rows(config):
        rows = Architecture.from_config(config).rows()
        return [row.hf[0] for row, _ in rows if row.layout is ParameterLayout.vocabulary]

    assert vocabulary_rows(LLAMA) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert vocabulary_rows(LLAMA | {"tie_word_embeddings": True}) == ["model.embed_tokens.weight"]
