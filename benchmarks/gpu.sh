#!/usr/bin/env bash
# Proves hpctrain on one GPU in 8 minutes: tests/gpu, then benchmarks/gpu.py; a JSON line a result.
#
#   bash benchmarks/gpu.sh fetch    where there is a network: wheels of what a bare machine lacks
#   bash benchmarks/gpu.sh [FILE]   where the GPU is: the lines go to FILE too, gpu.jsonl by itself
#   bash benchmarks/gpu.sh dry [FILE]   its logic on a CPU, on tiny sizes: it says nothing of GPUs
#
# The machine with the GPU needs python3 with torch, numpy, h5py, mpi4py and pytest, and no network:
# the wheels, 17 MB, travel in .gpu-wheels, which git ignores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheels=.gpu-wheels
environment=${HPCTRAIN_GPU_ENVIRONMENT:-/tmp/hpctrain-gpu-environment}
python=3.12
packages=(annotated-types mpich mpi4py psutil pydantic pydantic-core safetensors tomli-w tqdm
  typing-extensions typing-inspection xxhash)

if [[ ${1:-} == fetch ]]; then
  platforms=()
  for number in 2_28 2_27 2_24 2_17 2_12 2_5; do
    platforms+=(--platform "manylinux_${number}_x86_64")
  done
  rm -rf "$wheels"
  # pydantic names the version of its core exactly: it is resolved, the others are named.
  "${PYTHON:-python3}" -m pip download --quiet --only-binary=:all: --python-version "$python" \
    --implementation cp --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    "${platforms[@]}" -d "$wheels" "${packages[@]}"
  rm -f "$wheels"/numpy-*
  du -sh "$wheels"
  exit
fi

begin=$SECONDS
tests=(tests/gpu)
cases=()
if [[ ${1:-} == dry ]]; then
  shift
  # Whole runs are left out: other tests do the same on the CPU. One process has all cases.
  tests=(tests/gpu/test_delivery.py tests/gpu/test_steps_on_device.py)
  cases=(--device cpu --tiny --here)
  export HPCTRAIN_TEST_DEVICE=cpu
fi
results=$(realpath -m "${1:-gpu.jsonl}")
: >"$results"
if [[ ${#cases[@]} == 0 && ! -x $environment/bin/python ]]; then
  python3 -m venv --without-pip "$environment"
  # All that python3 has, torch above all; what travels comes first.
  site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
  echo "import site; site.addsitedir('$(site python3)')" >"$(site "$environment/bin/python")/first.pth"
  python3 -m pip --python "$environment/bin/python" install --quiet --no-index --no-deps \
    --no-cache-dir "$wheels"/*.whl
fi
[[ ${#cases[@]} != 0 ]] || export PATH=$environment/bin:$PATH
export PYTHONPATH=$PWD:$PWD/benchmarks PYTHONUNBUFFERED=1

failed=0
# Ends with some of its lines rather than with none.
HPCTRAIN_TEST_RESULTS=$results timeout -k 10 230 python -m pytest -q -p no:cacheprovider \
  -o filterwarnings=default "${tests[@]}" || failed=1
echo "{\"result\": \"tests/gpu\", \"failed\": $failed, \"seconds\": $((SECONDS - begin))}" |
  tee -a "$results"
left=$((470 - (SECONDS - begin)))
timeout -k 10 "$left" python benchmarks/gpu.py "${cases[@]}" | tee -a "$results" || failed=1
echo "all of it took $((SECONDS - begin)) s; $(wc -l <"$results") lines are in $results"
exit "$failed"
