#!/usr/bin/env bash
# Runs a config in several processes on this machine: a rehearsal of a run on several hosts.
#
#   launch/processes.sh [--dry-run] COUNT --config=FILE[:VARIANT] [--config.KEY=VALUE ...]
#   launch/processes.sh [--dry-run] COUNT data encode MODEL IN OUT    # each encodes a part
#
# PORT chooses the port of 127.0.0.1 where process 0 listens, 29400 unless it is set.
# The devices of all processes make one mesh. If one process fails, the others are stopped;
# SIGTERM and Ctrl-C reach all of them, and they save a checkpoint of the same step.

# shellcheck source=launch/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

usage="usage: launch/processes.sh [--dry-run] COUNT --config=FILE ... (COUNT of at least 1)"
(($# >= 2)) || say_usage
count="$1"
[[ "$count" =~ ^[1-9][0-9]{0,4}$ ]] || say_usage
shift

# Where process 0 listens. Other values in the environment are those of another run.
fixed JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-29400}"
fixed JAX_NUM_PROCESSES="$count"

processes=()
stop_all() {
  kill -TERM "${processes[@]}" 2>/dev/null || true
}
signalled=false
trap 'signalled=true; stop_all' TERM INT

for ((index = 0; index < count; index++)); do
  launch env JAX_PROCESS_ID="$index" "$PYTHON" -m instella_jax "$@" &
  processes+=("$!")
done

status=0
left="$count"
while ((left > 0)); do
  code=0
  wait -n || code="$?"
  if [[ "$signalled" == true ]]; then
    # It was the signal that ended the wait, not a process.
    signalled=false
    continue
  fi
  left="$((left - 1))"
  if ((code != 0 && status == 0)); then
    status="$code"
    stop_all
  fi
done
exit "$status"
