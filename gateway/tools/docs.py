"""Which pages of the documentation are made from the code? `make docs` writes them; tests compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from gateway import errors
from gateway.config import document

ROOT = Path(__file__).parents[2]


def pages() -> Mapping[Path, Callable[[], str]]:
    """Return every generated page and what writes it."""
    docs = ROOT / "docs"
    return {
        docs / "configuration.md": document.reference,
        docs / "gateway.schema.json": document.schema_text,
        docs / "errors.md": errors.reference,
    }


def main() -> None:
    """Write every page."""
    for path, text in pages().items():
        path.write_text(text(), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
