"""What ``train`` does before any rank is started."""

import json
from dataclasses import asdict

import pytest

from nemo_paced.cli import main
from nemo_paced.commands import launch
from nemo_paced.compose import with_config
from nemo_paced.config import to_dict
from nemo_paced.run import checkpoint_files
from nemo_paced.run.checkpoint_files import RunState, checkpoint_dir


class RanksStarted(Exception):
    pass


@pytest.mark.parametrize(("trained", "starts"), [(6, False), (4, True)])
def test_ranks_are_started_only_where_steps_are_left(tmp_path, monkeypatch, trained, starts):
    def start(*_):
        raise RanksStarted

    monkeypatch.setattr(launch, "_start_ranks", start)
    arguments = ["--config-name", "quickstart", "trainer.max_steps=6",
                 f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run"]  # fmt: skip
    configs = []
    with_config(arguments, configs.append)
    directory = checkpoint_dir(tmp_path / "run", trained)
    directory.mkdir(parents=True)
    state = RunState(trained, 8 * trained, 0, json.loads(json.dumps(to_dict(configs[0]))), (2, 1))
    (directory / "paced.json").write_text(json.dumps(asdict(state)))
    checkpoint_files.record_sizes(directory)
    if starts:
        with pytest.raises(RanksStarted):
            main(["train", *arguments])
    else:
        assert main(["train", *arguments]) == 0
