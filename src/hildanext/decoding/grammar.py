"""What a completion must match: a grammar, and the bounds on a JSON Schema that becomes one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from math import lcm
from typing import Any

from hildanext.errors import UsageError

# Bounds on a schema, so that compiling one takes less than seconds. llguidance bounds the size of its grammars and the
# work for one token itself, but not these.
MOST_CHARS = 100_000
MOST_DEPTH = 100  # levels of a schema
MOST_REACH = 1000  # levels of a schema and of all that it refers to, together: the compiler recurses
MOST_STATES = 100_000  # of the automata for 'multipleOf', which have a state for each remainder

COMPACT = {"whitespace_flexible": False}  # else a model may write white space for ever


@dataclass(frozen=True)
class Grammar:
    """What a completion must match. `source` is a grammar in llguidance's JSON format."""

    source: str

    @classmethod
    def of_schema(cls, schema: dict[str, Any]) -> Grammar:
        """JSON that is valid under a JSON Schema (draft 2020-12). Properties come in the order of the schema.

        Raises UsageError for a schema beyond the bounds. Unsupported keywords are found in `GrammarCompiler.compile`.
        """
        check_schema(schema)
        return cls(json.dumps({"grammars": [{"json_schema": schema | {"x-guidance": COMPACT}}]}))

    @classmethod
    def of_lark(cls, text: str) -> Grammar:
        """Text that matches a grammar in llguidance's variant of Lark."""
        if len(text) > MOST_CHARS:
            raise UsageError(f"the grammar of the tools has {len(text)} characters; at most {MOST_CHARS} are compiled")
        return cls(json.dumps({"grammars": [{"lark_grammar": text}]}))


def check_schema(schema: dict[str, Any]) -> None:
    """Raise UsageError for a schema beyond the bounds above."""
    if not isinstance(schema, dict):
        raise UsageError("the JSON schema must be an object; an empty one, {}, allows any JSON value")
    heights, objects = _survey(schema)
    if heights[id(schema)] > MOST_DEPTH:
        raise UsageError(f"the JSON schema is nested deeper than {MOST_DEPTH} levels; flatten it")
    if (size := len(json.dumps(schema))) > MOST_CHARS:
        raise UsageError(f"the JSON schema has {size} characters; at most {MOST_CHARS} are compiled")
    references = {item["$ref"] for item in objects if isinstance(item.get("$ref"), str)}
    reach = sum(heights.get(id(_resolve(schema, reference)), 0) for reference in references)
    if heights[id(schema)] + reach > MOST_REACH:
        raise UsageError(
            f"the JSON schema and what '$ref' adds are deeper than {MOST_REACH} levels; use fewer definitions"
        )
    multiples = [item["multipleOf"] for item in objects if type(item.get("multipleOf")) in (int, float)]
    if lcm(*map(_digits, multiples)) * (len(multiples) + len(references)) > MOST_STATES:
        raise UsageError(
            "'multipleOf': the schema's values have too large a common multiple; use smaller or fewer ones"
        )


def _digits(value: float) -> int:
    """The significant digits of a number: 25 for 0.25 and for 2500."""
    return int("".join(map(str, Decimal(str(value)).as_tuple().digits)).rstrip("0") or "1")


def _survey(schema: dict[str, Any]) -> tuple[dict[int, int], list[dict[str, Any]]]:
    """The levels below each object and array by its id(), and all objects. Does not recurse: the schema may be deep."""
    found: list[tuple[Any, int]] = [(schema, 0)]  # value, index of the value around it
    for index, (value, _) in enumerate(found):  # which grows meanwhile
        inner = value.values() if isinstance(value, dict) else value
        found += [(item, index) for item in inner if isinstance(item, (dict, list))]
    heights = [1] * len(found)
    for index in range(len(found) - 1, 0, -1):
        heights[found[index][1]] = max(heights[found[index][1]], heights[index] + 1)
    by_id = {id(value): height for (value, _), height in zip(found, heights, strict=True)}
    return by_id, [value for value, _ in found if isinstance(value, dict)]


def _resolve(schema: dict[str, Any], reference: str) -> object:
    """What a reference within the schema points to (RFC 6901); None for others, which the compiler refuses."""
    value: Any = schema
    if not reference.startswith("#"):
        return None
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value
