#!/usr/bin/env bash
# Trains configs/run.toml on Aurora at ALCF (2 x 52 cores, 12 GPU tiles a node).
# Two things to edit, marked EDIT: the account, and the number of nodes. Then:
#
#   qsub jobs/sites/aurora.sh
#
# The same with HPCTRAIN_CHECK=1 looks at everything that the run needs, in the same allocation, and
# trains nothing:
#
#   qsub -v HPCTRAIN_CHECK=1 -l walltime=0:10:00 jobs/sites/aurora.sh
#
# Stopped by its time limit, the run is saved and the job submitted again, until it is complete. A
# job that is cancelled saves too, where the site leaves it the time, and does not come back.
# `touch runs/digits/STOP` saves and ends the run; remove the file to go on.
# Written from https://docs.alcf.anl.gov/aurora/running-jobs-aurora/ (2025);
# https://docs.alcf.anl.gov/aurora/data-science/frameworks/oneCCL/ (2025). Not tried on hardware.
# The ranks compute on torch's device xpu, over its backend xccl, if it has them.

#PBS -N digits
# EDIT: Whom the time is charged to.
#PBS -A my_account
#PBS -q prod
# EDIT: The number of nodes, after select=.
# Whole nodes.
#PBS -l select=2
# Each chunk on a node of its own.
#PBS -l place=scatter
# The job waits while one of these is down, instead of failing on it.
#PBS -l filesystems=home:flare
#PBS -l walltime=02:00:00
# One log, with the errors in it.
#PBS -j oe
# Not by PBS itself: the script submits itself again where that is of use.
#PBS -r n
set -uo pipefail
# PBS starts in the home directory.
cd "$PBS_O_WORKDIR" || exit 69
nodes=$(sort -u "$PBS_NODEFILE" | wc -l)

# Whatever brings Python, torch and mpi4py here: a module, or an environment beside the config.
if [[ -f .venv/bin/activate ]]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
python=(python)

# The site's own is so long that paths of sockets in it exceed 107 bytes.
export TMPDIR=/tmp
# oneCCL, the carrier of the backend xccl, finds its ranks by PALS's PMIx.
export CCL_PROCESS_LAUNCHER=pmix
# oneCCL talks between nodes by MPI.
export CCL_ATL_TRANSPORT=mpi

# PBS sets it to the CPUs of the whole chunk: each rank would start as many threads as all together.
export OMP_NUM_THREADS=8
# A rank a GPU tile, on its socket; cores 0 and 52 are the system's.
bind=(--cpu-bind list:1-8:9-16:17-24:25-32:33-40:41-48:53-60:61-68:69-76:77-84:85-92:93-100)
# PBS sends no signal before the limit: hpctrain asks qstat for the time left. Where qstat does not
# answer on compute nodes, uncomment this: so many seconds from the start of this script.
# export HPCTRAIN_DEADLINE=$(($(date +%s) - SECONDS + 7200))
# Elements of a job array would all train this one run; a sweep has a run for each of them.
if [[ -n ${PBS_ARRAY_INDEX:-} ]]; then
  echo "error: PBS_ARRAY_INDEX=$PBS_ARRAY_INDEX: an array, and this script trains one run." >&2
  echo "  A run for each element: python -m hpctrain job CONFIG --sweep KEY=VALUE,VALUE" >&2
  echo "  Submitted from within an array's element: env -u PBS_ARRAY_INDEX qsub" >&2
  exit 64
fi
# The first job's name, and the number of this one among those that go on from it: what the config
# asks for once, as by checkpoint.resume = "never", only the first of them does.
if [[ ! ${HPCTRAIN_ATTEMPT:-1} =~ ^[1-9][0-9]{0,5}$ ]]; then
  echo "error: HPCTRAIN_ATTEMPT is not the number of a job" >&2
  exit 64
