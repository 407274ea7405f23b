"""Blocks shared by every network.

Axes: B batch, T sequence, H heads, Dh head width, D width. Kernels carry logical axis names
("embed", "heads", "mlp", "layers"), which `sharding.py` maps to the mesh.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, no_type_check

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Num

from instella_jax.models.attention import ATTENTION

# A tree of arrays, or of their shapes.
Params = Any

NORM_EPSILON = 1e-6
# Names of low-rank adapters beside a layer's kernel; see `lora`.
LORA_A, LORA_B = "lora_a", "lora_b"


# Under which name products with weights stand in a `jax.checkpoint` policy.
PRODUCT = "product"


def _kernels(primitive: Any, *_: Any, **__: Any) -> bool:
    """Return whether a value is a kernel's of attention, which keeps more than the result."""
    return str(primitive).startswith(("dot_product_attention_fwd", "pallas"))


_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "none": None,
    "full": _policies.nothing_saveable,
    # No product with weights is computed again, and nothing else is kept but what attention gives.
    "dots": _policies.save_from_both_policies(
        _policies.save_only_these_names(PRODUCT, ATTENTION), _kernels
    ),
    # The same, the products in the memory of the host.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ATTENTION],
        names_which_can_be_offloaded=[PRODUCT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network is computed, apart from what it computes.

    Attributes:
      param_dtype: type in which parameters are initialised and kept; their average and the
        moments of the optimizer are float32 in any case.
      dtype: type of the computation (statistics of norms and softmax stay in float32).
      output_dtype: type of the network's result; losses are computed in float32 of it.
      unroll: whether the depth is unrolled instead of scanned; the parameters are the same.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
      attention: what computes it, one of `attention.NAMES`.
    """

    param_dtype: str = "float32"
    dtype: str = "float32"
    output_dtype: str = "float32"
    unroll: bool = False
    remat: str = "none"
    attention: str = "auto"


def torch_uniform(fan_in: int) -> Callable:
    """Return an initialiser uniform in +-1/sqrt(fan_in), the reference framework's default."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def partitioned(init: Callable, axes: tuple[str | None, ...]) -> Callable[..., Any]:
    """Make an initialiser name the logical axes of its parameter."""
    return nn.with_logical_partitioning(init, axes)


def matmul(
    lhs: Float[Array, "*axes D"],
    rhs: Float[Array, "D E"],
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "*axes E"]:
    """Contract the last axis of `lhs` with the first of `rhs`, as one two-dimensional product.

    XLA's CPU matrix product is clearly faster on [B * T, D] than on [B, T, D].
    """
    del dimension_numbers  # nn.Dense always asks for last axis times first
    flat = lhs.reshape(-1, lhs.shape[-1])
    out = jax.lax.dot_general(
        flat,
        rhs,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return checkpoint_name(out.reshape(*lhs.shape[:-1], rhs.shape[-1]), PRODUCT)


@no_type_check  # flax's own fields cannot be checked at run time
class Linear(nn.Dense):
    """A dense layer that adds the product of its low-rank adapters where its parameters have any.

    They are no parameters of its own: `init` makes none.
    """

    def __call__(self, inputs: Float[Array, "*axes D"]) -> Float[Array, "*axes E"]:
        """Return inputs W + (inputs A) B + bias."""
        out = super().__call__(inputs)
        if not self.has_variable("params", LORA_A):
            return out
        down, up = (self.get_variable("params", name) for name in (LORA_A, LORA_B))
        inputs, down, up = promote_dtype(inputs, down, up, dtype=self.dtype)
        return out + matmul(matmul(inputs, down, None), up, None)


def linear(
    features: int,
    fan_in: int,
    axes: tuple[str | None, str | None],
    run: Execution,
    *,
    use_bias: bool = False,
    xavier: bool = False,
    name: str | None = None,
) -> Linear:
    """Return a dense layer [..., fan_in] -> [..., features] with logical axes on its kernel.

    Args:
      features: output width.
      fan_in: input width, which sets the range of the initial values.
      axes: logical names of the kernel's two axes.
      run: types of parameters and computation.
      use_bias: whether there is a bias.
      xavier: Xavier-uniform kernel and zero bias, instead of uniform +-1/sqrt(fan_in) for both.
      name: linen name.
    """
    kernel_init = nn.initializers.xavier_uniform() if xavier else torch_uniform(fan_in)
    bias_init = nn.initializers.zeros_init() if xavier else torch_uniform(fan_in)
    return Linear(
        features,
        use_bias=use_bias,
        dtype=run.dtype,
        param_dtype=run.param_dtype,
        kernel_init=partitioned(kernel_init, axes),
        bias_init=partitioned(bias_init, axes[1:]),
        dot_general=matmul,
        name=name,
    )


@no_type_check  # flax's own fields cannot be checked at run time
class RMSNorm(nn.RMSNorm):
    """flax's own; in half precision `half_norm`, of the same parameter."""

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        """Return x over the root of its mean square, times the scale."""
        if self.is_initializing() or jnp.dtype(self.dtype) == jnp.float32:
            return super().__call__(x)
        scale = self.get_variable("params", "scale")
        return half_norm(x.astype(self.dtype), scale, self.epsilon, False)


def rms_norm(run: Execution, name: str | None = None) -> RMSNorm:
    """Return an RMSNorm over the last axis, its mean in float32, with a learned scale."""
    return RMSNorm(
        epsilon=NORM_EPSILON,
        dtype=run.dtype,
        param_dtype=run.param_dtype,
        scale_init=partitioned(nn.initializers.ones_init(), (None,)),
        name=name,
    )


def learned_layer_norm(run: Execution, name: str, epsilon: float = NORM_EPSILON) -> nn.LayerNorm:
    """Return a LayerNorm over the last axis with a learned scale and bias."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=run.dtype,
        param_dtype=run.param_dtype,
        use_fast_variance=False,
        scale_init=partitioned(nn.initializers.ones_init(), (None,)),
        bias_init=partitioned(nn.initializers.zeros_init(), (None,)),
        name=name,
    )


def layer_norm(
    x: Float[Array, "*axes D"], epsilon: float = NORM_EPSILON
) -> Float[Array, "*axes D"]:
    """Normalise the last axis without parameters, its statistics in float32."""
    if x.dtype != jnp.float32:
        return half_norm(x, None, epsilon, True)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def half_norm(
    x: Float[Array, "*axes D"], scale: Float[Array, " D"] | None, epsilon: float, centred: bool
) -> Float[Array, "*axes D"]:
    """Normalise the last axis in the type of `x`, with statistics in float32.

    The backward pass reads `x` as it is and two numbers a row: jax's own would keep `x` and what
    it is multiplied with in float32.

    Args:
      x: in half precision.
      scale: of the result, None for none.
      epsilon: added to the mean square.
      centred: whether the mean is taken off before.
    """
    return _half_norm_forward(x, scale, epsilon, centred)[0]


def _half_norm_forward(
    x: Float[Array, "*axes D"], scale: Float[Array, " D"] | None, epsilon: float, centred: bool
) -> tuple[Float[Array, "*axes D"], Any]:
    exact = x.astype(jnp.float32)
    mean = exact.mean(-1, keepdims=True) if centred else None
    if mean is not None:
        exact -= mean
    root = jax.lax.rsqrt(jnp.square(exact).mean(-1, keepdims=True) + epsilon)
    out = exact * root if scale is None else exact * root * scale
    return out.astype(x.dtype), (x, scale, mean, root)


def _half_norm_backward(epsilon: float, centred: bool, kept: Any, g: Array) -> tuple[Any, Any]:
    x, scale, mean, root = kept
    normal = x.astype(jnp.float32)
    normal = (normal if mean is None else normal - mean) * root
    g, of_scale = g.astype(jnp.float32), None
    if scale is not None:
        of_scale = (g * normal).sum(range(x.ndim - 1)).astype(scale.dtype)
        g *= scale
    along = (g * normal).mean(-1, keepdims=True)
    of_x = root * (g - normal * along)
    if centred:
        of_x -= root * g.mean(-1, keepdims=True)
    return of_x.astype(x.dtype), of_scale


half_norm.defvjp(_half_norm_forward, _half_norm_backward)


def rope_tables(
    ids: Num[np.ndarray, "T A"], dims: Sequence[int], theta: float = 10_000.0
) -> tuple[Float32[np.ndarray, "T Dh"], Float32[np.ndarray, "T Dh"]]:
    """Return cosines and sines of rotary positions over several axes.

    Args:
      ids: [T, A] positions on each axis, not necessarily whole.
      dims: the share of the head width that each of the A axes takes, even numbers.
      theta: base of the frequencies.

    Returns:
      cos, sin: [T, sum(dims)] float32. Each angle stands twice in a row; the rotation itself is
      by halves, see `rotate`. The published weights were trained with this pair of conventions.
    """
    angles = []
    for axis, size in enumerate(dims):
        frequencies = theta ** (-2.0 * np.arange(size // 2) / size)
        angles.append(np.repeat(ids[:, axis, None].astype(np.float64) * frequencies, 2, axis=-1))
    angle = np.concatenate(angles, axis=-1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(
    x: Float[Array, "B T H Dh"], cos: Float[Array, "T Dh"], sin: Float[Array, "T Dh"]
) -> Float[Array, "B T H Dh"]:
    """Apply rotary positions to `x`, by halves."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = cos[:, None, :].astype(x.dtype), sin[:, None, :].astype(x.dtype)
    return x * cos + turned * sin


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    hidden: int
    run: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        width = x.shape[-1]
        gate = linear(self.hidden, width, ("embed", "mlp"), self.run, name="gate")(x)
        up = linear(self.hidden, width, ("embed", "mlp"), self.run, name="up")(x)
        return linear(width, self.hidden, ("mlp", "embed"), self.run, name="down")(
            nn.silu(gate) * up
        )


class GeluMLP(nn.Module):
    """Linear to 4D, GELU (tanh), Linear back, with biases."""

    run: Execution
    xavier: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        width = x.shape[-1]
        options: dict[str, Any] = dict(use_bias=True, xavier=self.xavier)
        x = linear(4 * width, width, ("embed", "mlp"), self.run, name="up", **options)(x)
        x = nn.gelu(x, approximate=True)
        return linear(width, 4 * width, ("mlp", "embed"), self.run, name="down", **options)(x)


def recomputed(block: type[nn.Module], run: Execution) -> type[nn.Module]:
    """Return the class of the block that recomputes in the backward pass what `run` says."""
    if run.remat == "none":
        return block
    # In a scan XLA cannot merge the recomputation with the first computation.
    return nn.remat(block, prevent_cse=run.unroll, policy=REMAT_POLICIES[run.remat])


def repeat(
    block: type[nn.Module],
    num_layers: int,
    run: Execution,
    *,
    in_axes: Any = nn.broadcast,
    methods: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Stack `num_layers` copies of a block whose call takes and returns (carry, output).

    Parameters get a leading "layers" axis whether the depth is scanned or unrolled, so a
    checkpoint of one serves the other.

    Args:
      block: the class of the block.
      num_layers: how many copies.
      run: whether to unroll, and what to recompute in the backward pass.
      in_axes: for each argument of the call after the carry, the axis that runs over the layers,
        or `nn.broadcast`.
      methods: `in_axes` by name, where methods besides the call are stacked too.
    """
    options: dict[str, Any] = dict(
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=num_layers,
        unroll=num_layers if run.unroll else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    each = {name: {**options, "in_axes": axes} for name, axes in (methods or {}).items()}
    block = recomputed(block, run)
    return nn.scan(block, methods=each or {"__call__": {**options, "in_axes": in_axes}})


def unstack(stacked: Params) -> tuple[Params, ...]:
    """Return the parameters of each layer, which `repeat` stacks along the first axis."""
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(operator.itemgetter(i), stacked) for i in range(count))
