"""Is the environment whole? Names what is missing or of another version, without slow imports."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

IMPORTABLE = (
    "torch",
    "vllm",
    "transformers",
    "megatron.core",
    "nemo",
    "lightning",
    "hydra",
    "pyarrow",
    "pandas",
    "matplotlib",
    "httpx",
    "jinja2",
    "rich",
    "psutil",
    "sentencepiece",
    "pytest",
    "xdist",
    "nemo_paced",
)

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
# what setup.sh installs
CPU_EXTRAS, GPU_EXTRAS = ("cpu", "real", "eval", "dev"), ("gpu", "eval", "dev")


def exact() -> dict[str, str]:
    """Release of each package that pyproject.toml pins, for the torch that is installed."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in CPU_EXTRAS if _is_cpu_torch() else GPU_EXTRAS:
        wanted += project["optional-dependencies"][extra]
    pinned = (line.partition("==") for line in wanted if "==" in line)
    return {name.partition("[")[0]: release for name, _, release in pinned}


def problems() -> list[str]:
    """One line a fault."""
    found = []
    for name in IMPORTABLE:
        try:
            if find_spec(name) is None:
                found.append(f"module {name} is missing")
        except ImportError as error:
            found.append(f"module {name} cannot be found: {error}")
    for name, wanted in exact().items():
        try:
            if version(name) != wanted:
                found.append(f"{name} is {version(name)}, {wanted} is needed")
        except PackageNotFoundError:
            found.append(f"package {name} is missing")
    if not found:  # what is no single release, by the metadata of the package itself
        from nemo_paced.errors import ConfigError
        from nemo_paced.versions import check_versions

        try:
            check_versions()
        except ConfigError as error:
            found.append(str(error))
    if find_spec("torchvision") is not None and _is_cpu_torch():
        found.append("torchvision of another torch build is installed: it breaks transformers")
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        if "nemo_paced" not in {point.name for point in entry_points(group=group)}:
            found.append(f"nemo_paced is not installed under {group}: run make setup")
    return found


def _is_cpu_torch() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    faults = problems()
    for fault in faults:
        print(f"environment: {fault}", file=sys.stderr)
    sys.exit(bool(faults))
