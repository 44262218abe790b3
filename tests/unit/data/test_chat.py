"""Chat templates as some forty model families publish them."""

from datetime import date

import pytest

from nemo_paced.config import DataConfig, EvaluationConfig, PrivilegedContext
from nemo_paced.data.chat import ChatTemplate, Thoughts, opens_thought, variables_of
from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.errors import ConfigError
from nemo_paced.records import Problem
from tests import chat_templates

TODAY = date(2025, 3, 1)
QUESTION = "How many are 3 < 4 & {5}?"
# what some of them end a response with
ENDS = {
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "gptoss": "<|return|>",
    "llama3_1": "<|eot_id|>",
    "phi3": "<|end|>",
    "qwen3": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}


def chat(name, *, system="", **variables):
    tokenizer = chat_templates.tokenizer_of(name)
    return ChatTemplate(tokenizer, system=system, variables=variables, today=TODAY)


def prompts(tmp_path, name, context=PrivilegedContext.none, evaluation=None, **data):
    folder = chat_templates.write(tmp_path / "model", name)
    return Prompts(folder, DataConfig(**data), context, evaluation)


@pytest.mark.parametrize("name", chat_templates.NAMES)
def test_every_published_template_holds_the_question_once(name):
    text = chat(name)(QUESTION)
    assert text.count(QUESTION) == 1 and not text.endswith(QUESTION)


@pytest.mark.parametrize("name", chat_templates.NAMES)
def test_a_system_turn_is_there_or_refused(name):
    try:
        text = chat(name, system="Be brief.")(QUESTION)
    except ConfigError as refusal:
        assert str(refusal).startswith("data.system_prompt is set and the chat template")
        assert name == "gemma"
    else:
        assert text.count("Be brief.") == 1 and text.count(QUESTION) == 1


@pytest.mark.parametrize("name", chat_templates.NAMES)
def test_a_prompt_is_the_same_tomorrow(name, monkeypatch):
    import transformers.utils.chat_template_utils as theirs

    class Tomorrow(theirs.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 1)

    today = chat(name)(QUESTION)
    monkeypatch.setattr(theirs, "datetime", Tomorrow)
    assert chat(name)(QUESTION) == today and "2031" not in today


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer"])
def test_templates_that_tell_the_date_tell_the_given_one(name):
    text = chat(name)(QUESTION)
    assert "01 Mar 2025" in text or "2025-03-01" in text


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next"])
def test_templates_that_leave_out_a_text_get_it_as_a_part(name):
    assert QUESTION in chat(name)(QUESTION)


@pytest.mark.parametrize("name", sorted(ENDS))
def test_the_end_of_turn_is_a_stop_token_beside_the_tokenizers_own(tmp_path, name):
    made = prompts(tmp_path, name)
    stops = made.tokenizer.convert_ids_to_tokens(list(made.stop_token_ids))
    assert set(stops) == {"<eos>", ENDS[name]}
    assert made.tokenizer.convert_ids_to_tokens(made.response("42")[-1]) == ENDS[name]


def test_without_a_chat_a_response_ends_as_the_tokenizer_says(tmp_path):
    made = prompts(tmp_path, "qwen3", use_chat_template=False)
    assert made.tokenizer.convert_ids_to_tokens(list(made.stop_token_ids)) == ["<eos>"]
    assert made.response("42")[-1] == made.eos_id == made.tokenizer.eos_token_id


def test_thinking_is_told_to_the_template():
    assert not chat("qwen3")(QUESTION).endswith("</think>\n\n")
    off, on = (chat("qwen3", enable_thinking=value)(QUESTION) for value in (False, True))
    assert off.endswith("<think>\n\n</think>\n\n") and not opens_thought(off)
    assert on == chat("qwen3")(QUESTION) and not opens_thought(on)
    assert opens_thought(chat("deepseek_r1_distill")(QUESTION))


def test_a_variable_that_the_template_does_not_read_is_named():
    with pytest.raises(ConfigError, match=r"holds 'enable_thinkng', .* reads .*enable_thinking"):
        chat("qwen3", enable_thinkng=False)
    with pytest.raises(ConfigError, match="does not read; it reads no variable"):
        chat("gemma", enable_thinking=False)
    assert "Today Date: Monday" in chat("llama3_1", date_string="Monday")(QUESTION)


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("qwen3", "enable_thinking"),
        ("glm4moe", "enable_thinking"),
        ("nemotron_3_nano", "enable_thinking"),  # gives it a default itself
        ("gemma4_v5", "enable_thinking"),
        ("gptoss", "reasoning_effort"),
        ("llama3_1", "date_string"),
    ],
)
def test_variables_that_a_user_may_set_are_known(name, variable):
    names = variables_of(chat_templates.tokenizer_of(name))
    assert variable in names and not names & {"messages", "bos_token", "tools"}


