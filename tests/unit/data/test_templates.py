"""Prompt templates: fields, and braces that are text."""

import pytest

from nemo_paced.config import DataConfig, PacedConfig, PrivilegedContext, TeacherConfig
from nemo_paced.errors import ConfigError
from nemo_paced.settings import template

VALUES = {"problem": "x^{2} {answer} }{", "answer": "4"}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        (r"{problem} \boxed{}", r"x^{2} {answer} }{ \boxed{}"),
        (r"\boxed{\frac{1}{2}} {answer}", r"\boxed{\frac{1}{2}} 4"),
        (r"\boxed{\text{two words}} {answer}", r"\boxed{\text{two words}} 4"),
        ("{answer}{answer}", "44"),
        ("{{answer}} {{}} {{two words}}", "{answer} {} {two words}"),  # as in str.format
        ("{{{answer}}}", "{4}"),
        ("{ } {0} {1,2} {-1} } {", "{ } {0} {1,2} {-1} } {"),
        ("%s $answer {answer}%", "%s $answer 4%"),
    ],
)
def test_fields_are_filled_and_other_braces_stay(text, filled):
    template.check("key", text, VALUES)
    assert template.fill(text, VALUES) == filled


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{problm}", r"key holds \{problm\}, which is no field: its fields are \{problem\}, "),
        (r"\boxed{word}", r"write \{\{word\}\} for the text \{word\}"),
        ("{answer:>9}", r"holds \{answer:>9\}: a field is its name alone; write \{answer\}"),
        ("{answer!r}", "a field is its name alone"),
        ("{problem.id}", "a field is its name alone"),
        ("{ problem }", "a field is its name alone"),
    ],
)
def test_what_is_no_field_is_refused_by_name(text, told):
    with pytest.raises(ConfigError, match=told):
        template.check("key", text, VALUES)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prompt_template": "Solve it."}, r"data.prompt_template has no \{problem\} field"),
        ({"prompt_template": "{{problem}}"}, r"has no \{problem\} field"),
        ({"prompt_template": "{student_prompt}"}, r"holds \{student_prompt\}, which is no field"),
        (
            {"prompt_template": r"{problem} \boxed{answer}"},
            r"holds \{answer\}, which would show the student the answer",
        ),
        ({"teacher_prompt_template": "{context}"}, r"teacher_prompt_template has no \{problem\}"),
        ({"teacher_prompt_template": "{problem}{hint}"}, r"teacher_prompt_template holds \{hint\}"),
    ],
)
def test_the_settings_check_their_templates(settings, told):
    with pytest.raises(ConfigError, match=told):
        DataConfig(**settings)


def test_a_context_that_the_teacher_would_not_see_is_refused():
    data = DataConfig(teacher_prompt_template="Think. {student_prompt}")
    with pytest.raises(ConfigError, match="the teacher would not see it"):
        PacedConfig(data=data)
    none = TeacherConfig(hf_path="elsewhere", privileged_context=PrivilegedContext.none)
    PacedConfig(data=data, teacher=none)


def test_a_self_teacher_may_differ_by_its_chat_alone():
    none = TeacherConfig(privileged_context=PrivilegedContext.none)
    with pytest.raises(ConfigError, match="teacher and student would be identical"):
        PacedConfig(teacher=none)
    with pytest.raises(ConfigError, match="teacher and student would be identical"):
        PacedConfig(teacher=none, data=DataConfig(teacher_system_prompt=""))
    PacedConfig(teacher=none, data=DataConfig(teacher_system_prompt="Be brief."))
    PacedConfig(teacher=none, data=DataConfig(teacher_chat_template_kwargs={"thinking": True}))