fi
export HPCTRAIN_TOKEN=${HPCTRAIN_TOKEN:-pbs-${PBS_JOBID:-$$}}
export HPCTRAIN_ATTEMPT=$((${HPCTRAIN_ATTEMPT:-1}))
export HPCTRAIN_MAX_JOBS=50
# The log's last line says how it ended, what the code means, and what it has used: by the clock of
# this script, and the nodes of $PBS_NODEFILE.

finish() { # CODE HOW
  local used=$((nodes * SECONDS)) note=
  case $1 in
    75) note=' is no failure' ;;
    1) note=' means that another job would be of no use' ;;
  esac
  printf 'hpctrain: %s. Exit code %d%s. Node-hours used: %d.%03d (%d x %d:%02d:%02d).\n' "$2" \
    "$1" "$note" $((used / 3600)) $((used % 3600 * 10 / 36)) "$nodes" \
    $((SECONDS / 3600)) $((SECONDS % 3600 / 60)) $((SECONDS % 60))
  exit "$1"
}
# The ranks run in the background: bash would hold back a trap until a command in the foreground
# ends. What the batch system sends to this script alone goes on to them as USR1, which every
# launcher forwards; TERM some take as an order to kill. Launchers read what stands in their stdin,
# which may be the rest of this script.
ranks='' asked=''
# shellcheck disable=SC2317,SC2329 # the traps call it
pass_on() {
  asked=yes
  [[ -z $ranks ]] || kill -s USR1 "$ranks" 2>/dev/null
}
# TERM to this script means that somebody ends the job (scancel, bkill, qdel, a preemption): it
# saves, and does not come back by itself.
ended=
trap 'ended=yes; pass_on' TERM INT
trap pass_on USR1 USR2 URG XCPU
mpiexec -n "$((nodes * 12))" --ppn 12 "${bind[@]}" "${python[@]}" -m hpctrain ${HPCTRAIN_CHECK:+check} configs/run.toml </dev/null &
ranks=$!
[[ -z $asked ]] || pass_on # it came before they were started
wait "$ranks"
code=$?
while kill -0 "$ranks" 2>/dev/null; do # a trap has ended the wait, not the ranks
  wait "$ranks"
  code=$?
done
trap 'ended=yes' TERM INT # also while the lines below find out what to do
trap '' USR1 USR2 URG XCPU
if [[ -n ${HPCTRAIN_CHECK:-} ]]; then
  [[ $code == 0 ]] && finish 0 "the check found everything ready"
  finish "$code" "the check found something wrong: see above"
fi

# The run folder says what to do: launchers mix the exit codes of their ranks. 0: complete. 75:
# submit again. All else: not again, because it failed, gained no step, is held by STOP, or because
# 50 jobs are enough.
told=$("${python[@]}" -m hpctrain status runs/digits --exit-code --max-tries 50 </dev/null)
next=$?
[[ -z $told ]] || printf '%s\n' "$told"
how="the launcher ended with code $code: see above"
[[ ! $told =~ $'\n  ending '\ *(.*)$ ]] || how=${BASH_REMATCH[1]}
if [[ $next == 126 || $next == 127 ]]; then
  next=$code # no Python on this node: the launcher's code has to do
fi
if [[ $next == 75 && -n $ended ]]; then
  how+=", not submitted again: somebody has ended this job"
elif [[ $next == 75 ]]; then
  # To a file: what the command leaves running may hold on to a pipe, and be waited for.
  receipt=$(mktemp) || receipt=/dev/null
  if qsub -v "HPCTRAIN_TOKEN=$HPCTRAIN_TOKEN,HPCTRAIN_ATTEMPT=$((HPCTRAIN_ATTEMPT + 1))" jobs/sites/aurora.sh >"$receipt"; then
    taken=$(<"$receipt")
    taken=${taken#*<} # of LSF: Job <1234> is submitted
    how+=", submitted again as $taken"
  else
    echo "This could not be submitted again: see above, and submit it by hand." >&2
    how+=", NOT submitted again: submit it by hand"
  fi
  [[ $receipt == /dev/null ]] || rm -f -- "$receipt"
fi
finish "$next" "$how"
