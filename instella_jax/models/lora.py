"""Low-rank adapters (LoRA, arXiv 2106.09685): some kernels W become W + scale * A B.

In a tree of parameters they stand beside the kernel that they adapt, which is where `layers.Linear`
looks for them, so that any function of the parameters works with them and without.

Axes: D input width, E output width, R rank; kernels of stacked blocks have a leading layers axis.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from instella_jax.models.layers import LORA_A, LORA_B, Params, partitioned, torch_uniform


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a network, in the place of a network where they alone are trained.

    Attributes:
      kernels: shapes of the adapted kernels, with their logical axes, by the paths of their layers,
        such as "blocks/attention/q".
      rank: R.
      alpha: the scale is alpha / R.
      param_dtype: of the adapters.
    """

    kernels: Mapping[str, Any]
    rank: int
    alpha: float
    param_dtype: str = "float32"

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / self.rank

    def init(self, key: Key[Array, ""]) -> dict[str, Params]:
        """Make A, uniform in +-1/sqrt(D), and B, zeros, with their logical axes."""
        layers: dict[str, Any] = {}
        for number, (path, kernel) in enumerate(sorted(self.kernels.items())):
            *stack, fan_in, fan_out = kernel.value.shape
            *names, axis_in, axis_out = kernel.names
            down = partitioned(torch_uniform(fan_in), (*names, axis_in, None))
            up = partitioned(jax.nn.initializers.zeros, (*names, None, axis_out))
            own = jax.random.fold_in(key, number)
            layers[f"{path}/{LORA_A}"] = down(own, (*stack, fan_in, self.rank), self.param_dtype)
            layers[f"{path}/{LORA_B}"] = up(own, (*stack, self.rank, fan_out), self.param_dtype)
        return {"params": unflatten_dict(layers, sep="/")}


def find_kernels(boxed: Params, paths: Sequence[str]) -> dict[str, Any]:
    """Return the kernels, with their logical axes, of the layers at some paths of a tree."""
    flat = flatten_dict(boxed, sep="/")
    return {path: flat[f"{path}/kernel"] for path in paths}


def adapt(params: Params, adapters: Params, scale: float) -> Params:
    """Return the parameters with adapters beside their kernels, in addition to any there are."""

    def join(layer: dict[str, Any], down: Float[Array, "*layers D R"], up: Any) -> dict[str, Any]:
        up = (scale * up.astype(jnp.float32)).astype(up.dtype)
        if LORA_A in layer:
            down = jnp.concatenate([layer[LORA_A], down], axis=-1)
            up = jnp.concatenate([layer[LORA_B], up], axis=-2)
        return {**layer, LORA_A: down, LORA_B: up}

    return _walk(params, adapters, join)


def merge(params: Params) -> Params:
    """Return the parameters with the adapters added to their kernels, as a network without any."""

    def join(layer: dict[str, Any], down: Float[Array, "*layers D R"], up: Any) -> dict[str, Any]:
        rest = {name: value for name, value in layer.items() if name not in (LORA_A, LORA_B)}
        return {**rest, "kernel": _added(layer["kernel"], down, up)}

    return _walk(params, params, join)


def _added(
    kernel: Float[Array, "*layers D E"], down: Float[Array, "*layers D R"], up: Any
) -> Float[Array, "*layers D E"]:
    product = jnp.matmul(
        down.astype(jnp.float32), up.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)


def _walk(params: Params, adapters: Params, join: Callable[..., dict[str, Any]]) -> Params:
    """Replace each layer that has adapters by `join(layer, A, B)`."""
    if LORA_A in adapters:
        return join(params, adapters[LORA_A], adapters[LORA_B])
    return {
        name: _walk(value, adapters[name], join)
        if name in adapters and hasattr(value, "items")
        else value
        for name, value in params.items()
    }
