#!/usr/bin/env bash
# Trains configs/run.toml on Della at Princeton (2 A100 a node).
# Two things to edit, marked EDIT: the account, and the number of nodes. Then:
#
#   sbatch jobs/sites/della.sh
#
# The same with HPCTRAIN_CHECK=1 looks at everything that the run needs, in the same allocation, and
# trains nothing:
#
#   HPCTRAIN_CHECK=1 sbatch --time=0:10:00 jobs/sites/della.sh
#
# Stopped by its time limit, the run is saved and the job submitted again, until it is complete. A
# job that is cancelled saves too, where the site leaves it the time, and does not come back.
# `touch runs/digits/STOP` saves and ends the run; remove the file to go on.
# Written from https://researchcomputing.princeton.edu/systems/della (2025). Not tried on hardware.
# The limits are those of the quality of service that --time leads to: see qos.

#SBATCH --job-name=digits
# EDIT: Whom the time is charged to.
#SBATCH --account=my_account
# EDIT: The number of nodes.
#SBATCH --nodes=2
# One rank a GPU, each with its own CPUs: for its reader thread too.
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
# Both GPUs of a node, visible to both ranks: bound one to a task they could not copy to each other.
#SBATCH --gres=gpu:2
#SBATCH --time=02:00:00
# USR1 goes to all ranks so many seconds before the limit. hpctrain asks for the time left by itself
# and may stop earlier; this is for where squeue does not answer.
#SBATCH --signal=USR1@300
# Slurm may start the job again: after a failed node, a preemption, or as asked for at the end.
#SBATCH --requeue
# One log for all tries.
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

# Whatever brings Python, torch and mpi4py here: a module, or an environment beside the config.
if [[ -f .venv/bin/activate ]]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
python=(python)

# Since 22.05 srun does not take it over from sbatch: every rank would get one CPU.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Elements of a job array would all train this one run; a sweep has a run for each of them.
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  echo "error: SLURM_ARRAY_TASK_ID=$SLURM_ARRAY_TASK_ID: an array, and this script trains one run." >&2
  echo "  A run for each element: python -m hpctrain job CONFIG --sweep KEY=VALUE,VALUE" >&2
  echo "  Submitted from within an array's element: env -u SLURM_ARRAY_TASK_ID sbatch" >&2
  exit 64
fi
# The first job's name, and the number of this one among those that go on from it: what the config
# asks for once, as by checkpoint.resume = "never", only the first of them does.
if [[ ! ${HPCTRAIN_ATTEMPT:-1} =~ ^[1-9][0-9]{0,5}$ ]]; then
  echo "error: HPCTRAIN_ATTEMPT is not the number of a job" >&2
  exit 64
fi
export HPCTRAIN_TOKEN=${HPCTRAIN_TOKEN:-slurm-${SLURM_JOB_ID:-$$}}
export HPCTRAIN_ATTEMPT=$((${HPCTRAIN_ATTEMPT:-1} + ${SLURM_RESTART_COUNT:-0}))
export HPCTRAIN_MAX_JOBS=50
# The log's last line says how it ended, what the code means, and what it has used: by the clock of
# this script, and Slurm's number of nodes.
nodes=${SLURM_JOB_NUM_NODES:-1}
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
# --kill-on-bad-exit: when one rank dies, the others do not wait for it until the limit.
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
srun --kill-on-bad-exit=1 "${python[@]}" -m hpctrain ${HPCTRAIN_CHECK:+check} configs/run.toml </dev/null &
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
  if scontrol requeue "$SLURM_JOB_ID" >"$receipt"; then
    taken=$(<"$receipt")
    taken=${taken#*<} # of LSF: Job <1234> is submitted
    how+=", submitted again as $SLURM_JOB_ID"
  else
    echo "This could not be submitted again: see above, and submit it by hand." >&2
    how+=", NOT submitted again: submit it by hand"
  fi
  [[ $receipt == /dev/null ]] || rm -f -- "$receipt"
fi
finish "$next" "$how"
