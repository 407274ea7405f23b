"""Training of the binary tokenizer: smooth-L1 reconstruction through sampled bits.

Axes: B batch, N latent tokens, K bits.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from instella_jax.config import Config
from instella_jax.data import buckets
from instella_jax.data.sources import make_split
from instella_jax.errors import UserError
from instella_jax.models.functional import Network, Params, apply
from instella_jax.models.pixels import psnr, to_float, to_uint8
from instella_jax.models.tokenizer import BinaryTokenizer, code_loss, hard_code, sample_code
from instella_jax.stages.base import Batch, Metrics
from instella_jax.weights.model_folder import execution, tokenizer_config


@functools.partial(jax.jit, static_argnames="network")
def reconstruct(
    network: BinaryTokenizer, params: Params, images: UInt8[Array, "B height width 3"]
) -> tuple[UInt8[Array, "B height width 3"], Float[Array, " B"]]:
    """Return pictures sent through their codes, and their PSNR in dB."""
    x = to_float(images)
    decoded = apply(network, params, x).astype(jnp.float32)
    return to_uint8(decoded), psnr(jnp.clip(decoded, -1.0, 1.0), x)


class TokenizerStage:
    """The tokenizer alone; see `stages.Stage`."""

    def __init__(self, config: Config):
        """Build the network.

        Args:
          config: a config whose stage is "tokenizer".

        Raises:
          UserError: sizes do not fit each other, or what is frozen would not be worth it.
        """
        self.config = config
        self.sizes = tokenizer_config(config.model)
        self.network = BinaryTokenizer(self.sizes, execution(config.run))
        side = config.data.image_size
        for height, width in {(side, side), *buckets.shapes(config)}:
            self.sizes.grid(height, width)
        self.freeze_encoder = config.loss.freeze_encoder
        if self.freeze_encoder and not config.init_from:
            raise UserError(
                "loss.freeze_encoder trains the decoder of a tokenizer that there is: give its "
                "model folder as --config.init_from=FOLDER"
            )
        if self.freeze_encoder and config.optimizer.weight_decay:
            raise UserError(
                f"optimizer.weight_decay is {config.optimizer.weight_decay}: it would change the "
                "encoder that loss.freeze_encoder freezes, so set it to 0"
            )

    @property
    def networks(self) -> dict[str, Network]:
        return {"tokenizer": self.network}

    @property
    def frozen_networks(self) -> dict[str, Network]:
        return {}

    @property
    def text_folder(self) -> None:
        return None

    def frozen(self) -> Params:
        return {}

    def loader(self, split: str, **options: Any) -> Any:
        """Return batches with "image"."""
        return make_split(self.config.data, split, captions=False, **options)

    def temperature(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Return the temperature of the bits: linear from `start` to `end`, then constant."""
        t = self.config.loss.temperature
        return jnp.float32(optax.linear_schedule(t.start, t.end, t.steps)(step))

    def _decode(
        self,
        params: Params,
        code: Float[Array, "B N K"],
        like: Float[Array, "B height width 3"],
    ) -> Float[Array, "B height width 3"]:
        size = like.shape[1:3]
        decoded = apply(self.network, params["tokenizer"], code, *size, method="decode")
        return decoded.astype(jnp.float32)

    def _encode(
        self, params: Params, images: Float[Array, "B height width 3"]
    ) -> Float[Array, "B N K"]:
        logits = apply(self.network, params["tokenizer"], images, method="encode")
        return logits.astype(jnp.float32)

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return smooth-L1 (beta 1) plus the weighted code loss.

        With a frozen encoder the codes are those of evaluation.
        """
        del frozen
        images = to_float(batch["image"])
        logits = self._encode(params, images)
        if self.freeze_encoder:
            logits = jax.lax.stop_gradient(logits)
            code = hard_code(logits)
        else:
            code = sample_code(logits, key, self.temperature(step))
        decoded = self._decode(params, code, images)
        pixel = jnp.mean(optax.huber_loss(decoded, images, delta=1.0))
        certainty = code_loss(logits)
        total = pixel + self.config.loss.code_weight * certainty
        return total, {
            "pixel": pixel,
            "code_loss": certainty,
            "psnr": psnr(decoded, images).mean(),
        }

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> Metrics:
        """Return PSNR in dB and smooth-L1 through hard bits, and how evenly the bits are used."""
        del frozen, key
        images = to_float(batch["image"])
        code = hard_code(self._encode(params, images))
        decoded = jnp.clip(self._decode(params, code, images), -1.0, 1.0)
        return {
            "loss": jnp.mean(optax.huber_loss(decoded, images, delta=1.0)),
            "psnr": psnr(decoded, images).mean(),
            "bits_on": code.mean(),
        }

    def describe(self) -> dict[str, Any]:
        """Return sizes of the tokenizer and the picture size it was trained at."""
        return {
            "tokenizer": dataclasses.asdict(self.sizes),
            "image_size": self.config.data.image_size,
        }
