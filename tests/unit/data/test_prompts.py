import json
import shutil
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nemo_paced.config import DataConfig, PrivilegedContext
from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.errors import ConfigError
from nemo_paced.hf.tokenizer import check_same_tokens, tokenizer_vocab_size
from nemo_paced.quickstart.models import EOS, VOCABULARY, write_tokenizer
from nemo_paced.records import Problem

PROBLEM = Problem("p", "solve s1 f2 =", "s3", solution="s4 s3")
DATA = DataConfig(
    prompt_template="{problem}",
    teacher_prompt_template="hint {context} ; {student_prompt}",
    max_prompt_length=4,
    max_teacher_prompt_length=8,
    max_response_length=3,
)


def words(*names):
    return tuple(VOCABULARY[name] for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    return path


def test_student_and_teacher_prompts(folder):
    prompts = Prompts(folder, DATA, PrivilegedContext.expert_solution)
    student = words("solve", "s1", "f2", "=")
    assert prompts.student(PROBLEM) == student
    assert prompts.teacher(PROBLEM) == (*words("hint", "s4", "s3", ";"), *student)
    answer = Prompts(folder, DATA, PrivilegedContext.answer)
    assert answer.teacher(PROBLEM) == (*words("hint", "s3", ";"), *student)
    assert Prompts(folder, DATA, PrivilegedContext.none).teacher(PROBLEM) == student


def test_stop_tokens_are_the_union_of_both_sources(folder):
    prompts = Prompts(folder, DATA, PrivilegedContext.none)
    assert prompts.stop_token_ids == (1, 7) and prompts.eos_id == VOCABULARY[EOS] == 1
    assert prompts.response("s4 s3") == (*words("s4", "s3"), 1)
    assert prompts.response("s4 s3 s2") == words("s4", "s3", "s2"), "cut at the limit: no EOS"
    assert prompts.decode(prompts.response("s4 s3")) == "s4 s3"
    assert tokenizer_vocab_size(folder) == len(VOCABULARY)


def test_a_prompt_over_the_limit_names_problem_length_and_key(folder):
    prompts = Prompts(folder, DATA, PrivilegedContext.none)
    long = Problem("long-1", "solve s1 f2 f3 =", "s3")
    with pytest.raises(ConfigError, match=r"'long-1' has 5 tokens, above data.max_prompt_length 4"):
        prompts.student(long)


def test_prompts_belong_to_texts_and_not_to_ids(folder):
    prompts = Prompts(folder, DATA, PrivilegedContext.answer)
    first, second = Problem("0", "solve s1 =", "s3"), Problem("0", "solve s2 =", "s3")
    other = Problem("0", "solve s1 =", "s4")
    assert prompts.student(first) == words("solve", "s1", "=")
    assert prompts.student(second) == words("solve", "s2", "=")
    assert prompts.teacher(other) == (*words("hint", "s4", ";"), *prompts.student(first))


def test_the_teacher_may_see_answer_and_solution_by_name(folder):
    data = replace(DATA, teacher_prompt_template="{solution} ; {answer} ; {problem}")
    prompts = Prompts(folder, data, PrivilegedContext.answer)
    assert prompts.needs_solution
    assert prompts.text(PROBLEM, PromptKind.teacher) == "s4 s3 ; s3 ; solve s1 f2 ="
    with pytest.raises(ConfigError, match="problem 'q' has no solution"):
        prompts.teacher(Problem("q", "solve", "s1"))
    assert not Prompts(folder, data, PrivilegedContext.none).needs_solution


def test_all_problems_above_the_limit_are_told_of_at_once(folder):
    prompts = Prompts(folder, DATA, PrivilegedContext.none)
    problems = [Problem(f"p{n}", "solve " + "s1 " * n, "s3") for n in range(7)]
    prompts.check(problems[:4], PromptKind.student)
    with pytest.raises(
        ConfigError,
        match=r"3 of 7 student prompts are above data.max_prompt_length 4: problem 'p6' has 7 "
        r"tokens, 'p5' has 6 tokens, 'p4' has 5 tokens; raise it to 7",
    ):
        prompts.check(problems, PromptKind.student)
    with pytest.raises(
        ConfigError, match=r"3 of 7 evaluation prompts are above data.max_prompt_le"
    ):
        prompts.check(problems, PromptKind.evaluation)
    assert len(prompts.of(problems[6], PromptKind.evaluation)) == 7, "`evaluate` limits none"


def test_ids_above_the_vocabulary_end_nothing(folder, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [99999, -1, 7]}')
    prompts = Prompts(tmp_path, DATA, PrivilegedContext.none)
    assert prompts.stop_token_ids == (1, 7)


def test_a_missing_solution_is_named(folder):
    prompts = Prompts(folder, DATA, PrivilegedContext.expert_solution)
    with pytest.raises(ConfigError, match="problem 'q' has no solution"):
        prompts.teacher(Problem("q", "solve", "s1"))


def test_a_token_id_that_means_two_things_is_named(folder, tmp_path):
    check_same_tokens(folder, folder)
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop("s7")
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(
        ConfigError, match=rf"token id {VOCABULARY['s7']} means 's7' to the student"
    ):
        check_same_tokens(folder, tmp_path)


def byte_level(normalizer=None, *, prefix=False, post=False):
    """A tokenizer of single bytes and some pairs, as GPT-2's and Qwen's are made."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "<s>", "th", "in"])}
    made = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("i", "n")]))
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if post:
        made.post_processor = processors.TemplateProcessing("<s> $A <s>", None, [("<s>", 256)])
    return made


TOKENIZERS = {
    "bytes": byte_level(),
    "NFC, as Qwen's": byte_level(normalizers.NFC()),
    "NFKC": byte_level(normalizers.NFKC()),
    "a space before each": byte_level(prefix=True),
    "special tokens around": byte_level(post=True),
    "Metaspace beside bytes": byte_level(),
    "Metaspace, as Llama 2's": byte_level(normalizers.Prepend("\u2581\u2581")),
    "one that cuts": byte_level(),
    "one that pads": byte_level(),
}
TOKENIZERS["Metaspace beside bytes"].pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
TOKENIZERS["one that cuts"].enable_truncation(5)
TOKENIZERS["one that pads"].enable_padding(length=64)
STATEMENTS = (
    *("x", "a thing in the ring", "\u00e9" * 9, "\u0958" * 9, "\ufdfa" * 9, "one two three four"),
    *("tttttttttttttttt", "thththththththth", "", "\U0001d160" * 8, "two\r\n\r\nlines"),
)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_many_prompts_are_measured_as_single_ones_are(tmp_path, name):
    PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name], eos_token="<s>").save_pretrained(
        tmp_path
    )
    data = DataConfig(prompt_template="{problem}", max_prompt_length=16)
    prompts = Prompts(tmp_path, data, PrivilegedContext.none)
    problems = [Problem(str(i), text, "1") for i, text in enumerate(STATEMENTS * 200)]
    kind, told = PromptKind.evaluation, []
    one_by_one = [len(prompts.of(problem, kind)) for problem in problems]
    assert prompts.lengths(problems, kind, told.append) == one_by_one
    assert told == [1024, 2048, 2200]
    for limit in (0, 1, 8, 9, 15, 16, 17, 26, 27, 28, 40, 53, 54, 64, 80, 95, 96, 162):
        above = dict(prompts.above(problems, kind, limit))
        assert above == {str(i): n for i, n in enumerate(one_by_one) if n > limit}, limit


def test_short_prompts_are_within_their_limit_without_being_tokenised(tmp_path, monkeypatch):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<s>")
    tokenizer.save_pretrained(tmp_path)
    prompts = Prompts(tmp_path, DataConfig(prompt_template="{problem}"), PrivilegedContext.none)
    asked = []
    monkeypatch.setattr(
        prompts, "_counts", lambda texts, special: asked.append(texts) or [0] * len(texts)
    )
    prompts.check([PROBLEM, Problem("long", "x" * 1025, "1")], PromptKind.student)
    assert asked == [["x" * 1025]]


def test_the_identity_of_prompts_is_all_that_they_are_made_with(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")

    def identity(path=folder, context=PrivilegedContext.none, **data):
        return Prompts(path, replace(DATA, **data), context).identity(PromptKind.teacher)

    same = identity()
    assert identity(tmp_path / "copy") == same
    assert identity(max_response_length=5) == same
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"0")
    assert identity(tmp_path / "copy") == same
    (tmp_path / "copy" / "generation_config.json").write_text("{}")
    others = [
        identity(tmp_path / "copy"),
        identity(context=PrivilegedContext.answer),
        identity(prompt_template="solve {problem}"),
        identity(teacher_prompt_template="{context} ; {student_prompt}"),
        identity(max_teacher_prompt_length=9),
        identity(use_chat_template=False),
        Prompts(folder, DATA, PrivilegedContext.none).identity(PromptKind.student),
    ]
    assert len({same, *others}) == 1 + len(others)
