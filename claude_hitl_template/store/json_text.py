"""JSON text of the database's columns. pydantic's reader and writer take a third of the time of Python's, and refuse what is
nested deeper than 200 levels and half a surrogate pair, which a model may have written: for those Python's own are used.
"""

import json
from typing import Any

from pydantic_core import from_json, to_json


def dumps(value: object) -> str:
    try:
        return to_json(value).decode()
    except ValueError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def loads(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)
