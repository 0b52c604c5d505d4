#!/usr/bin/env bash
# Makes .venv-peers: what hpctrain is compared with, beside all packages of the environment that is
# active. Nothing of it is needed to train. Then, for instance:
#
#   .venv-peers/bin/python benchmarks/step.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

python -m venv --clear .venv-peers
echo "import site; site.addsitedir('$(packages_of python)')" \
  >"$(packages_of .venv-peers/bin/python)/first.pth"
install() { .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
install --constraint <(python -m pip freeze --exclude-editable | grep -E '^(torch|numpy)==') \
  lightning accelerate pytorch-ignite
# An embedded MPI is found beside the Python that imports mpi4py.
install --ignore-installed --no-deps mpich mpi4py
