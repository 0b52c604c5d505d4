#!/usr/bin/env bash
# Sets up and passes every test: format, lint, types, layers, unit, MPI, launchers.
#
#   bash tests/run.sh                     all of it
#   bash tests/run.sh tests/unit -k data  what pytest is told
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh

ensure_environment mpich,digits,tensorboard,test
export PATH=$PWD/$VENV/bin:$PATH

# Tests that need a Debian package install it where they may, and say so where they may not.
if ! command -v shellcheck >/dev/null && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  (apt-get update -qq && apt-get install -qq -y --no-install-recommends shellcheck) >/dev/null 2>&1 ||
    echo "shellcheck could not be installed: its test will be skipped."
fi

python -m hpctrain data pack digits data/digits
exec python -m pytest "$@"
