"""Whose layers a model is built of, decided before anything is built."""

import importlib

import pytest

from nemo_paced.errors import ConfigError
from nemo_paced.hf.model import has_transformer_engine


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
