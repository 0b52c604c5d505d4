"""Races for a run folder: takers that are killed anywhere, and never two of them inside.

    python benchmarks/lease.py 500 [--folder DIRECTORY] [--no-links] [--namespaces one|each]
    python benchmarks/lease.py 500 --folder MOUNT --second-mount OTHER

Each race begins with a stale lease, a torn one, or none. Takers go for it at the same time; each
may be killed by SIGKILL before or after any of its calls to the file system, or while it is inside.
What tells whether two are inside is a lock of the kernel, which knows nothing of leases. Prints the
counts, and ends with 1 where two were inside, or nobody could take over from the dead in the end.

--second-mount is where the same directory is mounted once more, as by NFS on another host: every
second taker goes there. --no-links has links fail as on FAT. --namespaces one has all takers in one
new PID namespace, whose /proc is that of the one above; each: every taker in one of its own. Both
need root.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpctrain.checkpoint.lease import NAME, Lease
from hpctrain.checkpoint.lease_rules import Holder, this_holder
from hpctrain.errors import CheckpointError
from hpctrain.utils.json_files import parse_checked

_CALLS = ("open", "link", "replace", "unlink", "fsync", "utime")
_CLONE_NEWPID = 0x20000000
_INSIDE_SECONDS = 0.02
_DELAYED, _DELAY_SECONDS = 0.15, 0.02
_KILLED_INIT = 128 + signal.SIGKILL

WON, REFUSED, TWO_INSIDE, KILLED = 0, 1, 2, -signal.SIGKILL


def die(*_: object) -> None:
    """End as a job does whose node is switched off."""
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(_KILLED_INIT)  # the first process of a PID namespace cannot kill itself


def break_file_system(chance: random.Random, *, mean_calls: int, links: bool) -> None:
    """Have this process be slow in its calls, or die at one of them; links fail if asked for."""
    left = chance.randrange(mean_calls)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if chance.random() < _DELAYED:
                time.sleep(chance.random() * _DELAY_SECONDS)
            if left == 0 and chance.random() < 0.5:
                die()
            result = call(*arguments, **keywords)
            if left == 0:
                die()
            return result

        return counting

    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        os.link = no_link
    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a race is run.

    Attributes:
        run: the run folder.
        again: the same folder by another mount, or by the same.
        guard: file of this machine, whose lock tells whether two are inside.
    """

    run: Path
    again: Path
    guard: Path


def take(place: Place, start: float, chance: random.Random, *, links: bool, dies: bool) -> int:
    """Go for a folder at a time, and be inside for a while; return how that went."""
    lease = Lease(place.run, {})
    guard = place.guard.open("a")
    break_file_system(chance, mean_calls=60 if dies else 10**9, links=links)
    time.sleep(max(0.0, start + chance.random() * 0.004 - time.time()))
    try:
        lease.__enter__()
    except CheckpointError:
        return REFUSED
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return TWO_INSIDE
    time.sleep(chance.random() * _INSIDE_SECONDS)
    lease.confirm()
    if dies and chance.random() < 0.3:
        die()
    fcntl.flock(guard, fcntl.LOCK_UN)
    lease.__exit__(None, None, None)
    return WON


def in_child(work: Callable[[], int], *, own_namespace: bool = False) -> int:
    """Begin work in a child, in a PID namespace of its own where asked for; return its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        if own_namespace:
            enter_namespace()
            inner = os.fork()
            if inner:
                code = ended(inner)
                os._exit(_KILLED_INIT if code == KILLED else code)
        code = work()
    except BaseException as error:  # noqa: BLE001 - told by the parent as an exit code of its own
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


def enter_namespace() -> None:
    """Have the next child be the first process of a new PID namespace."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "unshare: no new PID namespace (it needs root)")


def ended(child: int) -> int:
    """Return how a child has ended."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return KILLED if code == _KILLED_INIT else code


def leave_lease(run: Path, chance: random.Random, *, links: bool) -> None:
    """Leave what a race begins with: a dead job's lease, one that is also old, or nothing."""
    kind = chance.choice(("dead", "dead", "old", "none"))
    if kind == "none":
        return

    def enter() -> int:
        if not links:
            break_file_system(chance, mean_calls=10**9, links=False)
        Lease(run, {}).__enter__()
        die()
        return 0

    ended(in_child(enter))
    if kind == "old":
        long_ago = time.time() - 100
        os.utime(run / NAME, (long_ago, long_ago))


def race(place: Place, seed: int, *, takers: int, links: bool, each: bool) -> Counter[int]:
    """Run one race; return how often each end of a taker was seen."""
    place.run.mkdir(parents=True)
    chance = random.Random(seed)
    leave_lease(place.run, chance, links=links)
    start = time.time() + 0.05 + 0.03 * each
    children = []
    for number in range(takers):
        own = random.Random(seed * 1000 + number)

        mounted = replace(place, run=place.again) if number % 2 else place

        def work(own: random.Random = own, mounted: Place = mounted) -> int:
            return take(mounted, start, own, links=links, dies=own.random() < 0.7)

        children.append(in_child(work, own_namespace=each))
    return Counter(map(ended, children))


def is_free(place: Place, *, links: bool, each: bool) -> bool:
    """Tell whether somebody can take over what the dead of a race have left."""
    if each:  # none sees that the others are dead: a heartbeat long ago has to tell
        for path in place.run.iterdir():
            os.utime(path, (time.time() - 100, time.time() - 100))
    last = random.Random(0)
    return ended(in_child(lambda: take(place, 0.0, last, links=links, dies=False))) == WON


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("races", type=int)
    parser.add_argument("--takers", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--second-mount", type=Path)
    parser.add_argument("--no-links", action="store_true")
    parser.add_argument("--namespaces", choices=("one", "each"))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parsed = parser.parse_args()
    if parsed.namespaces == "one":
        enter_namespace()
        inner = os.fork()
        if inner:
            return ended(inner)
    # Imported once, not by each of the children.
    parse_checked(json.dumps(asdict(this_holder({}))).encode(), Holder)
    links, each = not parsed.no_links, parsed.namespaces == "each"
    counts: Counter[int] = Counter()
    stuck = []
    with (
        tempfile.TemporaryDirectory(dir=parsed.folder) as here,
        tempfile.TemporaryDirectory() as of_this_machine,
    ):
        there = parsed.second_mount / Path(here).name if parsed.second_mount else Path(here)
        for number in range(parsed.races):
            seed = parsed.seed + number
            place = Place(
                Path(here, str(number)), there / str(number), Path(of_this_machine, str(number))
            )
            counts += race(place, seed, takers=parsed.takers, links=links, each=each)
            if not is_free(place, links=links, each=each):
                stuck.append(seed)
    others = sum(counts.values()) - sum(counts[end] for end in (WON, REFUSED, TWO_INSIDE, KILLED))
    print(
        f"{parsed.races} races of {parsed.takers} takers: {counts[WON]} inside, "
        f"{counts[KILLED]} killed, {counts[REFUSED]} refused, {counts[TWO_INSIDE]} times two "
        f"inside, {others} failed otherwise, {len(stuck)} folders locked by the dead {stuck[:5]}"
    )
    return int(bool(counts[TWO_INSIDE] or others or stuck))


if __name__ == "__main__":
    sys.exit(main())
