"""What strangers send to a socket: random bytes, and what looks like something."""

from __future__ import annotations

import random

from hpctrain.launch.handshake import LONGEST_PROOF_BYTES

_DEEP = b"[" * 100_000
_NONCE = b"00" * 16
_PROOF = b"0" * 64


def random_strings(count: int, seed: int = 0) -> list[bytes]:
    """Return byte strings of 1 to 4,000 bytes, a third of them with line feeds in them."""
    draw = random.Random(seed)
    strings = [draw.randbytes(draw.choice((1, 7, 44, 200, 1023, 4000))) for _ in range(count)]
    return [text.replace(b"a", b"\n") if i % 3 == 0 else text for i, text in enumerate(strings)]


STRUCTURED: tuple[bytes, ...] = (
    b"\n",
    b"\0\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"POST /init HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32) + b"\n",  # TLS
    b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    # JSON of all types, before any proof
    b"null\n",
    b"true\n",
    b"7\n",
    b'"end"\n',
    b"[]\n",
    b"{}\n",
    b"[1, 2, {}]\n",
    b"NaN\n",
    b"-Infinity\n",
    b"1e999\n",
    b"9" * 1000 + b"\n",
    b"9" * 5000 + b"\n",
    _DEEP + b"\n",
    b'{"a":' * 100_000 + b"\n",
    b'{"nonce": null, "group": 2}\n',
    b'{"nonce": "", "group": "2"}\n',
    b'{"nonce": [], "group": {}}\n',
    b'{"nonce": 1e400, "group": NaN}\n',
    b'{"hello": 0}\n',
    b'{"hello": {"a": []}, "proof": 7}\n',
    b'{"here": true}\n',
    b'{"end": 0}\n',
    b'{"end": "now"}\n',
    b'{"bye": true}\n',
    b'{"moved": []}\n',
    b'{"folder": "/etc"}\n',
    b'{"died": {"rank": 0}}\n',
    b'{"stands": [[[]]]}\n',
    b'{"reply": 0, "may_speak": true}\n',
    b'{"end": 70}\n' * 1000,
    # What looks like a proof
    b"2 %b %b\n" % (_NONCE, _PROOF),
    b"2 %b %b\r\n" % (_NONCE, _PROOF),
    b"2 %b %b\n{}\n" % (_NONCE, _PROOF),
    b"2 %b\n" % _NONCE,
    b"2  %b %b\n" % (_NONCE, _PROOF),
    b"probe %b %b\n" % (_NONCE, _PROOF),
    b"\xff\xfe %b %b\n" % (_NONCE, _PROOF),
    "٢ {} {}\n".format("00" * 16, "0" * 64).encode(),
    b"hpctrain-1 %b\n" % _NONCE,
    b"x" * (LONGEST_PROOF_BYTES - 1) + b"\n",
    b"x" * LONGEST_PROOF_BYTES,
    b"x" * 10_000_000,  # and no line feed
    b"\x1b[2J\x1b]0;pwned\x07\xe2\x80\xae\n",
)
"""Fifty: HTTP, TLS, a pickle, JSON of wrong types, depths and sizes, and proofs that are none."""
