"""InceptionV3 as FID uses it: the graph of TensorFlow's release of 2015-12-05, in Flax.

It differs from torchvision's network where the released graph does: average poolings leave the
padding out, and the last block pools by the maximum. The weights are the user's: the file
`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, that of torch-fidelity
(`weights-inception-2015-12-05-6726825d.pth`), whose names are the same, or what `save_inception`
has made of one.

Axes: B batch, C channels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from instella_jax.errors import UserError
from instella_jax.models.functional import Params
from instella_jax.weights.tensor_files import open_safetensors
from instella_jax.weights.torch_files import read_state

# Pixels of a side that the network was made for, and numbers of a feature.
SIDE = 299
WIDTH = 2048
# Of the batch normalisations.
_EPSILON = 0.001
# What our leaves are called in torch's file.
_LEAVES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}
Maps = Float[Array, "B h w C"]


class Unit(nn.Module):
    """A convolution, its normalisation with fixed statistics, and ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Apply them."""
        width = (self.features,)
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(p, p) for p in self.padding],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.param("mean", nn.initializers.zeros, width)
        var = self.param("var", nn.initializers.ones, width)
        return nn.relu((x - mean) * (scale * jax.lax.rsqrt(var + _EPSILON)) + bias)


def _average(x: Maps) -> Maps:
    edges: Any = ((1, 1), (1, 1))
    return nn.avg_pool(x, (3, 3), (1, 1), edges, count_include_pad=False)


def _maximum(x: Maps, stride: int = 2) -> Maps:
    edges: Any = ((1, 1), (1, 1)) if stride == 1 else "VALID"
    return nn.max_pool(x, (3, 3), (stride, stride), edges)


class InceptionA(nn.Module):
    """The blocks 5b, 5c and 5d."""

    pooled: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Join four branches."""
        one = Unit(64, name="branch1x1")(x)
        five = Unit(48, name="branch5x5_1")(x)
        five = Unit(64, (5, 5), padding=(2, 2), name="branch5x5_2")(five)
        three = Unit(64, name="branch3x3dbl_1")(x)
        three = Unit(96, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(three)
        three = Unit(96, (3, 3), padding=(1, 1), name="branch3x3dbl_3")(three)
        pool = Unit(self.pooled, name="branch_pool")(_average(x))
        return jnp.concatenate([one, five, three, pool], -1)


class InceptionB(nn.Module):
    """The block 6a, which halves the maps."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Join three branches."""
        three = Unit(384, (3, 3), 2, name="branch3x3")(x)
        double = Unit(64, name="branch3x3dbl_1")(x)
        double = Unit(96, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        double = Unit(96, (3, 3), 2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, _maximum(x)], -1)


class InceptionC(nn.Module):
    """The blocks 6b to 6e."""

    width: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Join four branches."""
        c = self.width
        row: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        one = Unit(192, name="branch1x1")(x)
        seven = Unit(c, name="branch7x7_1")(x)
        seven = Unit(c, **row, name="branch7x7_2")(seven)
        seven = Unit(192, **column, name="branch7x7_3")(seven)
        double = Unit(c, name="branch7x7dbl_1")(x)
        double = Unit(c, **column, name="branch7x7dbl_2")(double)
        double = Unit(c, **row, name="branch7x7dbl_3")(double)
        double = Unit(c, **column, name="branch7x7dbl_4")(double)
        double = Unit(192, **row, name="branch7x7dbl_5")(double)
        pool = Unit(192, name="branch_pool")(_average(x))
        return jnp.concatenate([one, seven, double, pool], -1)


class InceptionD(nn.Module):
    """The block 7a, which halves the maps."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Join three branches."""
        three = Unit(192, name="branch3x3_1")(x)
        three = Unit(320, (3, 3), 2, name="branch3x3_2")(three)
        seven = Unit(192, name="branch7x7x3_1")(x)
        seven = Unit(192, (1, 7), padding=(0, 3), name="branch7x7x3_2")(seven)
        seven = Unit(192, (7, 1), padding=(3, 0), name="branch7x7x3_3")(seven)
        seven = Unit(192, (3, 3), 2, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, _maximum(x)], -1)


