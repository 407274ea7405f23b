"""Training of the binary tokenizer: reconstruction through bits, by the losses of the config.

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
from instella_jax.losses import code_terms
from instella_jax.losses.adversarial import discriminator_optimizer, fooling_loss, judging_loss
from instella_jax.losses.perceptual import load_lpips, lpips, window
from instella_jax.losses.pixel import pixel_loss
from instella_jax.losses.weighing import Term, from_start, ramp, weigh
from instella_jax.models.discriminator import Discriminator
from instella_jax.models.functional import Network, Params, apply
from instella_jax.models.pixels import psnr, to_float, to_uint8
from instella_jax.models.quantizers import drop_tail, keep_tokens, quantize
from instella_jax.models.tokenizer import TokenizerNetwork, hard_code
from instella_jax.models.vgg import MIN_SIDE, Lpips
from instella_jax.stages.base import Batch, Metrics
from instella_jax.weights.model_folder import execution, tokenizer_config

# Keep the keys of what is drawn beside the bits apart.
_WINDOW, _FOOL, _JUDGE, _TAIL = range(1, 5)
CODE_TERMS = {
    "code": code_terms.code_loss,
    "entropy": code_terms.entropy_loss,
    "balance": code_terms.balance_loss,
}


@functools.partial(jax.jit, static_argnames="network")
def reconstruct(
    network: TokenizerNetwork, params: Params, images: UInt8[Array, "B height width 3"]
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
        self.network = TokenizerNetwork(self.sizes, execution(config.run))
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
        sides = [side, *(s for shape in buckets.shapes(config) for s in shape)]
        if config.loss.perceptual.weight and min(sides) < MIN_SIDE:
            raise UserError(
                f"loss.perceptual needs pictures of {MIN_SIDE} pixels a side at least: set its "
                "weight to 0"
            )
        judge = config.loss.adversarial
        self.judge = Discriminator(judge.width, judge.halvings, self.network.run)

    @property
    def networks(self) -> dict[str, Network]:
        judge = {"discriminator": self.judge} if self.config.loss.adversarial.weight else {}
        return {"tokenizer": self.network, **judge}

    @property
    def critics(self) -> dict[str, optax.GradientTransformation]:
        adversarial = self.config.loss.adversarial
        if not adversarial.weight:
            return {}
        return {"discriminator": discriminator_optimizer(adversarial)}

    @property
    def frozen_networks(self) -> dict[str, Network]:
        return {"lpips": Lpips()} if self.config.loss.perceptual.weight else {}

    @property
    def text_folder(self) -> None:
        return None

    def frozen(self) -> Params:
        perceptual = self.config.loss.perceptual
        return {"lpips": load_lpips(perceptual.weights)} if perceptual.weight else {}

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
        """Return the sum of the losses that the config weighs, and each by its name.

        What the discriminator pays counts 0, with its gradient. With a frozen encoder the codes are
        those of evaluation.
        """
        losses, images = self.config.loss, to_float(batch["image"])
        logits = self._encode(params, images)
        if self.freeze_encoder:
            logits = jax.lax.stop_gradient(logits)
            code = hard_code(logits)
        else:
            code = quantize(losses.quantizer, logits, key, self.temperature(step))
        if losses.tail_drop:
            code = drop_tail(code, jax.random.fold_in(key, _TAIL), losses.tail_drop)
        decoded = self._decode(params, code, images)
        total, metrics = weigh(decoded, self._terms(params, frozen, images, key), step)
        for name, function in CODE_TERMS.items():
            section = losses[name]
            if section.weight or name == "code":
                value = from_start(section, step, function, logits)
                total += ramp(section, step) * value
                metrics[f"{name}_loss"] = value
        if losses.adversarial.weight:
            paid, judging = self._judging(params, images, decoded, key, step)
            total += paid - jax.lax.stop_gradient(paid)
            metrics |= judging
        return total, {**metrics, "psnr": psnr(decoded, images).mean()}

    def _terms(
        self,
        params: Params,
        frozen: Params,
        images: Float[Array, "B height width 3"],
        key: Key[Array, ""],
    ) -> dict[str, Term]:
        """Return the losses of a reconstruction of images that have a weight."""
        losses = self.config.loss
        terms = {"pixel": Term(losses.pixel, lambda x: pixel_loss(losses.pixel.kind, x, images))}
        if losses.perceptual.weight:
            side, place = losses.perceptual.window, jax.random.fold_in(key, _WINDOW)

            def perceptual(x: Float[Array, "B height width 3"]) -> Float[Array, ""]:
                parts = (window(y, side, place) for y in (x, images))
                return lpips(frozen["lpips"], *parts).mean()

            terms["perceptual"] = Term(losses.perceptual, perceptual)
        if (adversarial := losses.adversarial).weight:

            def fooling(x: Float[Array, "B height width 3"]) -> Float[Array, ""]:
                own = jax.random.fold_in(key, _FOOL)
                judge = params["discriminator"]
                return fooling_loss(self.judge, judge, x, own, adversarial.augment)

            terms["adversarial"] = Term(adversarial, fooling, balanced=adversarial.adaptive)
        return terms

    def _judging(
        self,
        params: Params,
        images: Float[Array, "B height width 3"],
        decoded: Float[Array, "B height width 3"],
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return what the discriminator pays from its start on, and its metrics."""
        adversarial, own = self.config.loss.adversarial, jax.random.fold_in(key, _JUDGE)

        def judging(judge: Params, decoded: Float[Array, "B height width 3"]) -> Any:
            return judging_loss(
                self.judge, judge, images, decoded, own, adversarial.augment, adversarial.lecam
            )

        inputs = params["discriminator"], jax.lax.stop_gradient(decoded)
        return from_start(adversarial, step, judging, *inputs)

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> Metrics:
        """Return distances through hard bits, and how evenly the bits are used.

        "loss" is that of `loss.pixel`, "psnr" in dB; with `loss.perceptual` there is "lpips", and
        with `loss.tail_drop` "psnr_half" and "psnr_quarter", of so many of the tokens.
        """
        del key
        losses, images = self.config.loss, to_float(batch["image"])
        code = hard_code(self._encode(params, images))
        decoded = jnp.clip(self._decode(params, code, images), -1.0, 1.0)
        metrics = {
            "loss": pixel_loss(losses.pixel.kind, decoded, images),
            "psnr": psnr(decoded, images).mean(),
            **code_terms.code_health(code),
        }
        if losses.perceptual.weight:
            metrics["lpips"] = lpips(frozen["lpips"], decoded, images).mean()
        if losses.tail_drop:
            for name, parts in (("half", 2), ("quarter", 4)):
                fewer = keep_tokens(code, max(1, code.shape[1] // parts))
                copies = jnp.clip(self._decode(params, fewer, images), -1.0, 1.0)
                metrics[f"psnr_{name}"] = psnr(copies, images).mean()
        return metrics

    def describe(self) -> dict[str, Any]:
        """Return sizes of the tokenizer, and at which picture sizes and how it was trained."""
        trained: dict[str, Any] = {}
        if self.config.data.buckets:
            trained["shapes"] = [list(shape) for shape in buckets.shapes(self.config)]
        if self.config.loss.tail_drop:
            trained["tail_drop"] = self.config.loss.tail_drop
        return {
            "tokenizer": dataclasses.asdict(self.sizes),
            "image_size": self.config.data.image_size,
            **trained,
        }
