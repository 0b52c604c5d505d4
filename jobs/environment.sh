# shellcheck shell=bash
# Makes the virtual environment .venv, or brings it up to date. Sourced by jobs/debug.sh and
# tests/run.sh from the root of the checkout:
#
#   source jobs/environment.sh
#   ensure_environment mpich,digits
#   override=$(sharing 2 training.max_epochs=3)
#
# Settings: PYTHON (the interpreter to build from), VENV (the folder, .venv).

VENV=${VENV:-.venv}

_find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 or newer (tried: ${PYTHON:-python3, python3.10 to 3.13, python})." >&2
  echo "       Load your site's Python module, or name one: PYTHON=/path/to/python3 bash $0" >&2
  return 69
}

# ensure_environment EXTRAS: hpctrain with these extras, installed from this checkout.
ensure_environment() {
  local extras=$1 python stamp wanted
  if [[ ! -x $VENV/bin/python ]]; then
    python=$(_find_python) || return
    echo "Making $VENV with $("$python" --version)."
    if ! "$python" -m venv "$VENV"; then
      rm -rf "$VENV"
      echo "error: $python cannot make virtual environments (on Debian: apt install python3-venv)." >&2
      return 69
    fi
  fi
  # What was installed is current as long as nothing that decides about it has changed.
  stamp=$VENV/.installed-${extras//,/-}
  wanted=$(cat pyproject.toml constraints.txt | cksum; "$VENV/bin/python" --version; pwd)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  echo "Installing hpctrain[$extras] into $VENV (a few minutes the first time)."
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".[$extras]" || {
    echo "error: the installation failed; the lines above say why. Run the same command again." >&2
    return 69
  }
  echo "$wanted" >"$stamp"
}

# sharing RANKS ARGUMENTS...: prints the override that has the ranks of a run share GPUs, where there
# are fewer of these than ranks, and no argument says what to compute on.
sharing() {
  local ranks=$1 gpus
  shift
  if [[ " $*" == *" launch.device="* || " $*" == *" launch.share_device="* ]]; then
    return
  fi
  gpus=$(_gpus)
  if ((gpus > 0 && gpus < ranks)); then
    echo launch.share_device=true
  fi
}

# How many GPUs torch sees; it takes its time to load, and is not asked where there is no driver.
_gpus() {
  local driver
  for driver in /dev/nvidiactl /dev/dxg /dev/kfd /dev/dri/renderD*; do
    if [[ -e $driver ]]; then
      python -c 'import torch; print(torch.accelerator.device_count())'
      return
    fi
  done
  echo 0
}
