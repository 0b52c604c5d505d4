"""What NCCL, or AMD's RCCL, says of its way between GPUs: read from its own log, node by node."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LIBRARY = re.compile(r"\b([NR]CCL) version\s*:?\s*(\d+(?:\.\d+)+)")
_NETWORK = re.compile(r"Using network (.+?)\s*$", re.MULTILINE)
_PLUGINS = (
    re.compile(r"NET/OFI (?:Using|Initializing) (aws-ofi-[nr]ccl \S+)"),
    re.compile(r"Loaded net plugin (.+?)(?: \(v\d+\))?\s*$", re.MULTILINE),
    re.compile(r"Successfully loaded external (?:network|net) plugin (\S+)"),
)
_NICS = re.compile(r"NET/(?:IB|IBext\S*|Socket) : Using (.+?)(?:;|$)", re.MULTILINE)
_NIC = re.compile(r"\[\d+\]([\w.-]+)")
_PROVIDER = re.compile(r"NET/OFI Selected [Pp]rovider is (\S+)")
_BETWEEN = re.compile(r"via NET/([^/\n]+?)/[^\n]*")
_INSIDE = re.compile(r"via (P2P|SHM)(?:/([\w ]+?))?(?:/|\s*$|\s+comm)", re.MULTILINE)
_INTERNAL = ("IB", "Socket")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """How one rank, or all of them, exchange what they reduce.

    Attributes:
        library: such as "NCCL 2.27.3"; empty where the log does not say it.
        networks: that were chosen between nodes, such as "IB" or "AWS Libfabric".
        plugins: that brought these, such as "aws-ofi-nccl 1.13.0".
        nics: that the networks use.
        between: networks that channels between nodes have been made over.
        inside: ways within a node, such as "P2P/CUMEM" and "SHM".
        gpudirect: whether a network reads the memory of a GPU by itself; None: no channel says it.
        idle: fast network cards that a node has, by what serves them.
    """

    library: str = ""
    networks: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    nics: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    gpudirect: bool | None = None
    idle: dict[str, tuple[str, ...]] = field(default_factory=dict)


def parse(text: str, idle: dict[str, tuple[str, ...]] | None = None) -> Transport:
    """Return what a log says.

    Args:
        text: of NCCL_DEBUG=INFO, of any version from 2.4 on, or of RCCL.
        idle: fast network cards of the node.
    """
    library = _LIBRARY.search(text)
    ways = [match[0] for match in _BETWEEN.finditer(text)]
    nics = [nic for match in _NICS.finditer(text) for nic in _NIC.findall(match[1])]
    networks = _unique(match[1] for match in _NETWORK.finditer(text))
    if networks and networks[-1] != "Socket":
        # The socket's are listed for the first meeting, too.
        sockets = {
            nic
            for match in _NICS.finditer(text)
            if "NET/Socket" in match[0]
            for nic in _NIC.findall(match[1])
        }
        nics = [nic for nic in nics if nic not in sockets]
    return Transport(
        library=f"{library[1]} {library[2]}" if library else "",
        networks=networks[-1:],
        plugins=_unique(match[1] for each in _PLUGINS for match in each.finditer(text)),
        nics=_unique([*nics, *(match[1] for match in _PROVIDER.finditer(text))]),
        between=_unique(match[1] for match in _BETWEEN.finditer(text)),
        inside=_unique("/".join(filter(None, match.groups())) for match in _INSIDE.finditer(text)),
        gpudirect=any("/GDRDMA" in way for way in ways) if ways else None,
        idle=idle or {},
    )


def combine(transports: Sequence[Transport]) -> Transport:
    """Return what all ranks together say; only some of them talk to another node."""
    known = [each.gpudirect for each in transports if each.gpudirect is not None]
    return Transport(
        library=next((each.library for each in transports if each.library), ""),
        networks=_unique(name for each in transports for name in each.networks),
        plugins=_unique(name for each in transports for name in each.plugins),
        nics=_unique(name for each in transports for name in each.nics),
        between=_unique(name for each in transports for name in each.between),
        inside=_unique(name for each in transports for name in each.inside),
        # One channel through the host slows all of them down.
        gpudirect=all(known) if known else None,
        idle={kind: names for each in transports for kind, names in each.idle.items()},
    )


def describe(transport: Transport, num_nodes: int) -> str:
    """Return it in words; empty where nothing is known."""
    parts = [transport.library] if transport.library else []
    over = transport.between or transport.networks
    if num_nodes > 1 and over:
        cards = f" ({', '.join(transport.nics[:8])})" if transport.nics else ""
        plugin = f" by {', '.join(transport.plugins)}" if transport.plugins else ""
        direct = {None: "", True: ", GPUDirect", False: ", without GPUDirect"}[transport.gpudirect]
        parts.append(f"between nodes {', '.join(over)}{cards}{plugin}{direct}")
    if transport.inside:
        parts.append(f"inside a node {', '.join(transport.inside)}")
    return "; ".join(parts)


def find_trouble(transport: Transport, num_nodes: int) -> str | None:
    """Return what is wrong where gradients take a slow network beside a fast one; None: nothing."""
    over = transport.between or transport.networks
    if num_nodes < 2 or "Socket" not in over or not transport.idle:
        return None
    kind, names = next(iter(transport.idle.items()))
    return (
        f"{transport.library or 'NCCL'} goes between nodes over plain sockets, though they have "
        f"{', '.join(names[:4])} ({kind}): {_MISSING[kind]}"
    )


_MISSING = {
    "EFA": "its plug-in aws-ofi-nccl is missing (libnccl-net.so on LD_LIBRARY_PATH; AWS has it in "
    "/opt/amazon/ofi-nccl)",
    "Slingshot": "its plug-in aws-ofi-nccl, for AMD aws-ofi-rccl, is missing (libnccl-net.so, or "
    "librccl-net.so, on LD_LIBRARY_PATH; sites have a module of that name)",
    "Omni-Path": "a plug-in for it is missing (PSM3 through aws-ofi-nccl)",
    "InfiniBand or RoCE": "libibverbs is missing, NCCL_IB_DISABLE is set, or the container lacks "
    "/dev/infiniband",
}


def fast_cards(root: Path = Path("/sys/class")) -> dict[str, tuple[str, ...]]:
    """Return the fast network cards of this node, by what serves them."""
    found: dict[str, list[str]] = {}
    for card in _names(root / "cxi"):
        found.setdefault("Slingshot", []).append(card)
    for card in _names(root / "infiniband"):
        kind = "InfiniBand or RoCE"
        driver = (root / "infiniband" / card / "device" / "driver").resolve().name
        if card.startswith("efa") or driver == "efa":
            kind = "EFA"
        elif card.startswith("hfi1") or driver == "hfi1":
            kind = "Omni-Path"
        found.setdefault(kind, []).append(card)
    return {kind: tuple(names) for kind, names in found.items()}


class NcclLog:
    """The log of this process, in a folder of its own that nobody else can plant anything in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def begin(cls, environ: MutableMapping[str, str] = os.environ) -> NcclLog | None:
        """Have NCCL write one; to be called before it starts.

        Returns:
            None where the user has said how NCCL is to log, which stays so.
        """
        if any(name in environ for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE")):
            return None
        try:
            folder = Path(tempfile.mkdtemp(prefix="hpctrain-nccl-"))
        except OSError:  # no room for it: nothing depends on it
            return None
        environ["NCCL_DEBUG"] = "INFO"
        environ.setdefault("NCCL_DEBUG_SUBSYS", "INIT,NET")
        environ["NCCL_DEBUG_FILE"] = str(folder / "log.%p")
        return cls(folder)

    def read(self) -> Transport:
        """Return what the log says so far."""
        texts = []
        for path in sorted(self._folder.glob("log.*")):
            try:
                with path.open(encoding="utf-8", errors="replace") as file:
                    texts.append(file.read(_MOST_CHARACTERS))
            except OSError:
                continue
        return parse("\n".join(texts), fast_cards())

    def close(self) -> None:
        """Remove the folder; NCCL goes on writing to a file that has no name any more."""
        shutil.rmtree(self._folder, ignore_errors=True)


_MOST_CHARACTERS = 4 * 2**20


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def prepare_nccl(
    timeout_seconds: float,
    *,
    has_flight_recorder: bool,
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Have NCCL's record of collectives kept, and torch's monitor end nothing before ours does.

    What the user has set stays.

    Args:
        timeout_seconds: of the process group.
        has_flight_recorder: whether torch calls that record by this name, from 2.9 on; it warns
            of the older one. Source: torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp.
        environ: to set it in.
    """
    names = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE")
    if not any(name in environ for name in names):
        environ[names[has_flight_recorder]] = "2000"
    environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout_seconds)))
