"""The entries of a JSON object, checked as they are read; what was not read is refused by name."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a JSON value must be."""

    words: str
    holds: Callable[[Any], bool]


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return (_is_int(x) or isinstance(x, float)) and math.isfinite(x)


def _is_list(x: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(x, list | tuple) and all(map(holds, x))


def _is_token_id(x: Any) -> bool:
    return _is_int(x) and x >= 0


POSITIVE_INT = Kind("a positive integer", lambda x: _is_int(x) and x > 0)
COUNT = Kind("an integer, at least 0", lambda x: _is_int(x) and x >= 0)
COUNTS = Kind("a list of integers, at least 0", lambda x: _is_list(x, COUNT.holds))
POSITIVE = Kind("a positive number", lambda x: _is_number(x) and 0 < x)
POSITIVES = Kind("a list of positive numbers", lambda x: _is_list(x, POSITIVE.holds))
AT_LEAST_0 = Kind("a number, at least 0", lambda x: _is_number(x) and 0 <= x)
BOOL = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a string", lambda x: isinstance(x, str))
TEXTS = Kind("a list of strings", lambda x: _is_list(x, TEXT.holds))
OBJECT = Kind("an object", lambda x: isinstance(x, Mapping))
TOKEN_IDS = Kind(
    "a token id, or a list of them", lambda x: _is_token_id(x) or _is_list(x, _is_token_id)
)


class Entries:
    """A JSON object that checks what is read of it, and knows what was not read."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self._raw, self._where = raw, where
        self._read: set[str] = set()

    def get(self, name: str, kind: Kind, default: Any = None) -> Any:
        """An entry; `default` where it is missing or null. ValueError where it is of another kind."""
        self._read.add(name)
        value = self._raw.get(name)
        if value is None:
            return default
        if not kind.holds(value):
            raise ValueError(f"{name} in {self._where} must be {kind.words}; got {_short(value)}")
        return value

    def need(self, name: str, kind: Kind) -> Any:
        """An entry that must be there."""
        value = self.get(name, kind)
        if value is None:
            raise ValueError(f"{self._where} has no {name!r}")
        return value

    def refuse_the_rest(self, harmless: Collection[str], neutral: Mapping[str, Any]) -> None:
        """NotImplementedError that names the entries which nobody read and which may mean something."""
        strange = [
            f"{name}={_short(value)} is not built"
            + (f"; supported: {neutral[name]!r}" if name in neutral else "")
            for name, value in self._raw.items()
            if value is not None and name not in self._read and name not in harmless
            if not (name in neutral and _equal(value, neutral[name]))
        ]
        if strange:
            raise NotImplementedError(
                f"{self._where} has entries that may change the logits: {', '.join(strange)}. An "
                "entry that is known to change nothing can be taken out of the file"
            )


def _equal(a: Any, b: Any) -> bool:
    """Equality that takes 1 for 1.0, but neither for true."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def token_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    """The token ids of an entry of kind `TOKEN_IDS`."""
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
