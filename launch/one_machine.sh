#!/usr/bin/env bash
# Runs a config, or another command, on all devices of this machine.
#
#   launch/one_machine.sh [--dry-run] cpu|cuda|rocm --config=FILE[:VARIANT] [--config.KEY=VALUE ...]
#   launch/one_machine.sh [--dry-run] cpu|cuda|rocm data encode MODEL IN OUT
#
# For example the published run, on 8 MI300X:
#   launch/one_machine.sh rocm --config=configs/t2i_diffusion.py:instella_512 \
#     --config.tokenizer=/models/tokenizer --config.text.encoder=/models/olmo \
#     --config.data.folder.path=/my/pictures

# shellcheck source=launch/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
# shellcheck source=launch/chip.sh
source "$(dirname "${BASH_SOURCE[0]}")/chip.sh"

usage="usage: launch/one_machine.sh [--dry-run] cpu|cuda|rocm --config=FILE ..."
(($# >= 2)) || say_usage
kind="$1"
shift

chip_settings "$kind" || say_usage

launch "$PYTHON" -m instella_jax "$@"
