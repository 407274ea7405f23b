"""Losses of the two players, the tokenizer and the discriminator.

Hinge (Lim and Ye, 2017), LeCam (Tseng et al., 2021) and DiffAug (Zhao et al., 2020).

Axes: B batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from instella_jax.config import Config
from instella_jax.models.functional import Params

# How fast the running means of the discriminator's answers follow them.
PACE = 0.01
# A hole of DiffAug, and how far it shifts, as shares of a side.
_HOLE, _SHIFT = 0.5, 0.125

Pictures = Float[Array, "B height width 3"]
# A discriminator: its parameters and images to logits of "this is a picture".
Judge = Callable[[Params, Pictures], Float[Array, "..."]]


def fooling_loss(
    judge: Judge, params: Params, fake: Pictures, key: Key[Array, ""], augment: bool
) -> Float[Array, ""]:
    """Return what the tokenizer pays: minus the mean answer to its reconstructions.

    Nothing of it reaches the discriminator's parameters.
    """
    params = jax.lax.stop_gradient(params)
    return -jnp.mean(judge(params, augmented(fake, key) if augment else fake))


def judging_loss(
    judge: Judge,
    params: Params,
    real: Pictures,
    fake: Pictures,
    key: Key[Array, ""],
    augment: bool,
    lecam: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return what the discriminator pays, and its metrics.

    The loss is hinge, mean(max(0, 1 - D(real))) + mean(max(0, 1 + D(fake))), plus `lecam` times
    the squares by which answers to pictures lie above the running mean of those to reconstructions,
    and these below that of pictures. The running means are the parameter "answers": the gradient
    that it gets is its distance from the new answers, so that plain gradient descent moves it there
    (see `discriminator_optimizer`).
    """
    to_real, to_fake = (
        judge(params, augmented(images, jax.random.fold_in(key, i)) if augment else images)
        for i, images in enumerate((real, jax.lax.stop_gradient(fake)))
    )
    hinge = jnp.mean(jax.nn.relu(1.0 - to_real)) + jnp.mean(jax.nn.relu(1.0 + to_fake))
    seen = params["answers"].astype(jnp.float32)
    mean_real, mean_fake = jax.lax.stop_gradient(seen)
    apart = jnp.mean(jnp.square(jax.nn.relu(to_real - mean_fake)))
    apart += jnp.mean(jnp.square(jax.nn.relu(mean_real - to_fake)))
    now = jax.lax.stop_gradient(jnp.stack([to_real.mean(), to_fake.mean()]))
    follow = 0.5 * jnp.sum(jnp.square(seen - now))
    total = hinge + lecam * apart + follow - jax.lax.stop_gradient(follow)
    return total, {
        "discriminator": hinge,
        "lecam": apart,
        "answers_real": now[0],
        "answers_fake": now[1],
    }


def discriminator_optimizer(config: Config) -> optax.GradientTransformation:
    """Return Adam for the discriminator, and plain steps for its running means.

    Args:
      config: the section `loss.adversarial`.
    """

    def kinds(params: Params) -> Params:
        def kind(path: tuple, leaf: object) -> str:
            del leaf
            return "means" if any(getattr(p, "key", None) == "answers" for p in path) else "weights"

        return jax.tree_util.tree_map_with_path(kind, params)

    adam = optax.adam(config.learning_rate, config.b1, config.b2)
    weights = optax.chain(optax.clip_by_global_norm(1.0), adam)
    rules: dict[Any, Any] = {"weights": weights, "means": optax.sgd(PACE)}
    return optax.partition(rules, kinds)


def augmented(images: Pictures, key: Key[Array, ""]) -> Pictures:
    """Change brightness, saturation and contrast, shift, and cut a hole, at random (DiffAug).

    Each image gets its own change, through which gradients pass.
    """
    return jax.vmap(_augment_one)(images, jax.random.split(key, len(images)))


def _augment_one(
    image: Float[Array, "height width 3"], key: Key[Array, ""]
) -> Float[Array, "height width 3"]:
    height, width, _ = image.shape
    sides = jnp.array([height, width])
    bright, saturate, contrast, place, hole = jax.random.split(key, 5)
    image = image + jax.random.uniform(bright, minval=-0.5, maxval=0.5)
    grey = image.mean(-1, keepdims=True)
    image = grey + (image - grey) * jax.random.uniform(saturate, minval=0.0, maxval=2.0)
    mean = image.mean()
    image = mean + (image - mean) * jax.random.uniform(contrast, minval=0.5, maxval=1.5)
    # What a shift leaves is black in the middle of the range, as is the hole.
    reach = jnp.round(sides * _SHIFT).astype(jnp.int32)
    shift = jax.random.randint(place, (2,), -reach, reach + 1)
    rows, columns = jnp.arange(height), jnp.arange(width)
    image = jnp.roll(image, shift, (0, 1))
    image = image * (
        ((rows >= shift[0]) & (rows < height + shift[0]))[:, None, None]
        & ((columns >= shift[1]) & (columns < width + shift[1]))[None, :, None]
    )
    size = jnp.round(sides * _HOLE).astype(jnp.int32)
    corner = jax.random.randint(hole, (2,), -(size // 2), sides - size // 2)
    inside = ((rows >= corner[0]) & (rows < corner[0] + size[0]))[:, None] & (
        (columns >= corner[1]) & (columns < corner[1] + size[1])
    )[None, :]
    return image * (1.0 - inside[..., None])
