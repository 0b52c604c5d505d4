# shellcheck shell=bash
# Sourced by what stands above a rank of a shim: start the rank, pass signals on, end as it does.
run_rank_below() {
  "$@" &
  local rank=$! signal code
  for signal in TERM INT USR1; do
    # shellcheck disable=SC2064 # the name of the signal, now
    trap "kill -$signal $rank" "$signal"
  done
  wait "$rank"
  code=$?
  while kill -0 "$rank" 2>/dev/null; do # a signal ended the wait, not the rank
    wait "$rank"
    code=$?
  done
  exit "$code"
}
