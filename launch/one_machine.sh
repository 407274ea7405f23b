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

usage="usage: launch/one_machine.sh [--dry-run] cpu|cuda|rocm --config=FILE ..."
kind="${1:?$usage}"
shift

case "$kind" in
  cpu)
    # Keeps jax from looking for accelerators.
    setting JAX_PLATFORMS=cpu
    # Large pages for what each call allocates anew, on Linux: spares page faults.
    setting GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    ;;
  cuda)
    # Fails where the GPU cannot be used, in place of a slow run on the CPU.
    setting JAX_PLATFORMS=cuda
    # Hides collectives behind computation, pipelines them, double-buffers loops.
    setting JAX_OPTIMIZATION_LEVEL=O1
    # Share of the memory that jax takes at the start; what --mode=plan counts on.
    setting XLA_PYTHON_CLIENT_MEM_FRACTION=.9
    ;;
  rocm)
    setting JAX_PLATFORMS=rocm
    setting XLA_PYTHON_CLIENT_MEM_FRACTION=.9
    # Hides collectives behind computation; matrix products by hipBLASLt, not Triton; no command
    # buffers, which hinder the overlap; gradients and parameters in pieces of 128 MiB.
    setting XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_cublaslt=true \
--xla_gpu_enable_command_buffer= \
--xla_gpu_all_gather_combine_threshold_bytes=134217728 \
--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"
    # Keeps scratch memory between kernels.
    setting HSA_NO_SCRATCH_RECLAIM=1
    # Two hardware queues: one computes, one communicates.
    setting GPU_MAX_HW_QUEUES=2
    # Kernel arguments in device memory: less time before each kernel.
    setting HIP_FORCE_DEV_KERNARG=1
    # RCCL's protocol for large messages, and its own algorithms.
    setting NCCL_PROTO=Simple
    setting RCCL_MSCCL_ENABLE=0
    ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac

launch "$PYTHON" -m instella_jax "$@"
