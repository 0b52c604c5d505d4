"""Which variables tell a process its rank, so that its helpers do not take themselves for it."""

from __future__ import annotations

from collections.abc import Mapping

from hpctrain.launch.table import LAUNCHERS

# Of the process managers' own protocols; the table has those that hpctrain reads.
_PREFIXES = ("PMI_", "PMI2_", "PMIX_", "OMPI_", "PRTE_", "PALS_", "JSM_", "MV2_", "HYDI_")


def without_rank(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which MPI, torch and hpctrain find no world to be part of."""
    told = {
        variable
        for row in LAUNCHERS
        for variables in (
            row.markers,
            row.rank,
            row.world_size,
            row.local_rank,
            row.local_world_size,
            row.foreign,
        )
        for variable in variables
    }
    return {
        name: value
        for name, value in env.items()
        if name not in told and not name.startswith(_PREFIXES)
    }
