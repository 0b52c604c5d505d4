"""JSON that holds a checksum of all that it says: numbers in it lead to bytes of other files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

CHECKSUM = "checksum"
UNSEALED_VERSION = 1
"""Of an index and of a catalogue of 0.1.0, which had no checksum."""


def sealed(document: Mapping[str, Any]) -> bytes:
    """Return a document as JSON, with its checksum."""
    whole = {**document, CHECKSUM: checksum_of(document)}
    return (json.dumps(whole, indent=1) + "\n").encode()


def require_sealed(document: Mapping[str, Any]) -> None:
    """Check that a document says what it said when it was written.

    Those of 0.1.0 have no checksum. A version and a key that were altered do not make another one
    of them.

    Raises:
        ValueError: if it does not.
    """
    if document.get("version") == UNSEALED_VERSION and CHECKSUM not in document:
        return
    if document.get(CHECKSUM) != checksum_of(document):
        raise ValueError("its checksum is not that of what it says: it was damaged, or edited")


def checksum_of(document: Mapping[str, Any]) -> str:
    """Return the xxh3-64 of all that a document says but its checksum, hexadecimal."""
    said = {key: value for key, value in document.items() if key != CHECKSUM}
    return str(xxhash.xxh3_64_hexdigest(json.dumps(said).encode()))
