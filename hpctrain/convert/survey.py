"""What is in an HDF5 file of any maker: all of it.

Nothing is refused here: what cannot become a tensor is listed with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import h5py

from hpctrain.convert.items import ANY, Item, item_of, peek_of
from hpctrain.data.files.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.data.files.walking import Link, objects_in, require_files_behind
from hpctrain.errors import DatasetError

LEAST_ALIKE = 3
"""So many groups that hold the same are taken for samples or episodes, and listed as one."""
LEAST_KEYED = 16
"""So many arrays of one shape whose names differ in a number only are taken for a sample each."""
MOST_PEEKED = 2000
"""Arrays of a file of which some values are looked at."""
_NUMBERED = re.compile(r"(.*?)(\d+)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """One file.

    Attributes:
        path: of it.
        items: in the order of their paths, alike groups as one.
        cut: why there may be more; empty if there is not.
    """

    path: str
    items: tuple[Item, ...]
    cut: str = ""


def survey(path: str) -> Survey:
    """Return what one HDF5 file holds. Of values it reads what tells what they are for.

    Raises:
        DatasetError: if it is not an HDF5 file, or cannot be read.
    """
    items: list[Item] = []
    cut = ""
    try:
        with open_hdf5_file(path) as file:
            try:
                for name, found in objects_in(file):
                    text = name if isinstance(name, str) else name.decode(errors="backslashreplace")
                    if isinstance(found, h5py.Dataset):
                        items.append(item_of(text, found, path, has_name=isinstance(name, str)))
                    elif isinstance(found, Link):
                        items.append(_link_item(text, found, path))
            except DatasetError as error:  # there are too many objects, or too deep ones
                cut = str(error)
            folded = _folded(items)
            told = [_peeked(file, each) for each in folded[:MOST_PEEKED]]
    except HDF5_FAILURES as error:
        raise DatasetError(f"{path}: HDF5 cannot read this file: {error}") from error
    return Survey(path=path, items=(*told, *folded[MOST_PEEKED:]), cut=cut)


def _peeked(file: h5py.File, item: Item) -> Item:
    """Return an array with what some of its values tell, if it stands for itself alone."""
    if item.count > 1 or item.obstacle or item.type == "link":
        return item
    found = file.get(item.path)
    return peek_of(item, found) if isinstance(found, h5py.Dataset) else item


def _link_item(path: str, link: Link, place: str) -> Item:
    """Return a link to another name or file: where it leads, and what is there."""
    group, raw = link
    leads = "to what cannot be told"
    try:
        found = group.get(raw, getlink=True)
        at = f"{found.filename}:" if isinstance(found, h5py.ExternalLink) else ""
        leads = f"to {at}{found.path}"
        require_files_behind(group, raw.decode(errors="surrogateescape"))
        target = group.get(raw)
        if isinstance(target, h5py.Dataset):
            item = item_of(path, target, place, has_name=_is_utf8(raw))
            return replace(item, notes=(f"a link {leads}", *item.notes), leads_to=leads)
        leads += ", which is a group" if target is not None else ", where there is nothing"
    except OSError as error:
        leads += f", which {error.strerror or 'cannot be followed'}"
    except HDF5_FAILURES:
        leads = "of a kind that h5py does not know"
    return Item(path=path, type="link", notes=(leads,), obstacle="a link")


def _is_utf8(raw: bytes) -> bool:
    return raw.decode(errors="ignore").encode() == raw


def _folded(items: Sequence[Item]) -> list[Item]:
    """Return items in the order of their paths, those of groups that hold the same as one."""
    below: dict[str, list[Item]] = {}
    here: list[Item] = []
    for item in items:
        name, slash, rest = item.path.partition("/")
        if slash:
            below.setdefault(name, []).append(_moved(item, rest))
        else:
            here.append(item)
    alike: dict[tuple[tuple[object, ...], ...], list[str]] = {}
    for name, inside in below.items():
        alike.setdefault(_signature(inside), []).append(name)
    found = {item.path: [item] for item in _keyed(here)}
    for names in alike.values():
        if len(names) < LEAST_ALIKE:
            for name in names:
                found[f"{name}/"] = _placed(name, _folded(below[name]))
            continue
        merged = _merged([sorted(below[name], key=lambda each: each.path) for name in names])
        found[f"{names[0]}/"] = _placed(_pattern(names), _folded(merged))
    return [item for name in sorted(found) for item in found[name]]


def _merged(groups: Sequence[Sequence[Item]]) -> list[Item]:
    """Return the arrays of groups that hold the same, each of which stands for those of all."""
    merged = []
    for same in zip(*groups, strict=True):
        first = same[0]
        shapes = {(each.shape or ())[1:] for each in same}
        merged.append(
            replace(
                first,
                count=sum(each.count for each in same),
                rows=sum(each.rows for each in same),
                num_bytes=sum(each.num_bytes for each in same),
                is_uniform=len(shapes) == 1 and all(each.is_uniform for each in same),
            )
        )
    return merged


def _keyed(items: Sequence[Item]) -> list[Item]:
    """Return arrays of a group, those that are a sample each as one."""
    same: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        numbered = _NUMBERED.fullmatch(item.path)
        name = (numbered[1], numbered[3]) if numbered else (item.path,)
        same.setdefault((*name, item.type, item.shape, item.obstacle), []).append(item)
    kept = []
    for each in same.values():
        if len(each) < LEAST_KEYED or each[0].type == "link":
            kept += each
            continue
        pattern = _pattern([item.path for item in each])
        kept.append(replace(_merged([[item] for item in each])[0], path=pattern, is_keyed=True))
    return kept


def _pattern(names: Sequence[str]) -> str:
    """Return what all of these names fit, such as demo_*."""
    first, last = min(names), max(names)
    start = first[: next((i for i, each in enumerate(first) if last[i : i + 1] != each), None)]
    return f"{start.rstrip('0123456789')}{ANY}"


def _signature(items: Sequence[Item]) -> tuple[tuple[object, ...], ...]:
    """Return what groups have in common that hold one sample or episode each."""
    facts = [(each.path, each.type, len(each.shape or ())) for each in items]
    return tuple(sorted(facts))


def _placed(name: str, items: Sequence[Item]) -> list[Item]:
    return [_moved(item, f"{name}/{item.path}") for item in items]


def _moved(item: Item, path: str) -> Item:
    """Return an array under another path, and its members with it."""
    members = [replace(each, path=f"{path}{each.path[len(item.path) :]}") for each in item.members]
    return replace(item, path=path, members=tuple(members))
