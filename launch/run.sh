# shellcheck shell=bash
# What the other scripts share; to be sourced, not run.

set -euo pipefail

dry_run=false
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=true
  shift
fi

# The interpreter that has instella-jax installed.
: "${PYTHON:=python}"

# Ends a script that was called in another way than $usage, which it sets before.
say_usage() {
  printf '%s\n' "${usage:?}" >&2
  exit 2
}

# Prints a command as it can be pasted, then becomes it; with --dry-run it only prints.
launch() {
  # In one write: several processes print at the same time.
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "$line"
  if [[ "$dry_run" == false ]]; then
    exec "$@"
  fi
}

# Exports NAME=VALUE unless the caller has set NAME, and prints what holds.
setting() {
  local name="${1%%=*}"
  fixed "$name=${!name:-${1#*=}}"
}

# Exports NAME=VALUE whatever the caller has set, and prints it.
fixed() {
  export "${1?}"
  printf 'export %s=%q\n' "${1%%=*}" "${1#*=}"
}
