"""The API description that the server shows at /docs.json."""

from __future__ import annotations

from typing import Any


def drop_titles_of_fields(schema: Any) -> None:
    """Remove, in place, the titles that pydantic makes from the names of fields ("Task Id").

    They say nothing more than the names, and generated clients repeat them. Titles of models stay.

    Args:
        schema: the description, or any part of it.
    """
    if isinstance(schema, list):
        for item in schema:
            drop_titles_of_fields(item)
    elif isinstance(schema, dict):
        fields = schema.get("properties")
        for field in fields.values() if isinstance(fields, dict) else ():
            field.pop("title", None)
        for part in schema.values():
            drop_titles_of_fields(part)
