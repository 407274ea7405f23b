"""Codes from text features, by either kind of generator: whole, step by step, from other codes.

Axes: B pictures, N latent tokens, K bits, L text length, Dt width of the text encoder.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from instella_jax.kernels import binary_sampling
from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.binary_diffusion import Target
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import Params
from instella_jax.sampling import loops
from instella_jax.sampling.options import Options

Generator = DiffusionTransformer | ArTransformer

# Called after each step with how many are done, how many there are, and the codes of a batch.
OnStep = Callable[[int, int, jax.Array], None]


class Start(NamedTuple):
    """Codes that sampling starts from, in the place of noise.

    Attributes:
      code: float32 [B, N, K], 0 and 1.
      keep: bool [B, N], tokens that stay as they are; None for none.
      step: the step of the diffusion sampler that comes first; the codes get the noise of its time.
    """

    code: np.ndarray
    keep: np.ndarray | None = None
    step: int = 0


def generate_codes(
    network: Generator,
    params: Params,
    features: Float[Array, "layers rows L Dt"],
    mask: Any,
    keys: Key[Array, " B"],
    options: Options,
    *,
    target: Target,
    start: Start | None = None,
    blend: float | None = None,
    on_step: OnStep | None = None,
) -> Float[Array, "B N K"]:
    """Sample codes for text of rows = 2B, conditional ones first.

    Args:
      network: of either kind.
      params: its own.
      features: of the text, see `PromptFeatures`.
      mask: likewise.
      keys: of the pictures.
      options: see `Options`.
      target: what a diffusion generator was trained to tell.
      start: see `Start`; None for noise.
      blend: with rows = 3B, how far from the first B prompts to the second.
      on_step: see `OnStep`; it changes no bit.
    """
    shared = dict(
        guidance=options.guidance,
        temperature=options.temperature,
        kernel=binary_sampling.resolve(options.kernel, jax.default_backend()),
        blend=blend,
    )
    text = features, mask, keys
    if isinstance(network, ArTransformer):
        return _autoregressive(network, params, *text, start, on_step, shared)
    shared.update(target=target, rho=options.rho, protocol=options.protocol)
    return _diffusion(network, params, *text, start, on_step, shared, options)


def _diffusion(
    network: DiffusionTransformer,
    params: Params,
    features: Any,
    mask: Any,
    keys: Any,
    start: Start | None,
    on_step: OnStep | None,
    shared: dict[str, Any],
    options: Options,
) -> Float[Array, "B N K"]:
    first, known = 0, None
    if start is None:
        bits = loops.initial_bits(keys, (network.num_tokens, network.bits))
    else:
        first, code = start.step, jnp.asarray(start.code, jnp.float32)
        t = binary_diffusion.time_of_step(first, options.steps, options.rho)
        bits = loops.noisy_bits(code, t, keys)
        known = None if start.keep is None else (code, jnp.asarray(start.keep))
    for step, stop in _parts(first, options.steps, on_step):
        bits = loops.sample_diffusion(
            network, params, features, mask, keys,
            steps=options.steps, bits=bits, first=step, last=stop, known=known, **shared,
        )  # fmt: skip
        if on_step is not None:
            on_step(stop, options.steps, bits)
    return bits


def _autoregressive(
    network: ArTransformer,
    params: Params,
    features: Any,
    mask: Any,
    keys: Any,
    start: Start | None,
    on_step: OnStep | None,
    shared: dict[str, Any],
) -> Float[Array, "B N K"]:
    count = network.num_tokens
    code = jnp.asarray(np.zeros((len(keys), count, network.bits), np.float32))
    keep = None
    if start is not None and start.keep is not None:
        code, keep = jnp.asarray(start.code, jnp.float32), jnp.asarray(start.keep)
    cache = loops.start_ar(network, params, features)
    for step, stop in _parts(0, count, on_step):
        cache, code = loops.continue_ar(
            network, params, cache, mask, keys, code, step, stop, keep=keep, **shared
        )
        if on_step is not None:
            on_step(stop, count, code)
    return code


def _parts(first: int, last: int, on_step: OnStep | None) -> list[tuple[int, int]]:
    """Return the parts of a loop: all of it, or each step where somebody watches."""
    return [(first, last)] if on_step is None else [(i, i + 1) for i in range(first, last)]
