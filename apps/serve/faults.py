"""What is wrong with a request that the schema does not take, in one line for who wrote it."""

import re
from collections.abc import Sequence
from typing import Any

FIELD = re.compile(r"[a-z_]+")  # what else stands in pydantic's places are names of alternatives: `list[TextPart]`


def fault(errors: Sequence[Any], content_type: str) -> str:
    """The fault among pydantic's `errors` (at least one); of a field with alternatives, the one that was meant."""
    first, path = errors[0], _path(errors[0])
    if not path and "json" not in content_type:
        return f"the body was sent as {content_type or 'nothing'!a}; expected the header Content-Type: application/json"
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    same = [error for error in errors if _path(error)[: len(path)] == path]
    meant = next((error for error in same if not error["type"].endswith("_type")), first)
    where = ".".join(map(str, _path(meant)))
    return f"{where or 'the body'}: {meant['msg'].removeprefix('Value error, ')}"


def _path(error: Any) -> list[str | int]:
    """The field's names and numbers, from the body on."""
    return [part for part in error["loc"][1:] if isinstance(part, int) or FIELD.fullmatch(part)]
