"""Times the sampling kernel and its reference on the device that is here.

    python -m benchmarks.binary_sampling [--batch 64 --tokens 128 --bits 64 --dtype bfloat16]

For both operations, the reference and the kernel of the device: microseconds a call, how many
times as fast as the reference that is, bytes that must move, and that rate as a share of what a
plain copy reaches on the same device. A CPU has no kernel: there Pallas' interpreter runs those of
both kinds of chip, which shows that they work and says nothing of their speed on a chip. The last
column counts the bits that differ from the reference: a few in 10^7, where a uniform falls between
two roundings of one probability. Axes: B images, N tokens, K bits.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arguments import whole
from benchmarks.timing import where
from instella_jax.errors import command_line
from instella_jax.kernels import binary_sampling

REPEATS = 7
COPY_BYTES = {"cpu": 2**27}


def seconds(function: Callable[..., jax.Array], *args: jax.Array, calls: int) -> float:
    """Return seconds per call, the best of a few runs, of a jitted function that makes `calls`
    calls."""
    function(*args).block_until_ready()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(*args).block_until_ready()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def copy_rate() -> float:
    """Return bytes per second of a copy, read and written, much larger than any cache."""
    size = COPY_BYTES.get(jax.default_backend(), 2**30)
    source = jnp.zeros(size // 4, jnp.float32)
    calls = 4
    copies = jax.jit(lambda x: jax.lax.fori_loop(0, calls, lambda i, x: x + i, x))
    return 2 * size / seconds(copies, source, calls=calls)


def repeated(calls: int, step: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Call a step one after another inside one program, as the sampling loops do."""

    @jax.jit
    def run(logits: jax.Array, z: jax.Array, keys: jax.Array) -> jax.Array:
        def body(i: jax.Array, z: jax.Array) -> jax.Array:
            # The guidance changes, or XLA would move all but the sampling out of the loop.
            return step(logits, z, keys, i, 7.5 + 1e-3 * i)

        return jax.lax.fori_loop(0, calls, body, z)

    return run


def steps(how: dict[str, Any]) -> dict[str, Callable[..., jax.Array]]:
    """Return the operations, done in one way, under one signature (logits, z, keys, index,
    guidance)."""

    def autoregressive(
        logits: jax.Array, z: jax.Array, keys: jax.Array, index: jax.Array, guidance: jax.Array
    ) -> jax.Array:
        # The bits sampled before are added, or calls would not depend on each other.
        bits = binary_sampling.autoregressive_bits(
            logits[:, :, 0] + z[:, 0].astype(logits.dtype),
            keys,
            index,
            guidance,
            0.5,
            **how,
        )
        return bits[:, None]

    def diffusion(
        logits: jax.Array,
        z: jax.Array,
        keys: jax.Array,
        index: jax.Array,
        guidance: jax.Array,
        protocol: int,
    ) -> jax.Array:
        return binary_sampling.diffusion_step(
            logits,
            z,
            keys,
            index,
            0.7,
            0.65,
            guidance,
            1.0,
            False,
            protocol=protocol,
            **how,
        )

    return {
        "diffusion, protocol 1": functools.partial(diffusion, protocol=1),
        "diffusion, protocol 2": functools.partial(diffusion, protocol=2),
        "autoregressive": autoregressive,
    }


def ways() -> dict[str, dict[str, Any]]:
    """Return the reference and the kernel that the device can run: arguments by what they are
    called."""
    reference = {"reference": dict(implementation="xla")}
    platform = jax.default_backend()
    if platform in binary_sampling.PALLAS:
        return reference | {"kernel": dict(implementation=binary_sampling.PALLAS[platform])}
    return reference | {
        f"{kind} interpreted": dict(implementation=f"pallas_{kind}", interpret=True)
        for kind in ("gpu", "tpu")
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=whole(), default=64)
    parser.add_argument("--tokens", type=whole(), default=128)
    parser.add_argument("--bits", type=whole(), default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--calls", type=whole(0), default=0, help="per timing; default by platform")
    options = parser.parse_args()
    with command_line():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Time both operations in all ways that the device has."""
    device, rate = where(), copy_rate()
    calls = options.calls or (10 if jax.default_backend() == "cpu" else 1000)
    print(f"{device}: copies {rate / 1e9:.1f} GB/s")
    keys = jax.random.split(jax.random.key(0), options.batch)
    shape = (options.batch, options.tokens, options.bits)
    logits = 2 * jax.random.normal(jax.random.key(1), (2, *shape))
    z = (jax.random.uniform(jax.random.key(2), shape) < 0.5).astype(jnp.float32)
    print(f"B, N, K = {shape}, {options.dtype} logits, {calls} calls in one program")
    print(
        f"{'operation':22} {'how':15} {'us/call':>9} {'as fast':>8} {'MB':>8} {'GB/s':>8} "
        f"{'of copy':>8} differ"
    )
    expected: dict[str, jax.Array] = {}
    reference: dict[str, float] = {}
    for label, how in ways().items():
        for name, step in steps(how).items():
            rows = 1 if name == "autoregressive" else options.tokens
            args = logits[:, :, :rows].astype(options.dtype), z[:, :rows], keys
            states = 1 if name == "autoregressive" else 2  # written; read too
            moved = args[0].nbytes + states * args[1].nbytes
            spent = seconds(repeated(calls, step), *args, calls=calls)
            bits = jax.jit(step)(*args, 1, 7.5)
            ratio = reference.setdefault(name, spent) / spent
            differ = int((bits != expected.setdefault(name, bits)).sum())
            print(
                f"{name:22} {label:15} {spent * 1e6:9.1f} {ratio:7.2f}x {moved / 1e6:8.2f} "
                f"{moved / spent / 1e9:8.2f} {moved / spent / rate:8.1%} {differ} of {bits.size}"
            )


if __name__ == "__main__":
    main()
