"""``results.json``: ``{"models": {label: {suite: Accuracy}}}``, and what else a writer adds.

A suite is ``heldout``, ``forgetting`` or the name of a problem file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nemo_paced.rollout.accuracy import Accuracy


def write_results(path: Path, results: dict[str, dict[str, Accuracy]], **more: Any) -> None:
    """``results.json``, whole or not at all."""
    models = {
        label: {suite: accuracy.to_dict() for suite, accuracy in suites.items()}
        for label, suites in results.items()
    }
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"models": models, **more}, indent=1) + "\n")
    os.replace(temporary, path)


def read_results(path: Path) -> dict[str, dict[str, Accuracy]]:
    models = json.loads(path.read_text())["models"]
    return {
        label: {suite: Accuracy.from_dict(fields) for suite, fields in suites.items()}
        for label, suites in models.items()
    }
