#!/usr/bin/env bash
# Trains configs/run.toml on El Capitan, Tuolumne and RZAdams at LLNL (4 MI300A a node).
# Two things to edit, marked EDIT: the account, and the number of nodes. Then:
#
#   flux batch jobs/sites/el-capitan.sh
#
# The same with HPCTRAIN_CHECK=1 looks at everything that the run needs, in the same allocation, and
# trains nothing:
#
#   HPCTRAIN_CHECK=1 flux batch --time-limit=10m jobs/sites/el-capitan.sh
#
# Stopped by its time limit, the run is saved and the job submitted again, until it is complete. A
# job that is cancelled saves too, where the site leaves it the time, and does not come back.
# `touch runs/digits/STOP` saves and ends the run; remove the file to go on.
# Written from https://pypi.org/project/hpc-launcher/1.0.6/ of LLNL, systems/lc/el_capitan_family.py
# (2026-11-29); https://github.com/BLAST-WarpX/warpx, Docs/source/install/hpc/tuolumne.rst: 21 of 24
# cores an APU (2026-11-29). Not tried on hardware.
# GPU and CPU of an MI300A share 128 GB of memory: what loading keeps, the model lacks.
# RCCL reaches Slingshot by a plug-in alone, aws-ofi-nccl or, before ROCm 7.1, aws-ofi-rccl.
# It has to be of the ROCm that torch brings: set its folder in LD_LIBRARY_PATH by --env, or
# --module. hpctrain check names the way that is taken, and warns of plain sockets.

#flux: --job-name=digits
# EDIT: Whom the time is charged to.
#flux: --bank=my_account
#flux: --queue=pbatch
# EDIT: The number of nodes.
#flux: --nodes=2
#flux: --time-limit=7200s
# USR1 goes to all ranks so many seconds before the limit. hpctrain asks for the time left by itself
# and may stop earlier; this is for where flux job timeleft does not answer.
#flux: --signal=USR1@300s
# One log, with the errors in it.
#flux: --output=digits-{{id}}.log
set -uo pipefail
# This script runs in an instance of Flux of its own, which has the nodes of the job.
nodes=$(flux getattr size) || nodes=2
job=$(flux getattr jobid) || job=$$
[[ $job != $'\xc6\x92'* ]] || job=f${job#$'\xc6\x92'} # by the locale its f may have a hook

# Whatever brings Python, torch and mpi4py here: a module, or an environment beside the config.
if [[ -f .venv/bin/activate ]]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
python=(python)

# RCCL is to meet over Slingshot, not over the management network.
export NCCL_SOCKET_IFNAME=hsi0
# From HPE: avoids hangs.
export NCCL_NET_GDR_LEVEL=3
# Rings may cross from one NIC to another.
export NCCL_CROSS_NIC=1
# RCCL hangs with libfabric's other way of watching memory, memhooks.
export FI_MR_CACHE_MONITOR=userfaultfd
# For RCCL on Slingshot's NICs.
export FI_CXI_DISABLE_HOST_REGISTER=1
# The same: room for the completions of many ranks.
export FI_CXI_DEFAULT_CQ_SIZE=131072
# Messages are matched in software where the NIC runs out of room, instead of failing.
export FI_CXI_RX_MATCH_MODE=hybrid

# Threads of a rank: of its own cores.
export OMP_NUM_THREADS=21
# Each rank gets its own APU and its cores, by Flux: mpibind takes GPUs by what is near, not by what
# the job was given.
bind=(--setopt=mpibind=off --setopt=gpu-affinity=per-task --setopt=cpu-affinity=per-task)
# The first job's name, and the number of this one among those that go on from it: what the config
# asks for once, as by checkpoint.resume = "never", only the first of them does.
if [[ ! ${HPCTRAIN_ATTEMPT:-1} =~ ^[1-9][0-9]{0,5}$ ]]; then
  echo "error: HPCTRAIN_ATTEMPT is not the number of a job" >&2
  exit 64
fi
export HPCTRAIN_TOKEN=${HPCTRAIN_TOKEN:-flux-$job}
export HPCTRAIN_ATTEMPT=$((${HPCTRAIN_ATTEMPT:-1}))
export HPCTRAIN_MAX_JOBS=50
# The log's last line says how it ended, what the code means, and what it has used: by the clock of
# this script, and the brokers of the job's instance, one a node.

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
# exit-on-error: when one rank dies, the others do not wait for it until the limit. Signals go to the
# ranks by Flux: before 2025 flux run did not pass them on. HUP is how a job hears that it is canceled.
# The ranks run in the background: bash would hold back a trap until a command in the foreground
# ends. What the batch system sends to this script alone goes on to them as USR1, which every
# launcher forwards; TERM some take as an order to kill. Launchers read what stands in their stdin,
# which may be the rest of this script.
ranks='' asked=''
# shellcheck disable=SC2317,SC2329 # the traps call it
pass_on() {
  asked=yes
  [[ -z $ranks ]] || flux job killall --force --signal=SIGUSR1 2>/dev/null
}
# TERM to this script means that somebody ends the job (scancel, bkill, qdel, a preemption): it
# saves, and does not come back by itself.
ended=
trap 'ended=yes; pass_on' TERM INT HUP
trap pass_on USR1 USR2 URG XCPU
flux run --nodes="$nodes" --ntasks="$((nodes * 4))" --cores-per-task=21 --gpus-per-task=1 --setopt=exit-on-error "${bind[@]}" "${python[@]}" -m hpctrain ${HPCTRAIN_CHECK:+check} configs/run.toml </dev/null &
ranks=$!
[[ -z $asked ]] || pass_on # it came before they were started
wait "$ranks"
code=$?
while kill -0 "$ranks" 2>/dev/null; do # a trap has ended the wait, not the ranks
  wait "$ranks"
  code=$?
done
trap 'ended=yes' TERM INT HUP # also while the lines below find out what to do
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
  if HPCTRAIN_ATTEMPT=$((HPCTRAIN_ATTEMPT + 1)) flux --parent batch --dependency="afterany:$job" jobs/sites/el-capitan.sh >"$receipt"; then
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
