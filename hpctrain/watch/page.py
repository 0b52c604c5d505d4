"""The page: one HTML document with its scripts, for a server or as a file with the data in it.

It asks nobody but the server that it comes from, and as a file nobody at all: its content security
policy says so, and which scripts it has, by their hashes. uPlot is Leon Sorokin's, under the MIT
licence that stands beside it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from importlib.resources import files
from typing import Any

from hpctrain.errors import HpctrainError

STYLES = ("uPlot.min.css", "page.css")
SCRIPTS = ("uPlot.iife.min.js", "model.js", "charts.js", "page.js")
CHECKSUMS = {
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
}
"""SHA-256 of what others have written, as version 1.6.32 of uPlot was published."""

_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
SERVED_POLICY = (
    f"{_POLICY}script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"
)
"""Content security policy of the page that a server gives."""


@functools.cache
def asset(name: str) -> str:
    """Return a style or a script.

    Raises:
        HpctrainError: if one of others' is not as they published it.
    """
    text = (files("hpctrain.watch") / "page" / name).read_text(encoding="utf-8")
    expected = CHECKSUMS.get(name)
    if expected is not None and hashlib.sha256(text.encode()).hexdigest() != expected:
        raise HpctrainError(f"{name} of this installation is damaged: install hpctrain again")
    return text


def served() -> str:
    """Return the page that asks its server for everything."""
    head = "\n".join(f'<link rel="stylesheet" href="assets/{name}">' for name in STYLES)
    body = "\n".join(f'<script src="assets/{name}"></script>' for name in SCRIPTS)
    return _filled(head, body)


def reported(data: dict[str, Any]) -> str:
    """Return the page as one file that holds its data."""
    styles, scripts = [asset(name) for name in STYLES], [asset(name) for name in SCRIPTS]
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src {' '.join(map(_hash, scripts))}; style-src {' '.join(map(_hash, styles))}"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    head += "\n".join(f"<style>{style}</style>" for style in styles)
    body = f'<script type="application/json" id="data">{as_json(data)}</script>\n'
    body += "\n".join(f"<script>{script}</script>" for script in scripts)
    return _filled(head, body)


def as_json(value: Any) -> str:
    """Return JSON that may stand in an HTML page: no text in it ends a script."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:  # a file of others' holds what is no JSON
        text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _filled(head: str, body: str) -> str:
    return asset("page.html").replace("{{ head }}", head).replace("{{ body }}", body)


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
