"""What a Hugging Face directory holds, without loading weights: configuration and identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nemo_paced.errors import ConfigError

_BLOCK = 1 << 20  # bytes
_BLOCKS = 64  # read of each weight file for the fingerprint


def load_hf_config(hf_dir: str | Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a Hugging Face directory.

    Raises:
        ConfigError: it is missing or no JSON.
    """
    path = Path(hf_dir) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give a Hugging Face model directory") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error


def context_length(hf_dir: str | Path) -> int | None:
    """Longest sequence that a model was made for, prompt and response together, in tokens.

    This is ``max_position_embeddings``, which includes what Llama 3's RoPE scaling adds; vLLM
    serves no more. ``None`` where ``config.json`` does not say.
    """
    length = load_hf_config(hf_dir).get("max_position_embeddings")
    return None if length is None else int(length)


def model_fingerprint(hf_dir: str | Path) -> str:
    """Digest of a model's weights, configuration, tokenizer and chat template: 16 hex digits.

    Of each weight file it takes the name, the size, and 64 blocks of 1 MiB spread evenly (a smaller
    file whole): training moves every tensor, and hashing all of a large model would take minutes.
    Copies of a directory agree; the same weights sharded in another way do not.
    """
    folder = Path(hf_dir)
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(min(_BLOCKS, -(-size // _BLOCK))):
                file.seek(block * max(_BLOCK, size // _BLOCKS))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
