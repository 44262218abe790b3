"""Which backend and recipe `teacher.fp8` comes to, and what it refuses."""

import dataclasses

import pytest
import torch

from nemo_paced.config import Fp8Backend as Backend
from nemo_paced.config import Fp8Config, Precision, TeacherConfig
from nemo_paced.config import Fp8Recipe as Recipe
from nemo_paced.errors import ConfigError
from nemo_paced.teacher.fp8.choice import choose_fp8, resolve, sequence_multiple
from nemo_paced.teacher.fp8.transformer_engine import check_bf16_layers

CPU = torch.device("cpu")
SHAPE = {"num_layers": 4, "pp_size": 2}
ADA, H100, B200, RTX_PRO = (8, 9), (9, 0), (10, 0), (12, 0)


def settings(**changes):
    return Fp8Config(enabled=True, **changes)


@pytest.mark.parametrize(
    ("capability", "has_te", "changes", "expected"),
    [
        (None, False, {}, (Backend.torch, Recipe.rowwise)),
        (H100, False, {}, (Backend.torch, Recipe.rowwise)),
        (ADA, True, {}, (Backend.transformer_engine, Recipe.tensorwise)),
        (H100, True, {}, (Backend.transformer_engine, Recipe.blockwise)),
        (B200, True, {}, (Backend.transformer_engine, Recipe.mxfp8)),
        (RTX_PRO, True, {}, (Backend.transformer_engine, Recipe.blockwise)),
        (H100, True, {"backend": Backend.torch}, (Backend.torch, Recipe.rowwise)),
        (H100, True, {"recipe": Recipe.rowwise}, (Backend.torch, Recipe.rowwise)),
        (
            H100,
            True,
            {"recipe": Recipe.tensorwise},
            (Backend.transformer_engine, Recipe.tensorwise),
        ),
    ],
)
def test_auto_takes_the_finest_scales_there_are(capability, has_te, changes, expected):
    choice = resolve(settings(**changes), capability=capability, transformer_engine=has_te)
    assert (choice.backend, choice.recipe) == expected


@pytest.mark.parametrize(
    ("capability", "has_te", "changes", "message"),
    [
        (H100, True, {"recipe": Recipe.mxfp8}, r"mxfp8, .* lacks on compute capability 9\.0 \(it "),
        (RTX_PRO, True, {"recipe": Recipe.mxfp8}, r"needs 10\.0 or later, below 12\.0"),
        (ADA, True, {"recipe": Recipe.blockwise}, r"needs 9\.0 or later\): choose tensorwise or"),
        (H100, False, {"recipe": Recipe.blockwise}, "torch lacks .* choose rowwise or auto"),
        (None, False, {"backend": Backend.transformer_engine}, "needs a GPU and the package"),
        ((8, 0), False, {}, r"compute capability 8\.0: set teacher\.fp8\.enabled=false"),
    ],
)
def test_what_the_machine_lacks_is_refused_by_name(capability, has_te, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(settings(**changes), capability=capability, transformer_engine=has_te)


@pytest.mark.parametrize("recipe", [Recipe.tensorwise, Recipe.blockwise, Recipe.mxfp8])
def test_a_recipe_of_the_other_backend_is_refused(recipe):
    with pytest.raises(ConfigError, match=rf"{recipe.value} and .*torch.*: choose rowwise"):
        settings(backend=Backend.torch, recipe=recipe)
    with pytest.raises(ConfigError, match="choose tensorwise, blockwise or mxfp8"):
        settings(backend=Backend.transformer_engine, recipe=Recipe.rowwise)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Fp8Config)][1:])
def test_settings_that_would_be_ignored_are_refused(name):
    other = {
        "backend": Backend.torch,
        "recipe": Recipe.rowwise,
        "certificate": False,
        "max_kl": 0.5,
    }.get(name, 3)
    with pytest.raises(ConfigError, match=rf"teacher\.fp8\.{name} is .*enabled is false"):
        Fp8Config(**{name: other})
    if name in ("max_kl", "certificate_problems"):
        with pytest.raises(ConfigError, match=r"certificate is false"):
            settings(certificate=False, **{name: other})
    else:
        settings(**{name: other})


@pytest.mark.parametrize(
    "changes",
    [{"max_kl": 0.0}, {"certificate_problems": 0}, {"num_layers_at_end_in_bf16": -1}],
)
def test_values_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError, match=rf"teacher\.fp8\.{next(iter(changes))} is"):
        settings(**changes)


def test_off_is_the_default_and_costs_nothing():
    assert choose_fp8(TeacherConfig().fp8, precision=Precision.bf16, device=CPU, **SHAPE) is None
    assert sequence_multiple(None, tp_size=2, sequence_parallel=True) == 1


def test_layers_in_bf16_must_leave_some_in_fp8():
    ends = {"num_layers_at_start_in_bf16": 3, "num_layers_at_end_in_bf16": 1}
    with pytest.raises(ConfigError, match="leave none of the teacher's 4 layers in FP8"):
        choose_fp8(settings(**ends), precision=Precision.bf16, device=CPU, **SHAPE)
    check_bf16_layers((2, 1), **SHAPE)
    with pytest.raises(ConfigError, match=r"at_start_in_bf16 is 3, .* stage's 2 layers"):
        check_bf16_layers((3, 0), **SHAPE)


def test_fp8_on_a_gpu_needs_bf16():
    with pytest.raises(ConfigError, match=r"trainer\.precision is fp32.*set trainer\.precision"):
        choose_fp8(settings(), precision=Precision.fp32, device=torch.device("cuda", 0), **SHAPE)
    assert choose_fp8(settings(), precision=Precision.fp32, device=CPU, **SHAPE) is not None


@pytest.mark.parametrize(
    ("recipe", "sequence_parallel", "expected"),
    [
        ("auto", True, 1),
        ("blockwise", False, 16),
        ("blockwise", True, 256),  # whole blocks of 128 tokens on each of two ranks
        ("tensorwise", True, 32),
        ("mxfp8", True, 64),
    ],
)
def test_transformer_engine_asks_for_padded_sequences(recipe, sequence_parallel, expected):
    choice = resolve(
        settings(recipe=Recipe(recipe)), capability=B200, transformer_engine=recipe != "auto"
    )
    assert sequence_multiple(choice, tp_size=2, sequence_parallel=sequence_parallel) == expected
