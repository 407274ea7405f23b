"""Softmax attention: one function, and the engines that compute it.

- "xla": all logits at once, two products and a softmax.
- "blocks": a block of queries at a time, on a CPU of one head; the backward pass computes the
  logits again, so that no [T, S] matrix is ever kept.
- "cudnn": cuDNN through `jax.nn.dot_product_attention`, on NVIDIA in half precision.
- "flash": jax's own Pallas kernel, on TPU.

Axes: B batch, T queries, S keys, H heads, G heads of the keys, each for H / G heads of the queries,
Dh head width, D = H * Dh.
"""

import functools
import logging
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

Engine = Literal["xla", "blocks", "cudnn", "flash"]
NAMES = ("auto", "xla", "blocks", "cudnn", "flash")

# The best engine of a platform, and from how many keys on: cuDNN needs no length to pay off.
OWN: dict[str, tuple[Engine, int]] = {"cuda": ("cudnn", 0), "tpu": ("flash", 1024)}
# From so many logits of a head on, blocks are faster on a CPU.
CPU_LONG = 2**17
# From so many keys on, the logits are what fills the memory of a training step.
LONG = 1024
# Logits in a block: on a CPU of one head, enough for fast products; elsewhere of all heads.
CPU_BLOCK, DEVICE_BLOCK = 2**20, 2**26
# The TPU kernel cuts queries and keys into blocks of so many.
FLASH_BLOCK = 128

# Finite, so that a query that sees nothing attends to all keys alike.
MASKED = float(jnp.finfo(jnp.float32).min)

# Under which name the result stands in a `jax.checkpoint` policy.
ATTENTION = "attention"

_log = logging.getLogger(__name__)


