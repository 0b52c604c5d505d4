#!/usr/bin/env bash
# The single-node debug run: everything from nothing to a trained model, on any machine with
# Python 3.10 or newer.
#
#   bash jobs/debug.sh                                        2 ranks, configs/run.toml
#   bash jobs/debug.sh 4                                      4 ranks
#   bash jobs/debug.sh 4 configs/other.toml training.max_epochs=3
#   bash jobs/debug.sh 2 launch.device=cpu                    not on the GPU, if there is one
#
# Sets up .venv with an embedded MPI, packs real data to HDF5, trains under mpirun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh

ranks=2
config=configs/run.toml
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  ranks=$1
  shift
fi
if [[ $# -gt 0 && $1 != *=* && $1 != -* ]]; then
  config=$1
  shift
fi

ensure_environment mpich,digits
export PATH=$PWD/$VENV/bin:$PATH
python -m hpctrain data pack digits data/digits

# Ranks of this small run share what GPUs there are, unless told otherwise.
override=$(sharing "$ranks" "$@")
if [[ -n $override ]]; then
  echo "There are fewer GPUs than ranks, which share them; launch.device=cpu runs on the CPU."
  set -- "$@" "$override"
fi
echo "Running: mpirun -np $ranks python -m hpctrain $config $*"
# exec: a Ctrl-C or a signal to this script goes to mpirun, and mpirun's exit code comes back. Its
# stdin is not for it to read: a loop around this script may stand in there.
exec mpirun -np "$ranks" python -m hpctrain "$config" "$@" </dev/null
