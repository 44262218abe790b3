"""The tokenizer of a Hugging Face directory, its vocabulary and its stop tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nemo_paced.errors import ConfigError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")


def load_tokenizer(hf_dir: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory, from its local files alone.

    Raises:
        ConfigError: the directory or its tokenizer cannot be read.
    """
    import transformers

    if not Path(hf_dir).is_dir():
        raise ConfigError(f"{str(hf_dir)!r} is no directory: give a Hugging Face model directory")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of {hf_dir} cannot be loaded: {error}") from error


def tokenizer_digest(hf_dir: str | Path) -> str:
    """A digest of the files that a tokenizer, its chat template and its end tokens are read from.

    All but the weights: a tokenizer has no list of its files.

    Raises:
        ConfigError: one cannot be read.
    """
    found = hashlib.sha256()
    try:
        for path in sorted(Path(hf_dir).rglob("*")):
            if path.is_file() and path.suffix not in _WEIGHTS and ".index." not in path.name:
                found.update(f"{path.relative_to(hf_dir)}\0".encode() + path.read_bytes())
    except OSError as error:
        raise ConfigError(f"a file of {hf_dir} cannot be read: {error}") from error
    return found.hexdigest()


def tokenizer_vocab_size(hf_dir: str | Path) -> int:
    """Highest token id + 1, added tokens included; the model's rows from there on carry no mass."""
    return max(load_tokenizer(hf_dir).get_vocab().values()) + 1


def check_same_tokens(student_dir: str | Path, teacher_dir: str | Path) -> None:
    """Refuse two models to which a token id means different tokens: distillation matches ids.

    Raises:
        ConfigError: names the lowest id that differs and both tokens.
    """
    student, teacher = (
        {index: token for token, index in load_tokenizer(folder).get_vocab().items()}
        for folder in (student_dir, teacher_dir)
    )
    for index in sorted(student.keys() | teacher.keys()):
        if student.get(index) != teacher.get(index):
            raise ConfigError(
                f"token id {index} means {student.get(index)!r} to the student ({student_dir}) and "
                f"{teacher.get(index)!r} to the teacher ({teacher_dir}): distillation needs one "
                "tokenizer; choose a teacher of the student's family"
            )


def stop_token_ids(
    tokenizer: Any, hf_dir: Path, *, end_of_turn: int | None = None
) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's EOS and those of generation_config.json.

    Base and instruct models of one family often differ here; the union serves both.

    Args:
        end_of_turn: another one, with which the chat template ends a turn.

    Raises:
        ConfigError: there is none, or generation_config.json is no JSON.
    """
    ids = named_stop_ids(tokenizer, hf_dir)
    if end_of_turn is not None:
        ids |= {end_of_turn}
    if not ids:
        raise ConfigError(
            f"{hf_dir} names no EOS token: responses would never end; set eos_token_id in its "
            "generation_config.json"
        )
    return tuple(sorted(ids))


def named_stop_ids(tokenizer: Any, hf_dir: Path) -> set[int]:
    """Ids of :func:`stop_token_ids` in a directory's files, of which there may be none.

    An id above the vocabulary is none: no model samples it.

    Raises:
        ConfigError: generation_config.json is no JSON.
    """
    ids = {tokenizer.eos_token_id}
    path = hf_dir / "generation_config.json"
    if path.exists():
        try:
            eos = json.loads(path.read_text()).get("eos_token_id")
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
        ids |= set(eos if isinstance(eos, list) else [eos])
    known = (i for i in ids - {None} if i >= 0)
    return {i for i in known if tokenizer.convert_ids_to_tokens(i) is not None}
