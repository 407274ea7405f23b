#!/usr/bin/env bash
# Runs a config on the nodes of a Slurm job, one process for each GPU.
#
#   sbatch --nodes=2 launch/slurm.sh --config=FILE[:VARIANT] --workdir=/shared/run ...
#   sbatch --nodes=2 launch/slurm.sh data encode MODEL IN OUT   # each process encodes a part
#   KIND=rocm sbatch --nodes=2 launch/slurm.sh --config=...
#   launch/slurm.sh --dry-run --config=...        # prints the srun command
#
# KIND (cpu, cuda, rocm) sets what launch/one_machine.sh sets for that chip; without it jax takes the
# chip that it finds, with its own settings.
#
# The workdir must be on a file system that all nodes share. instella-jax reads Slurm's own
# variables: the first node coordinates, on a port made of the job's number.
#SBATCH --job-name=instella-jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --output=%x-%j.log
# Two minutes before the time is up: every process saves the same step and ends.
#SBATCH --signal=TERM@120
# A job that was preempted starts again and goes on from its checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append

# Slurm runs a copy of this script, so that its neighbours are found from where sbatch was called.
here="${SLURM_SUBMIT_DIR:-.}/launch"
[[ -r "$here/run.sh" ]] || here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/run.sh
source "$here/run.sh"
# shellcheck source=launch/chip.sh
source "$here/chip.sh"

usage="usage: launch/slurm.sh [--dry-run] --config=FILE ..., by sbatch; KIND is cpu, cuda or rocm"
(($# >= 1)) || say_usage

if [[ -n "${KIND:-}" ]]; then
  chip_settings "$KIND" || say_usage
else
  memory_share
fi

# --kill-on-bad-exit: if one process fails, the others do not wait for it.
launch srun --kill-on-bad-exit=1 "$PYTHON" -m instella_jax "$@" --distributed=slurm
