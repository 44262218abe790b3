"""Releases of other packages that this one is written for, as its own metadata names them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

from nemo_paced.errors import ConfigError

DISTRIBUTION = "nemo-paced"


def check_versions() -> None:
    """Check that each package that is installed is of a release that this one works with.

    What is not installed is left to whoever needs it. Images of NVIDIA's hold builds that are
    named after the release to come (2.11.0a0+nv26.3): these count as that release.

    Raises:
        ConfigError: names every package of another release, with those that work.
    """
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return
    wrong = []
    for requirement in map(Requirement, lines):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue
        found = Version(installed)
        if found.local and found.is_prerelease:
            found = Version(found.base_version)
        if not requirement.specifier.contains(found, prereleases=True):
            needed = f"{requirement.name}{requirement.specifier}"
            wrong.append(f"{requirement.name} {installed} (pip install '{needed}')")
    if wrong:
        raise ConfigError(
            "these packages are installed in releases that nemo_paced does not work with: "
            f"{', '.join(wrong)}. docs/installation.md says which releases go together"
        )
