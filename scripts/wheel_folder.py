"""The folder of wheels that an offline machine is set up from: what it lacks, its manifest.

scripts/wheels.sh fills it and scripts/setup.sh --offline reads it, both with a bare Python 3.11:
nothing but the standard library is imported.

    python scripts/wheel_folder.py missing DIR constraints/gpu.txt   # pins without a wheel
    python scripts/wheel_folder.py write DIR gpu                     # the manifest
    python scripts/wheel_folder.py check DIR                         # the stack, or the faults
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
import zipfile
from pathlib import Path

MANIFEST = "manifest.json"
ROOT = Path(__file__).parents[1]
STACKS = ("cpu", "gpu")


def missing(folder: Path, constraints: Path) -> list[str]:
    """Pins that no wheel in the folder is of."""
    there = {_identity(*path.name.split("-")[:2]) for path in folder.glob("*.whl")}
    pins = [line for line in constraints.read_text().splitlines() if not line.startswith("#")]
    return [pin for pin in pins if _identity(*re.split("={2,3}", pin)) not in there]


def write(folder: Path, stack: str) -> None:
    """Lay down what the other machine checks; last, as a folder that has it is whole."""
    files = sorted(path for ending in ("*.whl", "*.tar.gz") for path in folder.glob(ending))
    manifest = {
        "stack": stack,
        **_machine(),
        "glibc": _dotted(max((_glibc_of(path) for path in files), default=(0, 0))),
        "constraints": _digest(_constraints(stack)),
        "files": {path.name: _digest(path) for path in files},
    }
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.replace(folder / MANIFEST)


def read(folder: Path) -> dict:
    """The manifest of a folder.

    Raises:
        ValueError: there is none that can be read.
    """
    again = "copy the folder again, or run scripts/wheels.sh on it again where there is a network"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the one that scripts/wheels.sh filled")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest["files"], dict) or manifest["stack"] not in STACKS:
            raise ValueError("no files, or a stack that is not known")
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST}, so it is not whole: {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read ({error}): {again}") from None
    return manifest


def faults(folder: Path) -> list[str]:
    """One line for everything that would end or spoil an installation from the folder here."""
    try:
        manifest = read(folder)
    except ValueError as error:
        return [str(error)]
    found = []
    stack, here = manifest["stack"], _machine()
    refetch = f"run scripts/wheels.sh {folder.name} --{stack}"
    if manifest["python"] != here["python"]:
        found.append(
            f"{folder} is for Python {manifest['python']}, and {sys.executable} is "
            f"{here['python']}: name one that fits (PYTHON=/path/to/python), or "
            f"{refetch} with a Python like this one"
        )
    if manifest["platform"] != here["platform"]:
        found.append(
            f"{folder} is for {manifest['platform']}, and this machine is {here['platform']}: "
            f"{refetch} on a machine like this one"
        )
    glibc = _glibc_here()
    if glibc and glibc < _numbers(manifest["glibc"]):
        found.append(
            f"{folder} has a wheel for glibc {manifest['glibc']}, and this machine has "
            f"{_dotted(glibc)}: {refetch} into an empty folder on a machine, or in a container, "
            "with a glibc no newer than this one: pip takes the newest that runs there"
        )
    if manifest["constraints"] != _digest(_constraints(stack)):
        found.append(
            f"{folder} was made for another constraints/{stack}.txt than this checkout's: check "
            f"out the same commit on both machines, or {refetch} from this one"
        )
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing: copy it again")
        elif _digest(path) != digest:
            found.append(f"{path} is damaged (its SHA-256 is another): copy it again")
    return found


def _machine() -> dict[str, str]:
    return {
        "python": f"cp{sys.version_info.major}{sys.version_info.minor}",
        "platform": sysconfig.get_platform(),
    }


def _constraints(stack: str) -> Path:
    return ROOT / "constraints" / f"{stack}.txt"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(name: str, version: str) -> tuple[str, str]:
    """Of a package, however its name is spelt: wheels have `_` where pins have `-` or `.`."""
    return re.sub(r"[-_.]+", "-", name).lower(), version.replace("_", "+")


def _glibc_of(path: Path) -> tuple[int, int]:
    """The least that a file can be used with, by its tag or, if built here, by its libraries."""
    tags = path.stem.split("-")[-1]
    if re.search(r"manylinux(1|2010|2014)_", tags):
        return 0, 0  # 2.17 or earlier, which is everywhere
    needed = [(0, 0)]
    if said := re.findall(r"manylinux_(\d+)_(\d+)", tags):
        return min(map(_pair, said))
    if path.suffix == ".whl" and tags.startswith("linux_"):
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if ".so" in name:
                    needed += map(_pair, re.findall(rb"GLIBC_(\d+)\.(\d+)", wheel.read(name)))
    return max(needed)


def _pair(found: tuple[str | bytes, str | bytes]) -> tuple[int, int]:
    return int(found[0]), int(found[1])


def _glibc_here() -> tuple[int, int] | None:
    try:
        return _numbers((os.confstr("CS_GNU_LIBC_VERSION") or "").split()[-1])
    except (ValueError, OSError, IndexError):
        return None  # another C library: pip says it when a wheel does not fit


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def main(arguments: list[str]) -> int:
    """As the module says."""
    command, folder, *more = arguments
    if command == "missing":
        print("\n".join(missing(Path(folder), Path(more[0]))))
    elif command == "write":
        write(Path(folder), more[0])
    elif command == "check":
        found = faults(Path(folder))
        for fault in found:
            print(f"offline: {fault}", file=sys.stderr)
        if found:
            return 1
        print(read(Path(folder))["stack"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
