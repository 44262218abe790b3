"""These tests run when they are asked for: they start daemons and take minutes."""

import pytest

from tests.slurm.cluster import missing


def pytest_collection_modifyitems(config, items):
    asked = "slurm" in (config.getoption("markexpr") or "")
    reason = f"no SLURM here: {missing()}" if missing() else "runs by `make slurm-test`"
    if not asked or missing():
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason=reason))
