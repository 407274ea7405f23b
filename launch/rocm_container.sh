#!/usr/bin/env bash
# Runs a config in AMD's container of jax for ROCm, on all GPUs of this machine.
#
#   launch/rocm_container.sh [--dry-run] --config=FILE[:VARIANT] [--config.KEY=VALUE ...]
#
# IMAGE chooses the container, DATA a folder that is mounted read-only as /data, MODELS one as
# /models; runs and the compile cache stay in the repository.

# shellcheck source=launch/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

usage="usage: launch/rocm_container.sh [--dry-run] --config=FILE ..."
(($# >= 1)) || say_usage

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
image="${IMAGE:-rocm/jax:latest}"

# The kernel driver and the GPUs; the group that may open them; shared memory for RCCL and the
# data workers; no address space layout or system call filter in RCCL's way.
options=(
  --rm --network=host --ipc=host --shm-size=64g
  --device=/dev/kfd --device=/dev/dri --group-add=video
  --security-opt=seccomp=unconfined --cap-add=SYS_PTRACE
  --volume="$root:/instella-jax" --workdir=/instella-jax
  --env=INSTELLA_JAX_CACHE=/instella-jax/runs/xla
)
if [[ -n "${DATA:-}" ]]; then
  options+=(--volume="$DATA:/data:ro")
fi
if [[ -n "${MODELS:-}" ]]; then
  options+=(--volume="$MODELS:/models:ro")
fi

# The image brings jax for its ROCm; pip adds the rest. one_machine.sh sets the environment.
inside='pip install --quiet --editable . && exec launch/one_machine.sh rocm "$@"'

launch docker run "${options[@]}" "$image" bash -c "$inside" launch "$@"
