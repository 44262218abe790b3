"""What we and Megatron call of Transformer Engine exists in its oldest and newest sources."""

import ast
from pathlib import Path

import pytest
from megatron.core import fp8_utils
from megatron.core.extensions import transformer_engine as megatron_te

from nemo_paced.config import Fp8Recipe
from nemo_paced.teacher.fp8 import transformer_engine as fp8_transformer_engine
from tests.unit.teacher.transformer_engine_sources import (
    Sources,
    base_class_calls,
    download_wheel,
    uses,
)

TE = {"te": "transformer_engine"}
# of Megatron's fp8_utils, what the switches of ours lead to
MEGATRON_FUNCTIONS = ("get_fp8_recipe", "get_fp8_context")
MEGATRON_LAYERS = ("TELinear", "TELayerNormColumnParallelLinear", "TEDotProductAttention")


def tree_of(module):
    return ast.parse(Path(module.__file__).read_text())


def our_uses():
    return uses(tree_of(fp8_transformer_engine))


def megatron_uses():
    for node in ast.walk(tree_of(fp8_utils)):
        if isinstance(node, ast.FunctionDef) and node.name in MEGATRON_FUNCTIONS:
            yield from uses(node)
    for node in ast.walk(tree_of(megatron_te)):
        if isinstance(node, ast.ClassDef) and node.name in MEGATRON_LAYERS:
            yield from base_class_calls(node, TE)


@pytest.fixture(scope="module", params=["oldest", "newest"])
def wheel(request):
    oldest = fp8_transformer_engine.OLDEST
    version = {"oldest": f"=={oldest}.*", "newest": f">={oldest},<3"}[request.param]
    cache = request.config.cache.mkdir(f"transformer-engine-{request.param}")
    found = download_wheel(version, Path(cache))
    if found is None:
        pytest.skip("no index here has the transformer-engine wheel, and none was kept")
    return found


@pytest.fixture(scope="module")
def sources(wheel):
    return Sources(wheel)


def test_our_calls_fit(sources):
    calls = list(our_uses())
    named = {dotted.rpartition(".")[2] for dotted, _ in calls}
    assert {"autocast", "Float8CurrentScaling", "MMParams", "is_mxfp8_available"} <= named
    assert sources.broken(iter(calls)) == []


def test_the_calls_that_megatron_makes_for_us_fit(sources):
    calls = list(megatron_uses())
    named = {dotted.rpartition(".")[2] for dotted, _ in calls}
    assert {"fp8_autocast", "fp8_model_init", "Float8BlockScaling", "MXFP8BlockScaling"} <= named
    assert {"Linear", "LayerNormLinear", "DotProductAttention"} <= named
    assert sources.broken(iter(calls)) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("fp8_gemm_fprop", "gemm_fprop", "Float8CurrentScaling takes no fp8_gemm_fprop"),
        ("autocast", "cast", "autocast is not in"),
        ("class MMParams", "class Params", "MMParams is not in"),
        ("return_reason", "reason", "is_mxfp8_available takes no return_reason"),
    ],
)
def test_a_change_there_would_be_noticed(wheel, old, new, told):
    assert told in "; ".join(Sources(wheel, edit=(old, new)).broken(our_uses()))


def test_fast_accumulation_is_what_we_think_it_is(sources):
    recipes = sources.text["transformer_engine/common/recipe/__init__.py"]
    tensorwise, blockwise = (
        recipes[recipes.index(f"class {name}(Recipe)") :].split("\nclass ")[0]
        for name in ("Float8CurrentScaling", "Float8BlockScaling")
    )
    assert "fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=False)" in tensorwise
    assert "fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=True)" in blockwise
    linear = sources.text["transformer_engine/pytorch/module/linear.py"]
    assert "recipe.fp8_gemm_fprop.use_split_accumulator" in linear


def test_weights_built_without_gradients_keep_no_transposed_copy(sources):
    base = sources.text["transformer_engine/pytorch/module/base.py"]
    assert "quantizer.set_usage(rowwise=True, columnwise=torch.is_grad_enabled())" in base
    (tensor,) = (t for name, t in sources.text.items() if name.endswith("/quantized_tensor.py"))
    assert "dst.quantize_(src)" in tensor, "a weight is quantised as values are copied into it"


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("ends", [(0, 0), (1, 2)])
def test_megatron_takes_the_switches(recipe, ends):
    from megatron.core.transformer import TransformerConfig

    fields = fp8_transformer_engine.transformer_config_fields(Fp8Recipe(recipe), ends)
    config = TransformerConfig(num_layers=6, hidden_size=32, num_attention_heads=2, **fields)
    in_bf16 = [fp8_utils.is_first_last_bf16_layer(config, layer) for layer in range(6)]
    assert in_bf16 == [layer < ends[0] or layer >= 6 - ends[1] for layer in range(6)]
    assert config.fp8_param and not config.fp8_dot_product_attention
    assert config.fp8_recipe == recipe


def test_the_fused_adam_keeps_its_state_where_checkpoints_look(sources):
    """A count in each parameter group, none with the parameters; moments where there is no state.

    ``tests/fused_adam.py`` stands in for it on CPUs.
    """
    adam = sources.definition("transformer_engine.pytorch.optimizers.fused_adam.FusedAdam")
    methods = {n.name: n for n in adam.body if isinstance(n, ast.FunctionDef)}
    step = ast.unparse(methods["step"])
    assert "if 'step' in group:" in step and "group['step'] += " in step
    assert "if len(state) == 0:\n" in step and "self.initialize_state(p, " in step
    initialize = methods["initialize_state"]
    named = [
        node.args[1].value
        for node in ast.walk(initialize)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_initialize_state"
    ]
    assert named == ["exp_avg", "exp_avg_sq", "master_param"]
    (condition,) = (node for node in initialize.body if isinstance(node, ast.If))
    assert ast.unparse(condition.test) == "self.master_weights", "the last one only there"


@pytest.mark.parametrize("layer", ["linear.Linear", "layernorm_linear.LayerNormLinear"])
def test_layers_that_are_told_after_they_are_made_add_gradients_to_the_buffer(sources, layer):
    """Forward reads the attribute that the student's layers are given."""
    definition = sources.definition(f"transformer_engine.pytorch.module.{layer}")
    methods = {n.name: ast.unparse(n) for n in definition.body if isinstance(n, ast.FunctionDef)}
    assert "self.fuse_wgrad_accumulation = fuse_wgrad_accumulation" in methods["__init__"]
    assert "self.fuse_wgrad_accumulation" in methods["forward"]
