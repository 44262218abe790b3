"""The example of docs/extending.md, followed in a copy of the code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def insert(path, before, lines):
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} has no place of its own for it: {before!r}"
    path.write_text(text.replace(before, "".join(line + "\n" for line in lines) + before))


def test_a_divergence_is_added_as_the_page_says(tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    _, kinds, dense = re.split(r"^# .*\n", block[1], flags=re.M)
    for folder in ("nemo_paced", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "slow", "models", "assets")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    member, share = kinds.splitlines()
    losses, naive = tmp_path / "nemo_paced/losses", tmp_path / "tests/dense.py"
    insert(losses / "kinds.py", '    adaptive_kl = "adaptive_kl"', [member])
    insert(losses / "kinds.py", "    DivergenceKind.forward_kl: (1.0", [share])
    insert(naive, '    assert kind == "adaptive_kl"', dense.splitlines())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/unit/losses/test_divergence.py",
         "tests/unit/losses/test_linear_divergence.py", "-k", "jeffreys and match"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 12
