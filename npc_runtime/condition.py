"""The condition language of `knows[].when`: read by a small parser of our own, asked about the facts of a game.

    condition  = all { "or" all }
    all        = one { "and" one }
    one        = "not" one | "(" condition ")" | comparison
    comparison = value [ ( "==" | "!=" | "<" | "<=" | ">" | ">=" | "in" | "not" "in" ) value ]
    value      = text | number | "true" | "false" | name | "[" [ value { "," value } ] "]"
    text       = "…" or '…', with \\ before a quote or a backslash
    name       = word { "." word }, a fact of the game

A fact that is not set (or null) equals nothing, is in nothing, is neither less nor more than anything, and counts as
false; so `quest.dragon != "dead"` holds before the quest began. `==` never mixes kinds: `1 == true` and `1 == "1"` are
false. `<` and its like compare numbers only. `in` looks for a value in a list, or for a text in a text, there without
regard to case. Alone, a value holds unless it is false, 0, "" or []. Nothing that is asked can fail or take long.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Condition", "ConditionError", "parse_condition"]

MAX_CHARS = 500
MAX_DEPTH = 16
MAX_WORDS = 8  # of a name; `_look_up` may try every way to split one

Facts = Mapping[str, Any]
_Ask = Callable[[Facts], bool]
_Get = Callable[[Facts], Any]

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<number>-?\d{1,15}(?:\.\d{1,15})?(?![\w.]))
    |(?P<name>[^\W\d]\w*(?:\.\w+)*)
    |(?P<sign>==|!=|<=|>=|[<>()\[\],])
    |(?P<wrong>&&|\|\||=|!|.))""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = frozenset({"and", "or", "not", "in", "true", "false"})
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda left, right: bool(left < right),
    "<=": lambda left, right: bool(left <= right),
    ">": lambda left, right: bool(left > right),
    ">=": lambda left, right: bool(left >= right),
}
_INSTEAD = {
    "=": "Write == to compare.",
    "&&": "Write and.",
    "||": "Write or.",
    "!": "Write not, or != to compare.",
    '"': "Close the text with the quote that opened it.",
    "'": "Close the text with the quote that opened it.",
    **dict.fromkeys("“”„«»‘’", "Use straight quotes: \" or '."),
}


class ConditionError(ValueError):
    """A condition that cannot be read: `what` names the column, `remedy` says how to write it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}. {remedy}")
        self.what = what
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition that was read; `names` are the facts it asks for."""

    text: str
    names: frozenset[str]
    _ask: _Ask = field(repr=False, compare=False)

    def holds(self, facts: Facts) -> bool:
        """Whether it is true of these facts: flat (`"quest.dragon": …`), nested, or both."""
        return self._ask(facts)


def parse_condition(text: str) -> Condition:
    """Read a condition. Raises `ConditionError`."""
    if len(text) > MAX_CHARS:
        raise ConditionError(f"the condition has {len(text)} characters", f"The limit is {MAX_CHARS}.")
    parser = _Parser(text)
    ask = parser.condition(0)
    parser.expect_end()
    return Condition(text, frozenset(parser.names), ask)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # text, number, name, sign, word, end
    text: str
    column: int  # from 1

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else f"'{self.text[:40]}'"


class _Parser:
    """Recursive descent over the tokens; each rule returns a function of the facts."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next = 0
        self.names: set[str] = set()

    def condition(self, depth: int) -> _Ask:
        if depth > MAX_DEPTH:
            raise self._error("brackets are nested too deeply", f"The limit is {MAX_DEPTH}.")
        parts = [self._all(depth)]
        while self._take("or"):
            parts.append(self._all(depth))
        return parts[0] if len(parts) == 1 else lambda facts: any(part(facts) for part in parts)

    def expect_end(self) -> None:
        token = self._tokens[self._next]
        if token.kind == "end":
            return
        remedy = "Join conditions with and, or."
        if token.text.lower() in _WORDS:
            remedy = f"Write {token.text.lower()} in small letters."
        elif token.text in ("is", "equals", "has"):
            remedy = "Write == to compare."
        elif token.text in (*_ORDERS, "==", "!="):
            remedy = "Compare two values at a time, and join the comparisons with and."
        raise self._error(f"{token} is not expected here", remedy)

    def _all(self, depth: int) -> _Ask:
        parts = [self._one(depth)]
        while self._take("and"):
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else lambda facts: all(part(facts) for part in parts)

    def _one(self, depth: int) -> _Ask:
        is_negated = False
        while self._take("not"):
            is_negated = not is_negated
        if self._take("("):
            ask = self.condition(depth + 1)
            self._expect(")")
        else:
            ask = self._comparison(depth)
        return (lambda facts: not ask(facts)) if is_negated else ask

    def _comparison(self, depth: int) -> _Ask:
        left = self._value(depth)
        token = self._tokens[self._next]
        if self._take("=="):
            right = self._value(depth)
            return lambda facts: _are_equal(left(facts), right(facts))
        if self._take("!="):
            right = self._value(depth)
            return lambda facts: not _are_equal(left(facts), right(facts))
        if token.text in _ORDERS and self._take(token.text):
            return _ordered(token.text, left, self._number(depth))
        is_negated = token.text == "not" and self._take("not")
        if self._take("in"):
            right = self._value(depth)
            return lambda facts: _is_in(left(facts), right(facts)) is not is_negated
        if is_negated:
            raise self._error("'not' stands between two values", "Write not in, or and not.")
        return lambda facts: bool(left(facts))

    def _number(self, depth: int) -> _Get:
        if self._tokens[self._next].kind == "text":
            raise self._error(f"{self._tokens[self._next]} is a text", "< and > compare numbers; leave the quotes out.")
        return self._value(depth)

    def _value(self, depth: int) -> _Get:
        token = self._tokens[self._next]
        if self._take("["):
            return self._list(depth)
        value: Any
        match token.kind:
            case "text":
                value = re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL)
            case "number":
                value = float(token.text) if "." in token.text else int(token.text)
            case "name":
                if token.text.count(".") >= MAX_WORDS:
                    raise self._error("this name has too many dots", f"A name has at most {MAX_WORDS} words.")
                self._next += 1
                self.names.add(token.text)
                return lambda facts: _look_up(facts, token.text)
            case "word" if token.text in ("true", "false"):
                value = token.text == "true"
            case _:
                remedy = 'A value is a fact like quest.dragon, a text like "dead", a number, true, false, or a list.'
                raise self._error(f"a value is expected, not {token}", remedy)
        self._next += 1
        return lambda facts: value

    def _list(self, depth: int) -> _Get:
        if depth >= MAX_DEPTH:
            raise self._error("brackets are nested too deeply", f"The limit is {MAX_DEPTH}.")
        items: list[_Get] = []
        while not self._take("]"):
            if items:
                self._expect(",")
            items.append(self._value(depth + 1))
        return lambda facts: [item(facts) for item in items]

    def _take(self, text: str) -> bool:
        token = self._tokens[self._next]
        is_it = token.kind in ("sign", "word") and token.text == text
        self._next += is_it
        return is_it

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._error(f"'{text}' is expected, not {self._tokens[self._next]}", f"Add '{text}'.")

    def _error(self, what: str, remedy: str) -> ConditionError:
        return ConditionError(f"column {self._tokens[self._next].column}: {what}", remedy)


