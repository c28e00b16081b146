"""What becomes of a row with text that no database keeps? That text is shown with marks in the places it breaks at."""

from __future__ import annotations

import msgspec

from gateway.ledger.rows import AnyRow

_MARK = "\N{REPLACEMENT CHARACTER}"


def cleaned(row: AnyRow) -> AnyRow:
    """Return the row with its texts cleaned."""
    values = ((name, getattr(row, name)) for name in row.__struct_fields__)
    changes = {name: clean for name, text in values if isinstance(text, str) and (clean := clean_text(text)) != text}
    return msgspec.structs.replace(row, **changes) if changes else row


def clean_text(text: str) -> str:
    """Return the text with a mark for each NUL, which PostgreSQL refuses, and each lone surrogate: UTF-8 has none."""
    # Two surrogates that stand for one character become that character.
    return text.replace("\0", _MARK).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
