"""A text that notes what is asked of it: what a program decides by a text is what it asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class WatchedText(str):
    """A text that notes what a template asks of it.

    Whatever it is asked for by another text, or by characters at its ends, is in ``looked_for``;
    ``seen`` is set where more is looked at than that: its length, its letters.

    Templates may write it, and add texts before and behind it, unseen.
    """

    looked_for: set[str]
    seen: list[str]

    @classmethod
    def of(cls, text: str, like: WatchedText | None = None) -> WatchedText:
        made = cls(text)
        made.looked_for = set() if like is None else like.looked_for
        made.seen = [] if like is None else like.seen
        return made

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return str.__len__(self) > 0  # a prompt's text is not empty

    def __html__(self) -> str:
        self.seen.append("__html__")
        return str.__str__(self)

    def __add__(self, other: str) -> WatchedText:
        return WatchedText.of(str.__add__(self, other), self)

    def __radd__(self, other: str) -> WatchedText:
        return WatchedText.of(str.__add__(other, self), self)

    def __iter__(self) -> Iterator[str]:
        self.seen.append("__iter__")
        return str.__iter__(self)


def _asking(name: str) -> Callable[..., Any]:
    """A method of str that looks for other texts in its own."""

    def method(self: WatchedText, *given: Any, **options: Any) -> Any:
        for each in (*given, *options.values()):
            texts = each if isinstance(each, (tuple, list)) else [each]
            self.looked_for.update(text for text in texts if isinstance(text, str))
        if name in ("split", "rsplit") and (given[0] if given else options.get("sep")) is None:
            self.seen.append(name)  # at white space
        return _like(self, getattr(str, name)(self, *given, **options))

    return method


def _stripping(name: str) -> Callable[..., Any]:
    """A method of str that takes characters off the ends; white space stands at none."""

    def method(self: WatchedText, characters: str | None = None) -> Any:
        self.looked_for.update(each for each in characters or "" if not each.isspace())
        return _like(self, getattr(str, name)(self, characters))

    return method


def _seeing(name: str) -> Callable[..., Any]:
    """A method of str by which more is seen than whether another text is in it."""

    def method(self: WatchedText, *given: Any, **options: Any) -> Any:
        self.seen.append(name)
        return getattr(str, name)(self, *given, **options)

    return method


def _like(watched: WatchedText, result: Any) -> Any:
    if isinstance(result, str):
        return WatchedText.of(result, watched)
    if isinstance(result, (list, tuple)):
        return type(result)(_like(watched, each) for each in result)
    return result


_ASK = (
    *("__contains__", "__eq__", "__ne__", "startswith", "endswith", "removeprefix"),
    *("removesuffix", "find", "rfind", "index", "rindex", "count", "split", "rsplit"),
    *("partition", "rpartition", "replace"),
)
# what is no question, or is written above
_UNSEEN = {*dir(object), *vars(WatchedText), "maketrans", "__getnewargs__"} - {"__hash__"}
_UNSEEN -= {"__lt__", "__le__", "__gt__", "__ge__"}
for _name in dir(str):
    if _name in _ASK:
        setattr(WatchedText, _name, _asking(_name))
    elif _name in ("strip", "lstrip", "rstrip"):
        setattr(WatchedText, _name, _stripping(_name))
    elif _name not in _UNSEEN:
        setattr(WatchedText, _name, _seeing(_name))