class InceptionE(nn.Module):
    """The blocks 7b and 7c; the second one pools by the maximum."""

    by_maximum: bool

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Join four branches."""

        def crossed(x: Maps, names: tuple[str, str]) -> list[Maps]:
            return [
                Unit(384, (1, 3), padding=(0, 1), name=names[0])(x),
                Unit(384, (3, 1), padding=(1, 0), name=names[1])(x),
            ]

        one = Unit(320, name="branch1x1")(x)
        three = Unit(384, name="branch3x3_1")(x)
        double = Unit(448, name="branch3x3dbl_1")(x)
        double = Unit(384, (3, 3), padding=(1, 1), name="branch3x3dbl_2")(double)
        pooled = _maximum(x, 1) if self.by_maximum else _average(x)
        return jnp.concatenate(
            [
                one,
                *crossed(three, ("branch3x3_2a", "branch3x3_2b")),
                *crossed(double, ("branch3x3dbl_3a", "branch3x3dbl_3b")),
                Unit(192, name="branch_pool")(pooled),
            ],
            -1,
        )


class InceptionV3(nn.Module):
    """The network up to its last pooling."""

    @nn.compact
    def __call__(self, images: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """Return features of images in [0, 255], resized already."""
        x = (images - 128) / 128
        x = Unit(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = Unit(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = Unit(64, (3, 3), padding=(1, 1), name="Conv2d_2b_3x3")(x)
        x = Unit(80, name="Conv2d_3b_1x1")(_maximum(x))
        x = _maximum(Unit(192, (3, 3), name="Conv2d_4a_3x3")(x))
        for letter, pooled in zip("bcd", (32, 64, 64), strict=True):
            x = InceptionA(pooled, name=f"Mixed_5{letter}")(x)
        x = InceptionB(name="Mixed_6a")(x)
        for letter, width in zip("bcde", (128, 160, 160, 192), strict=True):
            x = InceptionC(width, name=f"Mixed_6{letter}")(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(False, name="Mixed_7b")(x)
        x = InceptionE(True, name="Mixed_7c")(x)
        return x.mean((1, 2))


def inception_features(
    params: Params, images: Float[Array, "B 299 299 3"]
) -> Float[Array, "B 2048"]:
    """Return features; see `InceptionV3`."""
    return InceptionV3().apply({"params": params}, images)  # pyright: ignore


def _shapes() -> dict[str, tuple[int, ...]]:
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    made = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]
    leaves: dict[str, Any] = dict(flatten_dict(made, sep="/"))
    return {name: leaf.shape for name, leaf in leaves.items()}


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return our parameters by their paths out of those of torch's file; its `fc` is left out.

    Raises:
      UserError: one is missing or has another shape.
    """
    found = {}
    for name, shape in _shapes().items():
        *block, leaf = name.split("/")
        theirs = ".".join([*block, _LEAVES[leaf]])
        if theirs not in state:
            raise UserError(f"no Inception of FID: the weights lack {theirs!r}")
        value = np.asarray(state[theirs], np.float32)
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        if value.shape != shape:
            raise UserError(
                f"no Inception of FID: {theirs!r} has the shape {list(value.shape)}, expected "
                f"{list(shape)}"
            )
        found[name] = np.ascontiguousarray(value)
    return found


def load_inception(path: Path) -> Params:
    """Read the weights out of torch's file (needs torch), or out of what `save_inception` made.

    Raises:
      UserError: the file is missing, damaged, or holds something else.
    """
    if path.suffix != ".safetensors":
        return unflatten_dict(from_torch(read_state(path)), sep="/")
    with open_safetensors(path) as tensors:
        shapes = _shapes()
        if tensors.shapes != shapes:
            odd = sorted(set(tensors.shapes.items()) ^ set(shapes.items()))[0][0]
            raise UserError(f"{path} holds no Inception of FID: {odd!r} is not as expected")
        return unflatten_dict(dict(tensors), sep="/")


def save_inception(params: Params, path: Path) -> None:
    """Write the weights as safetensors, which torch is not needed to read."""
    from safetensors.numpy import save_file

    from instella_jax.runtime.files import replacing

    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    with replacing(path) as scratch:
        save_file(flat, scratch)
        scratch.chmod(0o644)  # safetensors makes private files