@functools.cache
def platform() -> str:
    """Return what computes by default: "cpu", "cuda", "rocm" or "tpu".

    An NVIDIA GPU before Ampere is "gpu": cuDNN has no such attention for it.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    if "rocm" in device.client.platform_version:
        return "rocm"
    return "cuda" if float(getattr(device, "compute_capability", 0)) >= 8.0 else "gpu"


def fits(engine: str, dtype: str, queries: int, keys: int, head_dim: int, masked: bool) -> bool:
    """Return whether an engine can compute a shape, on the platform that it is for."""
    if engine == "cudnn":
        even = queries % 2 == keys % 2 == 0 or not masked
        return dtype in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= 128 and even
    if engine == "flash":
        return not masked and queries % FLASH_BLOCK == keys % FLASH_BLOCK == 0
    return engine != "auto"


@functools.cache
def choose(
    name: str, where: str, dtype: str, queries: int, keys: int, head_dim: int, masked: bool
) -> Engine:
    """Choose the engine for a config's word and a shape, and log it once.

    Args:
      name: one of `NAMES`. An engine that cannot compute the shape gives way to another one.
      where: as `platform` says.
      dtype: of queries, keys and values.
      queries: T.
      keys: S.
      head_dim: Dh.
      masked: whether there is a mask.
    """
    shape = (dtype, queries, keys, head_dim, masked)
    own, least = OWN.get(where, ("blocks", LONG))
    long = queries * keys >= CPU_LONG if where == "cpu" else keys >= LONG
    chosen: str = "blocks" if long else "xla"
    if fits(name, *shape):
        chosen = name
    elif fits(own, *shape) and where in OWN and keys >= least:
        chosen = own
    _log.info(
        "attention of %d queries to %d keys in %s on %s: %s (asked for: %s)",
        queries, keys, dtype, where, chosen, name,
    )  # fmt: skip
    return chosen  # pyright: ignore[reportReturnType]


def attend(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B S G Dh"],
    v: Float[Array, "B S G Dh"],
    mask: Bool[Array, "#B 1 #T S"] | None,
    engine: str = "auto",
) -> Float[Array, "B T D"]:
    """Return softmax attention with logits over sqrt(Dh), the heads side by side.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: True where a query sees a key. A query that sees nothing attends to all keys alike.
      engine: one of `NAMES`.
    """
    batch, queries, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    masked = mask is not None
    chosen = choose(engine, platform(), q.dtype.name, queries, keys, head_dim, masked)
    if chosen == "cudnn":
        if mask is not None:
            mask = jnp.broadcast_to(mask, (batch, 1, queries, keys))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
        return checkpoint_name(out.reshape(batch, queries, -1), ATTENTION)
    # Heads before positions: the products then read and write whole matrices.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if chosen == "flash":
        k, v = (jnp.repeat(x, heads // groups, axis=1) for x in (k, v))
        out = _flash(q, k, v)
    else:
        # The heads that share keys become queries of one head.
        shared = heads // groups
        q = q.reshape(batch, groups, shared * queries, head_dim)
        if mask is not None and mask.shape[2] > 1:
            mask = jnp.tile(mask, (1, 1, shared, 1))
        out = whole(q, k, v, mask) if chosen == "xla" else blocks(q, k, v, mask)
    out = out.reshape(batch, heads, queries, head_dim).swapaxes(1, 2)
    return checkpoint_name(out.reshape(batch, queries, -1), ATTENTION)


def whole(
    q: Float[Array, "*heads T Dh"],
    k: Float[Array, "*heads S Dh"],
    v: Float[Array, "*heads S Dh"],
    mask: Bool[Array, "*#heads #T S"] | None,
) -> Float[Array, "*heads T Dh"]:
    """Return attention of heads, each to its own keys, with all logits at once."""
    logits = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=jnp.float32)
    logits /= math.sqrt(q.shape[-1])
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    # Divided after the product: Dh numbers a query instead of S.
    mixed = jnp.einsum(
        "...ts,...sd->...td", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (mixed / weights.sum(-1, keepdims=True)).astype(v.dtype)


def blocks(
    q: Float[Array, "B H T Dh"],
    k: Float[Array, "B H S Dh"],
    v: Float[Array, "B H S Dh"],
    mask: Bool[Array, "#B 1 #T S"] | None,
) -> Float[Array, "B H T Dh"]:
    """Return what `whole` does, a block of queries at a time."""
    if platform() != "cpu":
        return _in_blocks(q, k, v, mask, DEVICE_BLOCK)
    heads = q.shape[:2]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*heads, *mask.shape[2:]))
    one_head = functools.partial(_in_blocks, limit=CPU_BLOCK)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (q, k, v, mask))
    return jax.lax.map(lambda row: one_head(*row), rows).reshape(q.shape)


def _in_blocks(
    q: Float[Array, "*heads T Dh"],
    k: Float[Array, "*heads S Dh"],
    v: Float[Array, "*heads S Dh"],
    mask: Bool[Array, "*#heads #T S"] | None,
    limit: int,
) -> Float[Array, "*heads T Dh"]:
    """Take as many queries at a time as have `limit` logits."""
    queries = q.shape[-2]
    count = min(queries, math.ceil(math.prod(q.shape[:-1]) * k.shape[-2] / limit))
    size = math.ceil(queries / count)

    def cut(x: Array) -> Array:
        """Put blocks of the queries, the last one filled up, before all other axes."""
        pads = [(0, 0)] * x.ndim
        pads[-2] = (0, size * count - queries)
        x = jnp.pad(x, pads)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], count, size, x.shape[-1]), -3, 0)

    of_blocks = cut(mask) if mask is not None and mask.shape[-2] > 1 else None

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(rows: tuple[Array, Array | None]) -> Array:
        return whole(rows[0], k, v, mask if of_blocks is None else rows[1])

    out = jax.lax.map(block, (cut(q), of_blocks))
    out = jnp.moveaxis(out, 0, -3)
    return out.reshape(*q.shape[:-2], size * count, -1)[..., :queries, :]


def _flash(
    q: Float[Array, "B H T Dh"], k: Float[Array, "B H S Dh"], v: Float[Array, "B H S Dh"]
) -> Float[Array, "B H T Dh"]:
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    def size(length: int) -> int:
        return max(n for n in (128, 256, 384, 512) if length % n == 0)

    of_q, of_k = size(q.shape[2]), size(k.shape[2])
    sizes = BlockSizes(
        block_q=of_q, block_k_major=of_k, block_k=of_k, block_b=1,
        block_q_major_dkv=of_q, block_k_major_dkv=of_k, block_k_dkv=of_k, block_q_dkv=of_q,
        block_k_major_dq=of_k, block_k_dq=of_k, block_q_dq=of_q,
    )  # fmt: skip
    return flash_attention(q, k, v, sm_scale=1 / math.sqrt(q.shape[-1]), block_sizes=sizes)