def test_templates_that_fail_in_any_way_are_told_of():
    tokenizer = chat_templates.fresh("qwen3")
    for source, told in (
        ("{% if %}", "the chat template fails"),
        ({"rag": "x", "tool_use": "y"}, "the chat template fails"),
        ("{%+ generation +%}{{ messages }}{% endgeneration %}", "does not read; it reads no"),
    ):
        tokenizer.chat_template = source
        with pytest.raises(ConfigError, match=told):
            ChatTemplate(tokenizer, system="", variables={"thinking": True}, today=TODAY)
    tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(ConfigError, match=r"the chat template fails: .*zero"):
        ChatTemplate(tokenizer, system="", variables={}, today=TODAY)


@pytest.mark.parametrize(
    ("name", "variables", "written"),
    [
        ("gptoss", {}, "<|channel|>final<|message|>"),
        ("qwen3", {}, "<think>\n\n</think>\n\n"),
        ("qwen3", {"enable_thinking": False}, ""),
        ("llama3_1", {}, ""),
        ("phi3", {}, ""),
    ],
)
def test_what_stands_before_a_response_is_known(name, variables, written):
    assert chat(name, **variables).written_before_response() == written


def test_a_template_that_needs_a_system_turn_says_so():
    tokenizer = chat_templates.fresh("qwen3")
    needs = "{{ messages[1].content }}|{{ messages[0].content }}|"
    picky = "{% if messages[0].role != 'system' %}{{ raise_exception('No!') }}{% endif %}" + needs
    for source, told in ((needs, "the chat template"), (picky, "the chat template fails: No!")):
        tokenizer.chat_template = source
        with pytest.raises(ConfigError, match=f"{told}.*it needs a system turn: set data.system"):
            ChatTemplate(tokenizer, system="", variables={}, today=TODAY)
        made = ChatTemplate(tokenizer, system="Be brief.", variables={}, today=TODAY)
        assert made(QUESTION) == f"{QUESTION}|Be brief.|"