def _tokens(text: str) -> list[_Token]:
    tokens, position = [], 0
    text = text.rstrip()
    while match := _TOKEN.match(text, position):
        kind = str(match.lastgroup)
        token = match[kind]
        column = match.start(kind) + 1
        if kind == "wrong":
            remedy = _INSTEAD.get(token, "Names have letters, digits, _ and dots; texts stand in quotes.")
            raise ConditionError(f"column {column}: {token!r} is not expected here", remedy)
        tokens.append(_Token("word" if token in _WORDS else kind, token, column))
        position = match.end()
    return [*tokens, _Token("end", "", len(text) + 1)]


def _ordered(sign: str, left: _Get, right: _Get) -> _Ask:
    def ask(facts: Facts) -> bool:
        first, second = left(facts), right(facts)
        return _kind(first) == _kind(second) == "number" and _ORDERS[sign](first, second)

    return ask


def _kind(value: Any) -> str:
    """What a value is; only values of one kind are compared."""
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, Sequence) else "nothing"


def _are_equal(left: Any, right: Any, depth: int = MAX_DEPTH) -> bool:
    kind = _kind(left)
    if kind != _kind(right) or kind == "nothing":
        return False
    if kind != "list":
        return bool(left == right)
    return (
        depth > 0
        and len(left) == len(right)
        and all(_are_equal(one, other, depth - 1) for one, other in zip(left, right, strict=True))
    )


def _is_in(item: Any, whole: Any) -> bool:
    if _kind(whole) == "list":
        return any(_are_equal(item, each) for each in whole)
    return _kind(whole) == _kind(item) == "text" and item.casefold() in whole.casefold()


def _look_up(facts: Facts, name: str) -> Any:
    """Find `a.b.c` as the key `a.b.c`, or as `b.c` in the map `a`, or as `c` in the map `a.b`."""
    if name in facts:
        return facts[name]
    position = name.find(".")
    while position >= 0:
        inner = facts.get(name[:position])
        if isinstance(inner, Mapping) and (found := _look_up(inner, name[position + 1 :])) is not None:
            return found
        position = name.find(".", position + 1)
    return None
