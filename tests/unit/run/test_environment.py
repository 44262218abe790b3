import json
import re
import subprocess
import sys

import pytest
import torch

from nemo_paced.config import ModelConfig
from nemo_paced.errors import ConfigError
from nemo_paced.parallel import groups
from nemo_paced.run import environment
from nemo_paced.run.environment import (
    commit,
    installed_versions,
    read_starts,
    record_preparation,
    record_start,
)
from tests.distributed.harness import run_ranks


class OneRank:
    rank, world_size, device = 0, 1, torch.device("cpu")


def test_each_start_is_added_to_those_before(tmp_path):
    assert read_starts(tmp_path) == []
    record_start(tmp_path, OneRank(), 0)
    record_start(tmp_path, OneRank(), 12)
    first, second = read_starts(tmp_path)
    assert (first.step, second.step) == (0, 12)
    assert first.devices == {"CPU": 1} and first.nodes == 1
    assert first.versions["torch"] == torch.__version__
    assert first.python == ".".join(map(str, sys.version_info[:3]))
    assert 0 < first.memory_gib < 1e5 and re.search(r", \d+ cores$", first.processor)
    assert first.time <= second.time and first.time.endswith("+00:00")


def test_the_last_start_keeps_how_long_it_took_to_its_first_step(tmp_path):
    record_start(tmp_path, OneRank(), 0)
    record_start(tmp_path, OneRank(), 12)
    record_preparation(tmp_path, {"servers": 1.234, "pass_rates": 60.0})
    first, second = read_starts(tmp_path)
    assert first.preparation_s == {}, "it was killed before"
    assert second.preparation_s == {"servers": 1.23, "pass_rates": 60.0}


def _recorded(rank, world_size, folder):
    from pathlib import Path

    parallel = groups.initialize(ModelConfig(), accelerator="cpu", timeout_s=60)
    record_start(Path(folder), parallel, 3)
    torch.distributed.barrier()
    starts = read_starts(Path(folder))
    groups.shutdown()
    return [(start.step, start.devices, start.nodes) for start in starts]


def test_every_rank_that_trains_is_counted(tmp_path):
    for starts in run_ranks(2, _recorded, str(tmp_path)):
        assert starts == [(3, {"CPU": 2}, 1)]


def test_a_damaged_record_is_refused(tmp_path):
    path = tmp_path / environment.ENVIRONMENT_FILE
    for content in ("{", "[]", json.dumps({"starts": [{"time": ""}]})):
        path.write_text(content)
        with pytest.raises(ConfigError, match="is no record of a run's starts"):
            read_starts(tmp_path)


def test_the_commit_is_that_of_the_checkout_that_tracks_the_package(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package, other = tmp_path / "package", tmp_path / "site-packages"
    for folder in (package, other):
        folder.mkdir()
        (folder / "__init__.py").touch()
    assert commit(package) == "", "no checkout at all"
    git("init", "-q")
    git("add", "package")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short=12", "HEAD")
    assert commit(package) == head
    assert commit(other) == "", "lies in a checkout that does not track it"
    (package / "__init__.py").write_text("1")
    assert commit(package) == f"{head}-dirty"


def test_only_installed_packages_have_a_version():
    found = installed_versions(["torch", "no-such-package"])
    assert found == {"torch": torch.__version__}