def test_a_chat_of_several_turns_keeps_its_own_system_turn():
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    made = chat("qwen2_5", system="Be brief.")
    text = made.of_turns([*turns, {"role": "user", "content": "3"}], add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.") and text.endswith("assistant\n")
    own = [{"role": "system", "content": "Own."}, *turns]
    text = made.of_turns(own, add_generation_prompt=False)
    assert "Be brief" not in text and text.endswith("2"), "the last turn is gone on with"


def test_teacher_and_evaluation_have_values_of_their_own(tmp_path):
    made = prompts(
        tmp_path,
        "qwen3",
        prompt_template="{problem}",
        chat_template_kwargs={"enable_thinking": False},
        system_prompt="Be brief.",
        teacher_system_prompt="",
        teacher_chat_template_kwargs={"enable_thinking": True},
        evaluation=EvaluationConfig(
            system_prompt="Be long.", chat_template_kwargs={"enable_thinking": None}
        ),
    )
    problem = Problem("p", QUESTION, "60")
    student, teacher, evaluation = (made.text(problem, kind) for kind in PromptKind)
    assert "Be brief." in student and student.endswith("</think>\n\n")
    assert "system" not in teacher and not teacher.endswith("</think>\n\n")
    assert "Be long." in evaluation and not evaluation.endswith("</think>\n\n")
    ids = made.student(problem)
    assert made.tokenizer.decode(ids) == student and ids == made.of(problem, PromptKind.student)


@pytest.mark.parametrize("name", ["llama3_1", "gemma", "deepseek_r1_distill"])
def test_the_first_token_is_there_once(tmp_path, name):
    made = prompts(tmp_path, name)
    ids = made.student(Problem("p", QUESTION, "60"))
    assert ids[0] == made.tokenizer.bos_token_id and ids.count(ids[0]) == 1


def test_chat_settings_without_a_chat_template_are_refused(tmp_path):
    made = prompts(tmp_path, None, system_prompt="Be brief.")
    made.tokenizer.chat_template = None
    with pytest.raises(
        ConfigError, match=r"data.system_prompt is 'Be brief.' and the tokenizer of"
    ):
        made.with_chats()
    with pytest.raises(ConfigError, match=r"data.teacher_system_prompt is 'x' and data.use_chat"):
        DataConfig(use_chat_template=False, teacher_system_prompt="x")
    with pytest.raises(ConfigError, match="holds 'tokenize', which is decided here"):
        DataConfig(chat_template_kwargs={"tokenize": True})


def test_thoughts_are_found_by_their_tokens():
    tokenizer = chat_templates.tokenizer_of("qwen3")
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    thoughts = Thoughts(tokenizer, opened=False)
    assert thoughts.length([begin, 5, 6, end, 7]) == (4, True)
    assert thoughts.length([begin, 5, 6]) == (3, False)
    assert thoughts.length([5, 6]) == (0, True)
    assert Thoughts(tokenizer, opened=True).length([5, 6]) == (2, False)
    assert Thoughts(tokenizer, opened=True).length([5, end, 6]) == (2, True)


AWKWARD = (
    "Solve \\frac{x}{2} = 3 for $x$.\nThe user's system has two equations.",
    " spaces around \n",
    "\r\nWindows\r\nlines\r\n",
    "{{ bos_token }}{% if x %} is no template </think> here",
    "<tool_response>3</tool_response>",
    "<|im_start|>assistant\nThe answer is 4.<|im_end|>",
    "Think. /no_think",
    "Think. /nothink",
    "'single' \"double\" \\\\ & <b> \u00e9 \u4e09 \U0001d54f \t \u00a0.",
    "system, user, assistant, tool, content, text, image; ], [, :, ...",
    *("x", "42", "Is 7 odd?", "is 7 odd?", "one <eos> two", "Off /no_think"),
    "[" + "1, " * 5000 + "2]",
)


RENDERED = ()  # templates that look for texts which most problems have


def rendered(made, text):
    turn = {"role": "user", "content": text}
    return outcome(lambda turns: made.of_turns(turns, add_generation_prompt=True), [turn])


def outcome(make, *arguments):
    """What comes out, or the error: some templates refuse a turn that is a tool's response."""
    try:
        return make(*arguments)
    except ConfigError as refusal:
        return f"refused: {refusal}"


@pytest.mark.parametrize("name", chat_templates.NAMES)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_prompt_is_what_the_template_renders(name, system, monkeypatch):
    if name == "gemma" and system:
        pytest.skip("it has no system turn")
    made = chat(name, system=system)
    for text in AWKWARD:
        assert outcome(made, text) == rendered(made, text)
    times = []
    monkeypatch.setattr(made, "_rendered", lambda text: times.append(text) or "")
    made("Find x: 3x = 7")
    assert not times or name in RENDERED, "most are rendered once, when they are made"


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.content }}",
        "{{ m.content | trim }}",
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ m.content | e }}",
        "{{ m.content[:40] }}",
        "{{ m.content.split() | join(' ') }}",
        "{{ m.content.split('</think>')[-1] }}",
        "{{ m.content.replace('assistant', 'helper') }}",
        "{{ m.content | replace(old='system', new='list') }}",
        "{% if '/no_think' in m.content %}{% else %}<think>{% endif %}{{ m.content }}",
        "{% set off = '/nothink' %}{% if off in m.content %}!{% endif %}{{ m.content }}",
        "{% for t in ['Think', 'x'] %}{{ m.content.startswith(t) }}{% endfor %}{{ m.content }}",
        "{% if m.content in ('x', 'y') %}one letter: {% endif %}{{ m.content }}",
        "{% if m.content | length > 5000 %}a long one: {% endif %}{{ m.content }}",
        "{{ m.content }}{{ m.content }}",
        "{% macro w(t) %}{{ t.strip('x') }}{% endmacro %}{{ w(m.content) }}",
        "{{ m.content.replace(eos_token, '') }}",
        "{{ m.content | replace(eos_token, '') }}",
        "{{ m.content.split(sep)[0] }}",
        "{% set off = '/no_think' if m.role else '/x' %}{{ off in m.content }}{{ m.content }}",
        "{% set marks = {'off': '/no_think'} %}{{ marks.off in m.content }}{{ m.content }}",
        "{{ ('/no' ~ '_think') in m.content }}{{ m.content }}",
        "{{ m.content.isdigit() }}{{ m.content }}",
        "{{ m.content.split(None, 1) | join(' ') }}",
        "{{ raise_exception('long') if (m.content ~ '') | length > 9000 else m.content }}",
        "{% if m.content | length < 12 %}short: {% endif %}{{ m.content }}",
        "{% if m.content[0] | upper == m.content[0] %}A sentence: {% endif %}{{ m.content }}",
    ],
)
def test_a_template_may_do_anything_with_a_text(written):
    tokenizer = chat_templates.fresh("qwen3")
    tokenizer.chat_template = "{% for m in messages %}" + written + "{% endfor %}|"
    try:
        variables = {"sep": "Think"} if "sep" in written else {}
        made = ChatTemplate(tokenizer, system="", variables=variables, today=TODAY)
    except ConfigError as refusal:
        assert "leaves out the user's text" in str(refusal) and "upper" in written
        return
    for text in AWKWARD:
        assert outcome(made, text) == rendered(made, text), text
