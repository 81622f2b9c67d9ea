"""Docstrings name things as ``:func:`attach```; pages of the site leave the role before the name out."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):<code>~?")


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of every page."""
    return _ROLE.sub("<code>", html)
