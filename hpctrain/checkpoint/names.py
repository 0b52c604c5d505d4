"""Names of tensors, whether a wrapper around a module has put its own into them or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_OF_WRAPPERS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""What torch.compile, DataParallel and its like, FSDP and activation checkpointing add."""


def fitting_names(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Return the names that tensors should have, by the ones they have, where these differ.

    Args:
        wanted: names in the model.
        there: names in a file.

    Returns:
        Of those that are no other than what wrappers have put into them, without ambiguity.
    """
    wanted, there = set(wanted), set(there)
    here, given = ({name: _bare(name) for name in names} for names in (wanted, there))
    free = {bare: name for name, bare in here.items() if name not in there}
    counts = [Counter(here.values()), Counter(given.values())]
    return {
        name: free[bare]
        for name, bare in given.items()
        if name not in wanted and bare in free and all(count[bare] == 1 for count in counts)
    }


def without_compile(name: str) -> str:
    """Return a name, or a pattern of names, without what torch.compile has put into it."""
    return name.replace("_orig_mod.", "")


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _OF_WRAPPERS)
