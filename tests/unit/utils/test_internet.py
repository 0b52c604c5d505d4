"""Which failures are those of a network, as libraries that download raise them."""

from __future__ import annotations

import errno
import http.client
import socket
import subprocess
import urllib.error
import urllib.request

import httpx
import pytest
import requests
from huggingface_hub.errors import LocalEntryNotFoundError

from hpctrain.utils.internet import network_failure

NOWHERE = "https://no-such-host.invalid/file"


def raised(act: object) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the library raises
        act()  # type: ignore[operator]
    return caught.value


def wrapped(inner: BaseException) -> BaseException:
    """As a library does that tells of the failure in words of its own."""
    try:
        try:
            raise inner
        except BaseException as error:
            raise RuntimeError("the data set could not be made") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "act",
    [
        lambda: urllib.request.urlopen(NOWHERE),
        lambda: requests.get(NOWHERE, timeout=60),
        lambda: httpx.get(NOWHERE),
        lambda: socket.getaddrinfo("no-such-host.invalid", 80),
    ],
    ids=["urllib", "requests", "httpx", "socket"],
)
def test_what_libraries_raise_without_a_network(act: object) -> None:
    error = raised(act)
    assert network_failure(error) is not None
    assert network_failure(wrapped(error)) is not None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        ConnectionError("Couldn't reach 'mnist' on the Hub (LocalEntryNotFoundError)"),
        LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub"),
        # torchvision's MNIST tells what each mirror said, and chains nothing.
        RuntimeError(
            "Error downloading train-images-idx3-ubyte.gz:\nTried https://a.example/, got:\n"
            "<urlopen error [Errno -3] Temporary failure in name resolution>\n"
        ),
        OSError("We couldn't connect to 'https://hub.example' to load the files"),
        subprocess.CalledProcessError(4, ["wget", "-q", NOWHERE]),
        subprocess.CalledProcessError(6, "curl -LO https://no-such-host.invalid/file"),
    ],
)
def test_what_they_raise_elsewhere(error: BaseException) -> None:
    assert network_failure(error) is not None


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "data/mnist"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ValueError("10 classes expected"),
        # A server has answered: there is a network.
        urllib.error.HTTPError(NOWHERE, 404, "Not Found", http.client.HTTPMessage(), None),
        subprocess.CalledProcessError(1, ["tar", "xf", "file"]),
    ],
)
def test_other_failures_are_their_own(error: BaseException) -> None:
    assert network_failure(error) is None
    assert network_failure(wrapped(error)) is None
