"""Training of the binary tokenizer: reconstruction through bits, by the losses of the config.

Axes: B batch, N latent tokens, K bits.
"""

import dataclasses
import functools
from pathlib import Path
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
from instella_jax.losses.adversarial import (
    Judge,
    discriminator_optimizer,
    fooling_loss,
    judging_loss,
)
from instella_jax.losses.perceptual import load_lpips, lpips, window
from instella_jax.losses.pixel import pixel_loss
from instella_jax.losses.vision import (
    Grid,
    block_features,
    cosine_distance,
    feature_distance,
    patch_features,
)
from instella_jax.losses.weighing import Term, from_start, weigh, weigh_at
from instella_jax.models.discriminator import Discriminator
from instella_jax.models.functional import Network, Params, apply
from instella_jax.models.pixels import psnr, to_float, to_uint8
from instella_jax.models.quantizers import drop_tail, hard_code, keep_tokens, quantize
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.models.trunk import STATES
from instella_jax.models.vgg import MIN_SIDE, Lpips
from instella_jax.models.vision_heads import AlignmentHead, FeatureDiscriminator
from instella_jax.models.vision_transformer import VisionTransformer
from instella_jax.stages.base import Batch, Metrics
from instella_jax.stages.vision import vision_network
from instella_jax.weights.model_folder import execution, tokenizer_config, with_axes
from instella_jax.weights.vision_folder import load_vision

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
        run = execution(config.run)
        alignment = config.loss.alignment
        if alignment.weight and alignment.block >= self.sizes.decoder_layers:
            raise UserError(
                f"loss.alignment.block is {alignment.block}: expected 0 to "
                f"{self.sizes.decoder_layers - 1}, one of the decoder's blocks"
            )
        tapped = alignment.block if alignment.weight else None
        self.network = TokenizerNetwork(self.sizes, run, tapped)
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
        self.vision = vision_network(config.loss, run)

    @property
    def judge(self) -> Discriminator | FeatureDiscriminator:
        """The discriminator."""
        a, run = self.config.loss.adversarial, self.network.run
        if a.kind == "features" and self.vision is not None:
            width = self.vision.config.hidden_size
            return FeatureDiscriminator(width, a.heads, a.width, run)
        return Discriminator(a.width, a.halvings, run)

    @property
    def networks(self) -> dict[str, Network]:
        networks: dict[str, Network] = {"tokenizer": self.network}
        if self.config.loss.adversarial.weight:
            networks["discriminator"] = self.judge
        if self.config.loss.alignment.weight and self.vision is not None:
            width = self.vision.config.hidden_size
            head = AlignmentHead(self.sizes.decoder_width, width, self.network.run)
            networks["alignment"] = head
        return networks

    @property
    def critics(self) -> dict[str, optax.GradientTransformation]:
        critics, losses = {}, self.config.loss
        if losses.adversarial.weight:
            critics["discriminator"] = discriminator_optimizer(losses.adversarial)
        if losses.alignment.weight:
            critics["alignment"] = optax.adam(losses.alignment.learning_rate)
        return critics

    @property
    def frozen_networks(self) -> dict[str, Network]:
        networks: dict[str, Network] = {}
        if self.config.loss.perceptual.weight:
            networks["lpips"] = Lpips()
        if self.vision is not None:
            networks["vision"] = self.vision
        return networks

    @property
    def text_folder(self) -> None:
        return None

    def frozen(self) -> Params:
        losses, frozen = self.config.loss, {}
        if losses.perceptual.weight:
            frozen["lpips"] = load_lpips(losses.perceptual.weights)
        if self.vision is not None:
            params = load_vision(Path(losses.vision), self.vision)
            frozen["vision"] = with_axes(self.vision, params)
        return frozen

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

    def _decode_and_tap(
        self,
        params: Params,
        code: Float[Array, "B N K"],
        like: Float[Array, "B height width 3"],
    ) -> tuple[Float[Array, "B height width 3"], Float[Array, "B h w D"]]:
        """Return images, and the states of the decoder that are aligned."""
        result: Any = self.network.apply(
            {"params": params["tokenizer"]}, code, *like.shape[1:3], method="decode",
            mutable=[STATES],
        )  # fmt: skip
        decoded, sown = result
        (states,) = sown[STATES]["decoder"]["trunk"]["tapped"]
        return decoded.astype(jnp.float32), states

    def _grid(self, images: Float[Array, "B height width 3"]) -> Grid:
        """Return the rows and columns of the tokenizer's patches."""
        side = self.sizes.patch_size
        return images.shape[1] // side, images.shape[2] // side

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
        states = None
        if losses.alignment.weight:
            decoded, states = self._decode_and_tap(params, code, images)
        else:
            decoded = self._decode(params, code, images)
        total, metrics = weigh(decoded, self._terms(params, frozen, images, key), step)
        if states is not None:

            def aligning(states: Float[Array, "B h w D"], head: Params) -> Float[Array, ""]:
                _, rows, columns, _ = states.shape
                looks = patch_features(self._looks(), frozen["vision"], images, (rows, columns))
                return cosine_distance(apply(self.networks["alignment"], head, states), looks)

            paid, metrics["alignment"], metrics["pull_alignment"] = weigh_at(
                (states, params["alignment"]), losses.alignment, aligning, step
            )
            total += paid
        for name, function in CODE_TERMS.items():
            section = losses[name]
            if section.weight:
                paid, metrics[f"{name}_loss"], metrics[f"pull_{name}"] = weigh_at(
                    (logits,), section, function, step
                )
                total += paid
            elif name == "code":
                metrics["code_loss"] = function(logits)
        if losses.adversarial.weight:
            paid, judging = self._judging(params, frozen, images, decoded, key, step)
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
        if losses.features.weight:

            def features(x: Float[Array, "B height width 3"]) -> Float[Array, ""]:
                return feature_distance(self._looks(), frozen["vision"], x, images, self._grid(x))

            terms["features"] = Term(losses.features, features)
        if (adversarial := losses.adversarial).weight:

            def fooling(x: Float[Array, "B height width 3"]) -> Float[Array, ""]:
                own = jax.random.fold_in(key, _FOOL)
                judge = params["discriminator"]
                return fooling_loss(self._judge(frozen), judge, x, own, adversarial.augment)

            terms["adversarial"] = Term(adversarial, fooling, balanced=adversarial.adaptive)
        return terms

    def _looks(self) -> VisionTransformer:
        assert self.vision is not None
        return self.vision

    def _judge(self, frozen: Params) -> Judge:
        """Return the discriminator as a function."""
        if self.vision is None or self.config.loss.adversarial.kind != "features":
            return functools.partial(apply, self.judge)

        def judge(params: Params, images: Float[Array, "B height width 3"]) -> Array:
            count, grid = self.config.loss.adversarial.heads, self._grid(images)
            states = block_features(self._looks(), frozen["vision"], images, grid, count)
            return apply(self.judge, params, states)

        return judge

    def _judging(
        self,
        params: Params,
        frozen: Params,
        images: Float[Array, "B height width 3"],
        decoded: Float[Array, "B height width 3"],
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return what the discriminator pays from its start on, and its metrics."""
        adversarial, own = self.config.loss.adversarial, jax.random.fold_in(key, _JUDGE)

        def judging(judge: Params, decoded: Float[Array, "B height width 3"]) -> Any:
            return judging_loss(
                self._judge(frozen),
                judge,
                images,
                decoded,
                own,
                adversarial.augment,
                adversarial.lecam,
            )

        inputs = params["discriminator"], jax.lax.stop_gradient(decoded)
        return from_start(adversarial, step, judging, *inputs)

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> Metrics:
        """Return distances through hard bits, and how evenly the bits are used.

        "loss" is that of `loss.pixel`, "psnr" in dB; with `loss.perceptual` there is "lpips", with
        `loss.features` "features", the distance in these, and with `loss.tail_drop` "psnr_half" and
        "psnr_quarter", of so many of the tokens.
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
        if losses.features.weight:
            metrics["features"] = feature_distance(
                self._looks(), frozen["vision"], decoded, images, self._grid(images)
            )
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
