"""``results.json``: ``{"models": {label: {suite: Accuracy}}, "settings": {name: value}}``.

A suite is ``heldout``, ``forgetting`` or the name of a problem file; a label is that of a model.
The first model is the one that the others are compared with: ``base`` (quickstart) or ``baseline``
(the command ``evaluate``) where there is one. The settings say how it was sampled. The fields of
an accuracy are those of
:class:`~nemo_paced.rollout.accuracy.Accuracy`: ``mean``, ``standard_error`` (null for a single
problem), ``pass_at_k``, ``samples``, ``truncated``, ``mean_length``, ``per_problem``, ``groups``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from nemo_paced.errors import ConfigError
from nemo_paced.rollout.accuracy import Accuracy

Results: TypeAlias = dict[str, dict[str, Accuracy]]
BASE_LABELS = ("base", "baseline")


def write_results(path: Path, results: Results, settings: dict[str, Any]) -> None:
    """``results.json``, whole or not at all."""
    models = {
        label: {suite: accuracy.to_dict() for suite, accuracy in suites.items()}
        for label, suites in results.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"models": models, "settings": settings}, indent=1) + "\n")
    os.replace(temporary, path)


def read_settings(path: Path) -> dict[str, Any]:
    """How the models were sampled; call after :func:`read_results`, which checks the file."""
    return json.loads(path.read_text()).get("settings", {})


def read_results(path: Path) -> Results:
    """The accuracies by model and suite.

    Raises:
        ConfigError: the file is not what :func:`write_results` writes.
    """
    try:
        models = json.loads(path.read_text())["models"]
        return {
            label: {suite: Accuracy.from_dict(fields) for suite, fields in suites.items()}
            for label, suites in models.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no results file of `nemo-paced evaluate`: {error!r}; evaluate again"
        ) from error
