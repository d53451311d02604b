"""The JSON Schemas of the records, made from their classes."""

from __future__ import annotations

from typing import Any

import msgspec

from polarctl.records import find_kind
from polarctl.schemas.examples import EXAMPLES

_ONE_OF = {
    "candidate": [{"required": ["output"]}, {"required": ["candidates"]}],
    "score": [{"required": ["reward"]}, {"required": ["rewards"]}],
}


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a kind, with its examples."""
    kind = find_kind(name)
    (schema,), definitions = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    root = definitions.pop(kind.__name__)
    del schema
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{name}.schema.json",
        **root,
        **({"anyOf": _ONE_OF[name]} if name in _ONE_OF else {}),
        "examples": EXAMPLES[name],
        **({"$defs": definitions} if definitions else {}),
    }
