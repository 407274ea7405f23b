"""What the caches of the samplers gain, as ratios.

    python -m benchmarks.sampling [--what ar text --sizes demo mid --batch 1]

ar: decoding with a key/value cache against computing all positions anew for each token (the
reference of the tests). text: the diffusion sampler with the prompt's keys and values made once
against making them in every step. Both alternatives are one compiled program each, sample with the
same numbers, and take turns; the ratio is that of the medians.
Axes: B images, N latent tokens, K bits, L text length, Dt text width.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.arguments import whole
from benchmarks.timing import compare, spread, where
from instella_jax.errors import command_line
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import init_params
from instella_jax.runtime import sharding
from instella_jax.sampling import loops
from tests import uncached

TOKENS, STEPS, LENGTHS = 128, 20, (64, 128)
SIZES: dict[str, dict[str, int]] = {
    "demo": dict(num_layers=4, num_heads=4, head_dim=32, bits=32, text_width=64),
    "mid": dict(num_layers=6, num_heads=8, head_dim=64, bits=64, text_width=512),
}


class Recomputing(DiffusionTransformer):
    """Makes the prompt's keys and values in every call."""

    def text_kv(self, features: jax.Array) -> Any:
        """Pass the features on."""
        return (features,)

    def __call__(
        self, z: jax.Array, t: Any, text: Any, text_mask: jax.Array, layers: None = None
    ) -> jax.Array:
        """Predict as the class above, the depth scanned."""
        (features,) = text
        # Without this XLA would move the computation out of the sampler's loop.
        features = jnp.where(jnp.isfinite(t[1][0, 0]), features, 0.0)
        return super().__call__(z, t, features, text_mask, layers)


def prompts(size: dict[str, int], batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Return random features [layers, 2B, L, Dt] and their mask: B full prompts, B empty ones."""
    shape = (size["num_layers"], 2 * batch, length, size["text_width"])
    mask = jnp.repeat(jnp.array([True, False]), batch)[:, None]
    return jax.random.normal(jax.random.key(1), shape), jnp.broadcast_to(mask, (2 * batch, length))


def random_params(network: Any) -> Any:
    """Return initial parameters."""
    return jax.jit(lambda key: sharding.values(init_params(network, key)))(jax.random.key(0))


def show(name: str, times: dict[str, list[float]], same: bool) -> None:
    """Print a row for each alternative, and their ratio."""
    first, second = times
    for how, seconds in times.items():
        print(f"{name:44}{how:20}{spread(seconds)}")
    gain = spread(times[second]).median / spread(times[first]).median
    note = "" if same else "  BITS DIFFER"
    print(f"{name:44}{'ratio':20}{gain:10.2f}{note}", flush=True)


def decoding(name: str, batch: int, repeats: int) -> None:
    """Return cached against uncached autoregressive decoding."""
    size = SIZES[name]
    network = ArTransformer(num_tokens=TOKENS, **size)
    params, (text, mask) = random_params(network), prompts(size, batch, LENGTHS[0])
    keys = loops.image_keys(jnp.arange(batch))
    uniforms = jax.random.uniform(jax.random.key(2), (batch, TOKENS, size["bits"]))
    whole = jax.jit(functools.partial(uncached.sample_ar, network))
    times, same = compare(
        {
            "cached": lambda: loops.sample_ar(
                network, params, text, mask, keys, guidance=9.0, temperature=0.5, uniforms=uniforms
            ),
            "uncached": lambda: whole(params, text, mask, uniforms, 9.0, 0.5),
        },
        repeats,
    )
    show(f"ar, {name}, B={batch}, L={LENGTHS[0]}", times, same)


def text_cache(name: str, batch: int, length: int, repeats: int) -> None:
    """Return keys and values of the text once against at every step."""
    size = SIZES[name]
    network = DiffusionTransformer(num_tokens=TOKENS, **size)
    params, (text, mask) = random_params(network), prompts(size, batch, length)
    keys = loops.image_keys(jnp.arange(batch))

    def sample(network: DiffusionTransformer) -> jax.Array:
        return loops.sample_diffusion(network, params, text, mask, keys, steps=STEPS)

    again = Recomputing(num_tokens=TOKENS, **size)
    calls = {"once": lambda: sample(network), "at every step": lambda: sample(again)}
    times, same = compare(calls, repeats)
    show(f"text, {name}, B={batch}, L={length}, {STEPS} steps", times, same)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=("ar", "text"), default=["ar", "text"])
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--batch", type=whole(), default=1, help="B, images sampled at a time")
    parser.add_argument(
        "--repeats", type=whole(), default=5, help="timed calls of each alternative"
    )
    options = parser.parse_args()
    with command_line():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Time what the arguments name."""
    print(f"{where()}; N = {TOKENS}, float32; seconds: median (least to most)")
    for name in options.sizes:
        if "ar" in options.what:
            decoding(name, options.batch, options.repeats)
        for length in LENGTHS if "text" in options.what else ():
            text_cache(name, options.batch, length, options.repeats)


if __name__ == "__main__":
    main()
