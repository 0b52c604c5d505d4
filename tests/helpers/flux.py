"""A `flux` of one command a subcommand, for tests whose jobs start no ranks."""

from __future__ import annotations

from pathlib import Path

_FLUX = """\
#!/bin/bash
# In an instance of two nodes, the job ƒ7; all else is a program beside this one: flux-run, ...
[[ $1 != --parent ]] || shift
case "$1 $2" in
  "getattr size") echo 2 ;;
  "getattr jobid") echo ƒ7 ;;
  *) exec "${0%/*}/flux-$1" "${@:2}" ;;
esac
"""


def write_flux(folder: Path) -> None:
    """Write the command that hands its subcommands on to programs in the same folder."""
    (folder / "flux").write_text(_FLUX, encoding="utf-8")
    (folder / "flux").chmod(0o755)
