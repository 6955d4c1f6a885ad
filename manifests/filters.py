"""A small, safe part of SQL's WHERE, compiled to an Arrow expression. Nothing is evaluated but what is listed here.

comparison   column = | != | <> | < | <= | > | >= value       column is [not] null
             column [not] like 'text with % and _'            column [not] in (value, ...)
combination  and, or, not, parentheses
value        'text' ('' is a quote in it), 12, -0.5, true, false
column       its name, in double quotes where that is not a plain word
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import UsageError

_TOKEN = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*')|(?P<number>-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)"
    r'|"(?P<quoted>[^"]+)"'
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign><=|>=|<>|!=|=|<|>|\(|\)|,))"
)
_KEYWORDS = {"and", "or", "not", "in", "like", "is", "null", "true", "false"}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_MAX_DEPTH = 50

ROW = "#"
"""A column that conditions cannot name, for callers to tell rows by."""


def matching(table: pa.Table, where: str, label: str = "--where") -> pa.Table:
    """Return the rows a condition holds for; a null compared with anything does not. label: what errors call it.

    Raises `UsageError` that says where the condition stops making sense, or which column or type is wrong.
    """
    expression = _Parser(where, table.schema, label).parse()
    try:
        return table.filter(expression)
    except pa.ArrowException as error:
        raise UsageError(f"{label} {where!r}: {str(error).splitlines()[0]}") from error


class _Parser:
    """Recursive descent over the tokens; `or` binds weaker than `and`, `and` weaker than `not`."""

    def __init__(self, where: str, schema: pa.Schema, label: str) -> None:
        self._label = label
        self._where = where
        self._schema = schema
        self._tokens = self._tokenise(where)
        self._next = 0
        self._depth = 0

    def parse(self) -> pc.Expression:
        expression = self._or()
        if self._next < len(self._tokens):
            raise self._error("and, or, or the end")
        return expression

    def _tokenise(self, where: str) -> list[tuple[str, str]]:
        tokens, position = [], 0
        while where[position:].strip():
            match = _TOKEN.match(where, position)
            if match is None:
                raise UsageError(f"{self._label} {where!r}: cannot read it from {where[position:].strip()[:20]!r} on")
            kind = match.lastgroup or ""
            text = match.group(kind)
            if kind == "word" and text.lower() in _KEYWORDS:
                kind, text = "keyword", text.lower()
            kind = "word" if kind == "quoted" else kind
            tokens.append((kind, text))
            position = match.end()
        return tokens

    def _or(self) -> pc.Expression:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UsageError(f"{self._label}: nested more than {_MAX_DEPTH} deep")
        expression = self._and()
        while self._take("keyword", "or"):
            expression = expression | self._and()
        self._depth -= 1
        return expression

    def _and(self) -> pc.Expression:
        expression = self._not()
        while self._take("keyword", "and"):
            expression = expression & self._not()
        return expression

    def _not(self) -> pc.Expression:
        negations = 0
        while self._take("keyword", "not"):
            negations += 1
        expression = self._term()
        return ~expression if negations % 2 else expression

    def _term(self) -> pc.Expression:
        if self._take("sign", "("):
            expression = self._or()
            self._expect("sign", ")")
            return expression
        name, kind = self._column()
        field = pc.field(name)
        if self._take("keyword", "is"):
            negated = self._take("keyword", "not")
            self._expect("keyword", "null")
            return field.is_valid() if negated else field.is_null()
        negated = self._take("keyword", "not")
        if self._take("keyword", "like"):
            pattern = self._value(name, kind)
            if not isinstance(pattern, str):
                raise UsageError(f"{self._label} {self._where!r}: like needs a pattern in quotes, for a column of text")
            expression = pc.match_like(field, pattern)
        elif self._take("keyword", "in"):
            self._expect("sign", "(")
            values = [self._value(name, kind)]
            while self._take("sign", ","):
                values.append(self._value(name, kind))
            self._expect("sign", ")")
            expression = pc.if_else(field.is_valid(), field.isin(values), pa.scalar(None, pa.bool_()))
        elif not negated and self._peek()[0] == "sign" and self._peek()[1] in _COMPARISONS:
            compare = _COMPARISONS[self._advance()[1]]
            return compare(field, pa.scalar(self._value(name, kind)))
        else:
            raise self._error("a comparison such as = or like")
        return ~expression if negated else expression

    def _column(self) -> tuple[str, pa.DataType]:
        if self._peek()[0] != "word":
            raise self._error("a column")
        name = self._advance()[1]
        known = [f.name for f in self._schema if f.name != ROW and not pa.types.is_nested(f.type)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"{self._label} {self._where!r}: no column {name!r}; {hint}")
        return name, self._schema.field(name).type

    def _value(self, name: str, kind: pa.DataType) -> str | int | float | bool:
        token, text = self._peek()
        value: str | int | float | bool
        if token == "text":
            value, fits = text[1:-1].replace("''", "'"), pa.types.is_string(kind)
        elif token == "number":
            number = float(text)
            value = int(text) if re.fullmatch(r"-?\d+", text) else number
            fits = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        elif (token, text) in (("keyword", "true"), ("keyword", "false")):
            value, fits = text == "true", pa.types.is_boolean(kind)
        else:
            raise self._error("a value")
        if not fits:
            raise UsageError(f"{self._label} {self._where!r}: {name} is a column of {kind}, {text} is not")
        self._next += 1
        return value

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._next] if self._next < len(self._tokens) else ("end", "")

    def _advance(self) -> tuple[str, str]:
        self._next += 1
        return self._tokens[self._next - 1]

    def _take(self, kind: str, text: str) -> bool:
        if self._peek() != (kind, text):
            return False
        self._next += 1
        return True

    def _expect(self, kind: str, text: str) -> None:
        if not self._take(kind, text):
            raise self._error(f"{text!r}")

    def _error(self, expected: str) -> UsageError:
        kind, text = self._peek()
        found = "it ends" if kind == "end" else f"there is {text!r}"
        return UsageError(f"{self._label} {self._where!r}: expected {expected}, but {found}")
