# shellcheck shell=bash
# What a kind of chip needs in the environment; to be sourced after run.sh, not run.

# Sets it for cpu, cuda or rocm; fails for another kind.
chip_settings() {
  # Fails where the chip cannot be used, in place of a slow run on the CPU; on a CPU, keeps jax from
  # looking for accelerators.
  case "$1" in
    cpu | cuda | rocm) setting JAX_PLATFORMS="$1" ;;
    *) return 1 ;;
  esac
  if [[ "$1" == cpu ]]; then
    # Large pages for what each call allocates anew, on Linux: spares page faults.
    setting GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    return
  fi
  memory_share
  if [[ "$1" == cuda ]]; then
    # Hides collectives behind computation, pipelines them, double-buffers loops.
    setting JAX_OPTIMIZATION_LEVEL=O1
    return
  fi
  local flags=(
    # Hides collectives behind computation.
    --xla_gpu_enable_latency_hiding_scheduler=true
    # Matrix products by hipBLASLt, not by Triton.
    --xla_gpu_enable_triton_gemm=false
    --xla_gpu_enable_cublaslt=true
    # No command buffers, which hinder that hiding.
    --xla_gpu_enable_command_buffer=
    # Gathers parameters and scatters gradients in pieces of 128 MiB.
    --xla_gpu_all_gather_combine_threshold_bytes=134217728
    --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  )
  setting XLA_FLAGS="${flags[*]}"
  # Keeps scratch memory between kernels.
  setting HSA_NO_SCRATCH_RECLAIM=1
  # Two hardware queues: one computes, one communicates.
  setting GPU_MAX_HW_QUEUES=2
  # Kernel arguments in device memory: less time before each kernel.
  setting HIP_FORCE_DEV_KERNARG=1
  # RCCL's protocol for large messages.
  setting NCCL_PROTO=Simple
  # Turns MSCCL off, algorithms that RCCL would load in place of its own.
  setting RCCL_MSCCL_ENABLE=0
}

# Share of a GPU's memory that jax takes at the start; what --mode=plan counts on.
memory_share() {
  setting XLA_PYTHON_CLIENT_MEM_FRACTION=.9
}
