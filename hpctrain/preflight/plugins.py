"""NCCL's plug-in for the network, and libfabric below it: which are found here, and do they fit."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.preflight.report import Finding
from hpctrain.utils.text import listed, printable

_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/lib/x86_64-linux-gnu")
"""Where the loader looks after LD_LIBRARY_PATH, unless ld.so.cache knows of more."""
_OFI = re.compile(rb"aws-ofi-[nr]ccl (\d+\.\d+(?:\.\d+)?)")
_PACKAGE = re.compile(r"^Version:\s*(\d+\.\d+(?:\.\d+)?)", re.MULTILINE)
_MODULE = re.compile(r"(?:^|:)libfabric/(\d+\.\d+(?:\.\d+)*)")
_BY_PLUGIN_ALONE = ("Slingshot", "EFA")
"""Networks that NCCL reaches by no means of its own."""
_BETWEEN = "gradients would go over plain sockets, many times slower"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needs:
    """What versions of aws-ofi-nccl from `since` on, and before `until`, need at least."""

    since: str
    until: str
    nccl: str
    libfabric: str


_NEEDS = (
    # Source: github.com/aws/aws-ofi-nccl, release notes of 1.8.1 and 1.9.1 (read 2026-11-29).
    _Needs(since="1.8", until="1.10", nccl="2.4.8", libfabric="1.18"),
    # Source: the same, of 1.19.2, 1.20.0 and 1.21.1. Of those between nothing is known here.
    _Needs(since="1.19", until="2", nccl="2.17.1", libfabric="1.11"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """What NCCL would load on a node.

    Attributes:
        asked: NCCL_NET_PLUGIN; empty where it is not set.
        path: of the plug-in; empty where none is found.
        version: of aws-ofi-nccl or aws-ofi-rccl; empty where the file does not say it.
        libfabric: path of the one that the plug-in would load; empty where none is found.
        libfabric_version: empty where nothing beside it says it.
        host_libfabric: version of the module that is loaded, outside of an image too.
        cards: fast network cards of the node, by what serves them.
    """

    asked: str = ""
    path: str = ""
    version: str = ""
    libfabric: str = ""
    libfabric_version: str = ""
    host_libfabric: str = ""
    cards: Mapping[str, tuple[str, ...]]


def find_plugin(
    environ: Mapping[str, str],
    cards: Mapping[str, tuple[str, ...]],
    *,
    is_rocm: bool,
    folders: Sequence[str] = _FOLDERS,
) -> Plugin:
    """Look for the plug-in as NCCL does. Source: NCCL, ext-net/README.md (read 2026-11-29).

    Args:
        environ: of a rank.
        cards: fast network cards of the node.
        is_rocm: RCCL looks for a library of its own name too.
        folders: where the loader looks after LD_LIBRARY_PATH.
    """
    asked = environ.get("NCCL_NET_PLUGIN", "")
    names = ["librccl-net.so"] * is_rocm + ["libnccl-net.so"]
    if asked:
        names = [asked] if ".so" in asked else [f"libnccl-net-{asked}.so"]
    searched = [*filter(None, environ.get("LD_LIBRARY_PATH", "").split(":")), *folders]
    path = "" if asked == "none" else _first(names, searched)
    libfabric = _first(["libfabric.so.1"], searched)
    host = _MODULE.search(environ.get("LOADEDMODULES", ""))
    return Plugin(
        asked=asked,
        path=path,
        version=_ofi_version(path),
        libfabric=libfabric,
        libfabric_version=_package_version(libfabric),
        host_libfabric=host[1] if host else "",
        cards=cards,
    )


def judge_plugin(plugins: Mapping[str, Plugin], nccl: str, num_nodes: int) -> Finding:
    """Judge the plug-ins of all nodes: the first one that does not fit is told.

    Args:
        plugins: by host.
        nccl: version that torch brings.
        num_nodes: of the job; within one node no plug-in is needed.
    """
    name = "plug-in"
    for host, plugin in plugins.items():
        for fact, fix in _problems(plugin, nccl, num_nodes):
            return Finding(name=name, status="warn", fact=f"{host}: {fact}", fix=fix)
    first = next(iter(plugins.values()))
    paths = listed(list(dict.fromkeys(each.path for each in plugins.values() if each.path)))
    if not paths:
        return Finding(name=name, status="pass", fact="none is found, and none is needed")
    version = f", aws-ofi-nccl {first.version}" if first.version else ""
    below = f", libfabric {first.libfabric_version}" if first.libfabric_version else ""
    return Finding(
        name=name, status="pass", fact=f"{printable(paths)}{version}{below}, for NCCL {nccl}"
    )


def _problems(plugin: Plugin, nccl: str, num_nodes: int) -> Iterator[tuple[str, str]]:
    """Yield what does not fit on one node, and the way out."""
    if not plugin.path:
        yield from _missing(plugin, num_nodes)
        return
    what = f"{printable(plugin.path)}" + (f" ({plugin.version})" if plugin.version else "")
    below, host = plugin.libfabric_version, plugin.host_libfabric
    first = "first in LD_LIBRARY_PATH"
    if plugin.version and not plugin.libfabric:
        fix = "put the folder of the site's into LD_LIBRARY_PATH, and bind it into an image"
        yield f"{what} needs libfabric.so.1, and none is found: {_BETWEEN}", fix
    needs = _needs(plugin.version)
    if needs is not None and nccl and _key(nccl) < _key(needs.nccl):
        fact = f"{what} needs NCCL {needs.nccl} or later, and torch brings {nccl}: {_BETWEEN}"
        yield fact, "take a newer torch, or an older plug-in that the site has for this NCCL"
    found = f"{printable(plugin.libfabric)} ({below})"
    if needs is not None and below and _key(below) < _key(needs.libfabric):
        fact = f"{what} needs libfabric {needs.libfabric} or later, and finds {found}"
        yield fact, f"put a newer libfabric {first}: the site's own knows its network"
    if below and host and _key(below)[:2] < _key(host)[:2]:
        fact = f"{found} is older than the libfabric {host} that the host has loaded: it may lack "
        fix = f"bind the host's libfabric into the image, and put its folder {first}"
        yield f"{fact}the provider of this network", fix


def _missing(plugin: Plugin, num_nodes: int) -> Iterator[tuple[str, str]]:
    """Yield what is amiss where no plug-in is found."""
    asked = f"NCCL_NET_PLUGIN={printable(plugin.asked)}"
    kind = next((each for each in _BY_PLUGIN_ALONE if plugin.cards.get(each)), "")
    if plugin.asked not in ("", "none"):
        fix = "put its folder into LD_LIBRARY_PATH, or unset NCCL_NET_PLUGIN"
        yield f"{asked}, and no such library is found", fix
    elif kind and num_nodes > 1:
        why = f", as {asked} says" if plugin.asked else ""
        cards = listed(plugin.cards[kind][:4])
        fix = (
            "load the site's module of aws-ofi-nccl (for AMD aws-ofi-rccl), or put the folder of "
            "libnccl-net.so into LD_LIBRARY_PATH; in an image it has to be bound or built in"
        )
        yield (
            f"{kind} ({cards}) needs a plug-in, and none is loaded{why}: {_BETWEEN}",
            "unset NCCL_NET_PLUGIN" if plugin.asked else fix,
        )


def _needs(version: str) -> _Needs | None:
    if not version:
        return None
    key = _key(version)
    return next((each for each in _NEEDS if _key(each.since) <= key < _key(each.until)), None)


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _first(names: Sequence[str], folders: Sequence[str]) -> str:
    for name in names:
        for path in [Path(name)] if "/" in name else [Path(folder, name) for folder in folders]:
            if path.is_file():
                return str(path)
    return ""


def _ofi_version(path: str) -> str:
    """Return the version that the plug-in's own greeting has, empty where it has none."""
    if not path:
        return ""
    try:
        with (
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            found = _OFI.search(text)
            return found[1].decode() if found else ""
    except (OSError, ValueError):  # an empty file cannot be mapped
        return ""


def _package_version(path: str) -> str:
    """Return the version in the pkg-config file of a library, empty where there is none."""
    if not path:
        return ""
    folder = Path(os.path.realpath(path)).parent
    try:
        text = (folder / "pkgconfig" / "libfabric.pc").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = _PACKAGE.search(text)
    return found[1] if found else ""
