"""Published chat templates, from the package ``trl``, on a tokenizer of bytes with their tokens."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(find_spec("trl").origin).parent / "chat_templates"
# those of trl's own, for training, differ in marks around what is trained on
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
SPECIAL = (
    *("<bos>", "<eos>", "<think>", "</think>", "<end_of_turn>", "<|eot_id|>", "<|end|>"),
    *("<|return|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<turn|>", "<|eot|>"),
    *("<|im_start|>", "<|im_end|>"),
)


@cache
def tokenizer_of(name):
    """The same as :func:`fresh`, once for all tests: not to be changed."""
    return fresh(name)


def fresh(name):
    """A tokenizer of single bytes with a published template; ``None``: with none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    made.add_tokens(list(SPECIAL), special_tokens=True)
    if name is not None:
        made.chat_template = (FOLDER / f"{name}.jinja").read_text()
    return made


def write(folder, name):
    """Save such a tokenizer, as a model's directory has it."""
    tokenizer_of(name).save_pretrained(folder)
    return folder
