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
  export "$name=${!name:-${1#*=}}"
  printf 'export %s=%q\n' "$name" "${!name}"
}
