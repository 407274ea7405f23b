#!/usr/bin/env bash
# Runs a config on all hosts of a TPU pod slice, from your own machine.
#
#   launch/tpu_pod.sh [--dry-run] TPU ZONE --config=FILE[:VARIANT] --workdir=gs://bucket/run ...
#   launch/tpu_pod.sh [--dry-run] TPU ZONE data encode MODEL IN OUT   # on a file system they share
#
# Before that, once: copy the repository to every host and install it there,
#   gcloud compute tpus tpu-vm scp --recurse --worker=all . TPU:instella-jax --zone=ZONE
#   gcloud compute tpus tpu-vm ssh TPU --zone=ZONE --worker=all \
#     --command='pip install -e "./instella-jax[tpu]"'

# shellcheck source=launch/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

usage="usage: launch/tpu_pod.sh [--dry-run] TPU ZONE --config=FILE ..."
(($# >= 3)) || say_usage
tpu="$1"
zone="$2"
shift 2

# --distributed=tpu: the hosts find each other through the pod's metadata.
# JAX_PLATFORMS=tpu: fails where the TPU cannot be used, in place of a slow run on the CPU.
remote="cd instella-jax && JAX_PLATFORMS=tpu python3 -m instella_jax"
remote+="$(printf ' %q' "$@" --distributed=tpu)"

launch gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$remote"
