"""Releases of other packages that are refused by name."""

import pytest

from nemo_paced import cli, versions
from nemo_paced.errors import ConfigError

NEEDS = ["torch>=2.10", "megatron-core<0.20,>=0.16.1", 'vllm<0.34,>=0.32; extra == "gpu"', "numpy"]
FIT = {"torch": "2.13.0+cpu", "megatron-core": "0.19.2", "numpy": "2.3.5"}


@pytest.fixture
def installed(monkeypatch):
    """What is installed, by name: to be changed."""
    found = dict(FIT)

    def version(name):
        if name not in found:
            raise versions.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "requires", lambda name: NEEDS)
    monkeypatch.setattr(versions, "version", version)
    return found


def test_releases_that_fit_pass_and_missing_ones_are_left_to_others(installed):
    versions.check_versions()
    installed |= {"torch": "2.11.0a0+5e0ac28.nv26.3", "vllm": "0.33.0"}
    versions.check_versions()


@pytest.mark.parametrize(
    ("package", "release", "needed"),
    [
        ("megatron-core", "0.15.3", r"megatron-core<0\.20,>=0\.16\.1"),
        ("megatron-core", "0.20.0", r"megatron-core<0\.20,>=0\.16\.1"),
        ("megatron-core", "0.20.0rc1", r"megatron-core<0\.20,>=0\.16\.1"),
        ("vllm", "0.31.1", r"vllm<0\.34,>=0\.32"),
        ("torch", "2.9.1", r"torch>=2\.10"),
        ("torch", "2.9.0a0+145a3a7.nv25.10", r"torch>=2\.10"),
    ],
)
def test_another_release_is_named_with_those_that_work(installed, package, release, needed):
    installed[package] = release
    with pytest.raises(
        ConfigError, match=rf"{package} {release.replace('+', '.')} \(pip .*{needed}"
    ):
        versions.check_versions()


def test_a_command_that_trains_says_so_before_it_imports_anything(installed, capsys):
    installed["megatron-core"] = "0.15.3"
    assert cli.main(["train", "--config-name", "quickstart"]) == 2
    assert "megatron-core 0.15.3 (pip install" in capsys.readouterr().err


def test_a_command_that_reads_files_runs_with_any_release(installed, capsys, tmp_path):
    installed["torch"] = "2.1.0"
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "torch" not in capsys.readouterr().err
