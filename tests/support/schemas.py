"""Twenty JSON Schemas of the kinds that JSONSchemaBench collects (Geng et al. 2025, arXiv 2501.10868).

Strings, numbers and arrays are bounded, so that every answer ends: a model may go on with an unbounded string for ever.
"""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator

WORD = {"type": "string", "minLength": 1, "maxLength": 8}
COUNT = {"type": "integer", "minimum": 0, "maximum": 99}


def record(optional: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "object": record(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "nested objects": record(person=record(name=WORD, home=record(city=WORD, zone=COUNT)), active={"type": "boolean"}),
    "array": record(tags={"type": "array", "items": WORD, "minItems": 1, "maxItems": 3}),
    "array of objects": {"type": "array", "items": record(id=COUNT, label=WORD), "minItems": 1, "maxItems": 3},
    "enum": record(colour={"enum": ["red", "green", "dark blue"]}, size={"enum": [1, 2.5, None, True, "XL"]}),
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"}),
    "two patterns": record(key={"type": "string", "pattern": "^(get|set)_[a-z]{1,6}(\\[[0-9]\\])?$", "maxLength": 10}),
    "bounded integers": record(
        low={"type": "integer", "minimum": -20, "exclusiveMaximum": 5},
        even={"type": "integer", "minimum": 100, "maximum": 999, "multipleOf": 6},
    ),
    "bounded numbers": record(price={"type": "number", "minimum": 0.5, "exclusiveMaximum": 20, "multipleOf": 0.25}),
    "references": {
        "$defs": {
            "point": record(x=COUNT, y=COUNT),
            "line": record(a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/point"}),
        },
        **record(line={"$ref": "#/$defs/line"}, centre={"$ref": "#/$defs/point"}),
    },
    "definitions": {"definitions": {"w": WORD}, "type": "array", "items": {"$ref": "#/definitions/w"}, "maxItems": 2},
    "union": record(value={"anyOf": [WORD, COUNT, {"type": "null"}, record(of=COUNT)]}),
    "tagged union": {
        "anyOf": [record(kind={"const": "circle"}, radius=COUNT), record(kind={"const": "square"}, side=COUNT)]
    },
    "oneOf": record(
        one={"oneOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "string", "maxLength": 4}]}
    ),
    "allOf": {"allOf": [record(a=COUNT, b=COUNT), {"properties": {"a": {"minimum": 7}}}]},
    "const": record(version={"const": "2.0"}, method={"const": {"deep": [1, 2, {"x": None}]}}, id=COUNT),
    "optional": record(("b", "c"), a=COUNT, b=WORD, c={"type": ["boolean", "null"]}),
    "additional": {
        "type": "object",
        "properties": {"id": COUNT},
        "patternProperties": {"^[a-c]{1,2}$": COUNT},
        "maxProperties": 4,
        "additionalProperties": False,
        "required": ["id"],
    },
    "formats": record(
        day={"type": "string", "format": "date"},
        id={"type": "string", "format": "uuid"},
        host={"type": "string", "format": "ipv4"},
    ),
    "tuple": {
        "type": "array",
        "prefixItems": [
            WORD,
            COUNT,
            {"type": "array", "items": {"type": "array", "items": COUNT, "maxItems": 2}, "maxItems": 2},
        ],
        "items": False,
        "minItems": 3,
    },
}
assert len(SCHEMAS) == 20


def faults(schema: dict[str, Any], value: object) -> list[str]:
    """What the library jsonschema finds wrong with a value, formats included."""
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return [error.message for error in validator.iter_errors(value)]
