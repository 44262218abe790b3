"""Whose layers a model is built of, decided before anything is built."""

import importlib

import pytest
import torch

from nemo_paced.errors import ConfigError
from nemo_paced.hf.model import fusions, has_transformer_engine
from nemo_paced.student.model import _accumulate_weight_gradients


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a Transformer Engine whose PyTorch part is a given text, for one test."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)

    def install(text):
        package = tmp_path / "transformer_engine"
        (package / "pytorch").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "pytorch" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        importlib.sys.modules.pop(name, None)


def test_without_transformer_engine_there_is_none():
    assert not has_transformer_engine()


def test_one_that_works_is_found(installed):
    installed("")
    assert has_transformer_engine()


@pytest.mark.parametrize(
    "error",
    [
        'ImportError("undefined symbol: _ZN3c10")',
        'OSError("libcudnn.so.9: cannot open shared object file")',
        'RuntimeError("transformer_engine_torch is missing")',
    ],
)
def test_one_that_cannot_be_imported_is_no_reason_to_go_on_without(installed, error):
    installed(f"raise {error}")
    told = error.partition('"')[2].rpartition('"')[0]
    with pytest.raises(ConfigError, match=rf"cannot be imported \({told}\): build .* uninstall it"):
        has_transformer_engine()


def test_kernels_are_fused_where_they_are_there():
    assert not any(fusions(on_gpu=False, transformer_engine=False).values())
    assert all(fusions(on_gpu=True, transformer_engine=True).values())
    local = fusions(on_gpu=True, transformer_engine=False)
    assert local.pop("apply_rope_fusion") is False and all(local.values())


def test_layers_that_can_add_their_gradients_to_a_buffer_are_told_to():
    chunk = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    chunk[0].fuse_wgrad_accumulation = False
    _accumulate_weight_gradients([chunk])
    assert chunk[0].fuse_wgrad_accumulation is True
    assert not hasattr(chunk[1], "fuse_wgrad_accumulation")
