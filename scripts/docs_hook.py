"""What MkDocs does to this project's documents: docstrings lose their Sphinx roles, and links that leave docs/ become plain text."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":[a-z]+:`~([^`]*?)([^`.]+)`|:[a-z]+:`([^`]+)`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside docs/ (``../README.md``) become their text: a site has no such files."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Roles that came with docstrings become code."""
    return re.sub(r":[a-z]+:<code>~?([^<]*)</code>", lambda found: f"<code>{found[1].rsplit('.', 1)[-1]}</code>", html)
