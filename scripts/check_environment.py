"""Is the environment whole? Names what is missing or of another version, without slow imports."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

EXACT = {
    "megatron-core": "0.16.1",
    "nemo_toolkit": "3.0.0",
    "math-verify": "0.9.0",
    "lm_eval": "0.4.13",
}
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


def problems() -> list[str]:
    """One line a fault."""
    found = []
    for name in IMPORTABLE:
        try:
            if find_spec(name) is None:
                found.append(f"module {name} is missing")
        except ImportError as error:
            found.append(f"module {name} cannot be found: {error}")
    for name, wanted in EXACT.items():
        try:
            if version(name) != wanted:
                found.append(f"{name} is {version(name)}, {wanted} is needed")
        except PackageNotFoundError:
            found.append(f"package {name} is missing")
    if find_spec("torchvision") is not None and _is_cpu_torch():
        found.append("torchvision of another torch build is installed: it breaks transformers")
    plugins = {point.name for point in entry_points(group="vllm.general_plugins")}
    if "nemo_paced" not in plugins:
        found.append("nemo_paced is not installed as a vLLM plugin")
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
