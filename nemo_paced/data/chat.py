"""The chat template of a tokenizer around one user text, checked when made.

Templates are published with models and differ in more than their tokens: some refuse a system turn,
some leave out what they do not understand, some want a turn as a list of parts, some tell today's
date, some open a thought. What would go wrong in silence is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

from nemo_paced.data.watched_text import WatchedText
from nemo_paced.errors import ConfigError
from nemo_paced.settings.data import RESERVED

# What thinking models put around a thought: a token each.
THOUGHTS = {
    "<think>": "</think>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
}
# Variables by which templates are told whether to think, and how much.
SWITCHES = {"enable_thinking", "thinking", "reasoning_effort", "reasoning_strength"}
_PROBE, _ANSWER, _SYSTEM = "What is 17 + 25?", "It is 42, I think.", "Answer in a word."
_NOTHING = "\ue0a7\ue3b1\ue8d2\uf0e5"  # characters without a meaning
# Texts that a template which does more than write its text would change: awkward ones, and some of
# every length.
_PROBES = (
    "\u00c9 \u222b 1  <a>&amp;'b'\"c\" \\frac{1}{2}\\\\\r\n\n\t{{ d }} {% e %} \U0001d54f \u4e09.",
    *("7", "Seven.", *(("seven and " * 4000)[: 2**n] for n in range(16))),
)
_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # transformers' own, not Jinja's


class ChatTemplate:
    """A tokenizer's chat template with all that a run decides about it.

    Args:
        tokenizer: one that has a chat template.
        system: text of the system turn; empty: none is given, and the template does as it likes.
        variables: of the template, such as ``enable_thinking``.
        today: what templates are told that ask for the date.
        keys: names of the settings behind ``system`` and ``variables``, for messages.

    Raises:
        ConfigError: the template does not read a variable, refuses the turns or leaves a text out.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str,
        variables: Mapping[str, Any],
        today: date,
        keys: tuple[str, str] = ("data.system_prompt", "data.chat_template_kwargs"),
    ) -> None:
        self._tokenizer = tokenizer
        self._system = system
        self._check_variables(variables, keys[1])
        moment = datetime(today.year, today.month, today.day)
        self._variables = {"strftime_now": moment.strftime, **variables}
        self._in_parts = self._form_of_turns(keys[0])
        known = (*tokenizer.special_tokens_map.values(), *variables.values())
        self._looked_for = {each for each in known if isinstance(each, str) and each}
        self._looked_for |= _texts_looked_for(tokenizer)
        self._around = self._text_around()

    def __call__(self, text: str) -> str:
        """Text of the prompt whose one user turn is ``text``, up to where the response begins.

        Rendering takes tens of microseconds, and problems come by the hundred thousand: what stands
        around a text is the same for all that the template does not look into.
        """
        if self._around is None or self._may_be_read(text):
            return self._rendered(text)
        before, after = self._around
        return f"{before}{text}{after}"

    def _rendered(self, text: str) -> str:
        turns = _turns(self._in_parts, system=self._system, user=text)
        return self._render(turns, add_generation_prompt=True)

    def _may_be_read(self, text: str) -> bool:
        """Whether a text has anything that the template takes off, or decides by."""
        at_end = not text or text[0].isspace() or text[-1].isspace()
        return at_end or any(each in text for each in self._looked_for)

    def _text_around(self) -> tuple[str, str] | None:
        """What the template writes before and behind a user text; ``None``: it depends on it.

        A template decides by what it asks of the text. What it asks of a text that holds nothing is
        noted: a text that gives the same answers is written in the same place.
        """
        watched = WatchedText.of(_NOTHING)
        try:
            before, found, after = self._rendered(watched).partition(_NOTHING)
            self._looked_for |= watched.looked_for - {""}
            if watched.seen or not found or _NOTHING in after or self._may_be_read(_NOTHING):
                return None
            for probe in _PROBES:  # what reads a text without asking: filters written in C
                for text in self._looked_for:
                    probe = probe.replace(text, "")
                probe = probe.strip()
                if probe and self._rendered(probe) != f"{before}{probe}{after}":
                    return None
        except ConfigError:  # it refuses some texts: each is rendered by itself
            return None
        return before, after

    def of_turns(self, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Text of a chat of several turns, behind the system turn unless it begins with its own.

        Args:
            turns: each with ``role`` and ``content``.
            add_generation_prompt: whether a response follows; else the last turn is gone on with.
        """
        own = "" if turns[0]["role"] == "system" else self._system
        return self._render(
            [*_turns(self._in_parts, system=own), *(
                _turn(turn["role"], turn["content"], self._in_parts) for turn in turns
            )],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def after_response(self) -> str:
        """What the template writes behind a response: its end of turn, where it has one."""
        turns = _turns(self._in_parts, system=self._system, user=_PROBE, assistant=_ANSWER)
        try:
            rendered = self._render(turns, add_generation_prompt=False)
        except ConfigError:  # a template for prompts alone
            return ""
        return rendered.rpartition(_ANSWER)[2] if _ANSWER in rendered else ""

    def written_before_response(self) -> str | None:
        """What the template writes of a turn between the prompt and its text; ``None``: no such.

        A response that is given as text lacks it: a channel's name, an empty thought.
        """
        turns = _turns(self._in_parts, system=self._system, user=_PROBE, assistant=_ANSWER)
        try:
            rendered = self._render(turns, add_generation_prompt=False)
        except ConfigError:
            return None
        prompt = self(_PROBE)
        if not rendered.startswith(prompt) or _ANSWER not in rendered:
            return None
        return rendered[len(prompt) :].partition(_ANSWER)[0]

    def _render(self, turns: list[dict[str, Any]], **how: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, **how, **self._variables
            )
        except Exception as error:
            raise ConfigError(f"the chat template fails: {error}") from error

    def _form_of_turns(self, key: str) -> bool:
        """Whether the template takes a turn as a list of parts, by what comes out.

        Templates of models that also see images do, and make nothing of a text, without an error.

        Raises:
            ConfigError: neither form gives a prompt; says whether one without the system turn, or
                with one, would.
        """
        problems = {in_parts: self._problem(self._system, in_parts) for in_parts in (False, True)}
        for in_parts, problem in problems.items():
            if not problem:
                return in_parts
        other = "" if self._system else _SYSTEM
        if all(self._problem(other, in_parts) for in_parts in (False, True)):
            raise ConfigError(problems[False])
        if self._system:
            raise ConfigError(
                f"{key} is set and {problems[False]}; leave it out, and write its text into the "
                "prompt template"
            )
        raise ConfigError(f"{problems[False]}; it needs a system turn: set {key}")

    def _problem(self, system: str, in_parts: bool) -> str:
        """What is wrong with a prompt of turns in this form; empty: nothing."""
        turns = _turns(in_parts, system=system, user=_PROBE)
        try:
            rendered = self._render(turns, add_generation_prompt=True)
        except ConfigError as error:
            return str(error)
        if _PROBE not in rendered:
            return "the chat template leaves out the user's text"
        if system.strip() not in rendered:
            return "the chat template leaves out the system turn"
        return ""

    def _check_variables(self, variables: Mapping[str, Any], key: str) -> None:
        """Refuse a variable that the template never reads: it would change nothing."""
        if not variables:
            return
        read = _names(self._tokenizer)[0]
        for name in variables:
            if name not in read:
                told = ", ".join(sorted(variables_of(self._tokenizer)))
                raise ConfigError(
                    f"{key} holds {name!r}, which the chat template does not read; it reads "
                    f"{told or 'no variable'}"
                )


def variables_of(tokenizer: Any) -> set[str]:
    """Variables of a chat template that a user may set.

    They are read and not assigned, or looked for before they are given a default.
    """
    read, assigned, looked_for = _names(tokenizer)
    given = {*RESERVED, *tokenizer.special_tokens_map, "raise_exception", "strftime_now"}
    return (read - (assigned - looked_for)) - given


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends inside a thought: the response begins with the rest of it."""
    return prompt.rstrip().endswith(tuple(THOUGHTS))


class Thoughts:
    """Finds the thought that a response begins with, by its tokens.

    Args:
        opened: whether prompts end inside a thought.
    """

    def __init__(self, tokenizer: Any, *, opened: bool) -> None:
        ids = tokenizer.added_tokens_encoder
        self._begins = {ids[begin] for begin in THOUGHTS if begin in ids}
        self._ends = {ids[end] for end in THOUGHTS.values() if end in ids}
        self._opened = opened

    def __bool__(self) -> bool:
        """Whether the tokenizer has tokens for the end of a thought."""
        return bool(self._ends)

    def length(self, response_ids: Sequence[int]) -> tuple[int, bool]:
        """Tokens of a response's thought, its marks included, and whether it ends."""
        for position, token in enumerate(response_ids):
            if token in self._ends:
                return position + 1, True
        if self._opened or not self._begins.isdisjoint(response_ids):
            return len(response_ids), False
        return 0, True


def _turns(in_parts: bool, **texts: str) -> list[dict[str, Any]]:
    """Turns of a chat by their roles, without empty ones."""
    return [_turn(role, text, in_parts) for role, text in texts.items() if text]


def _turn(role: str, text: str, in_parts: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}


def _texts_looked_for(tokenizer: Any) -> frozenset[str]:
    """Texts that a chat template compares, searches, replaces or splits with.

    Of a template that joins texts first, where :class:`WatchedText` is lost from sight: in macros,
    blocks and by ``~``. White space that is taken off the ends of a text is not among them.
    """
    from jinja2 import nodes

    tree = _tree(tokenizer)
    joins = (nodes.Macro, nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Concat)
    if next(tree.find_all(joins), None) is None:
        return frozenset()

    def given(node: Any) -> list[Any]:
        match node:
            case nodes.Compare():
                return [node.expr, *(operand.expr for operand in node.ops)]
            case nodes.Assign():
                return [node.node]
            case nodes.For():
                return [node.iter]
        return [*node.args, *(keyword.value for keyword in node.kwargs)]

    found: set[str] = set()
    kinds = (nodes.Compare, nodes.Assign, nodes.For, nodes.Call, nodes.Filter, nodes.Test)
    for node in tree.find_all(kinds):
        items: list[Any] = []
        for value in given(node):
            items += value.items if isinstance(value, (nodes.List, nodes.Tuple)) else [value]
        texts = [item.value for item in items if isinstance(item, nodes.Const)]
        called = getattr(node, "node", None)
        if isinstance(called, nodes.Getattr) and called.attr in ("strip", "lstrip", "rstrip"):
            texts = [each for text in texts for each in str(text) if not each.isspace()]
        found |= {text for text in texts if isinstance(text, str) and text}
    return frozenset(found)


def _tree(tokenizer: Any) -> Any:
    """A chat template, parsed.

    Raises:
        ConfigError: it cannot be, or none of several is the default.
    """
    from jinja2 import Environment, TemplateError

    try:
        source = _TAG.sub("", tokenizer.get_chat_template())
        return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except (TemplateError, ValueError) as error:
        raise ConfigError(
            f"the chat template fails: {error}; mend the tokenizer's chat_template"
        ) from error


def _names(tokenizer: Any) -> tuple[set[str], set[str], set[str]]:
    """Names that a chat template reads from outside, assigns, and asks whether they are given.

    Raises:
        ConfigError: the template cannot be parsed, or none of several is the default.
    """
    from jinja2 import meta, nodes

    tree = _tree(tokenizer)
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = ("defined", "undefined", "default", "d")
    looked_for = {
        each.node.name
        for each in tree.find_all((nodes.Test, nodes.Filter))
        if each.name in asked and isinstance(each.node, nodes.Name)
    }
    return meta.find_undeclared_variables(tree), assigned, looked_for
