"""The reference's names of sizes, as in its configurations, -> ours."""

from collections.abc import Mapping
from typing import Any

from instella_jax.errors import UserError
from instella_jax.models.olmo import OlmoConfig
from instella_jax.models.tokenizer import TokenizerConfig


def tokenizer_config(bae: Mapping[str, Any], scale: int | None = 1024) -> TokenizerConfig:
    """Reads the reference's names of the tokenizer's sizes.

    Args:
      bae: `num_latent_tkns`, `codebook_size`, ... as in the reference's configuration.
      scale: the resolution scale, which is not part of it; None turns it off.
    """
    return TokenizerConfig(
        patch_size=bae["patch_size"],
        num_tokens=bae["num_latent_tkns"],
        bits=bae["codebook_size"],
        encoder_layers=bae["encoder_layers"],
        encoder_heads=bae["encoder_num_heads"],
        encoder_head_dim=bae["encoder_head_dim"],
        decoder_layers=bae["decoder_layers"],
        decoder_heads=bae["decoder_num_heads"],
        decoder_head_dim=bae["decoder_head_dim"],
        rope_axes=tuple(bae["axes_dims_rope"]),
        rope_theta=bae.get("theta", 10_000.0),
        downsample_after=tuple(bae["downsample_idx"]),
        upsample_after=tuple(bae["upsample_idx"]),
        scale=scale,
    )


def generator_sizes(generator: Mapping[str, Any], bae: Mapping[str, Any]) -> dict[str, int]:
    """Reads the reference's names of a generator's sizes: arguments of both generators here."""
    return {
        "num_layers": generator["num_layers"],
        "num_heads": generator["num_attention_heads"],
        "head_dim": generator["attention_head_dim"],
        "num_tokens": bae["num_latent_tkns"],
        "bits": bae["codebook_size"],
        "text_width": generator["text_cond_dim"],
    }


def olmo_config(text: Mapping[str, Any]) -> OlmoConfig:
    """Reads an OLMo's `config.json`.

    Raises:
      UserError: the heads do not divide what they share.
    """
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    heads = text["num_attention_heads"]
    config = OlmoConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        rope_theta=float(text.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        clip_qkv=text.get("clip_qkv"),
    )
    if config.hidden_size % (2 * heads) or heads % config.num_key_value_heads:
        raise UserError(
            f"text encoder: {heads} heads of {config.hidden_size} with "
            f"{config.num_key_value_heads} key and value heads do not divide evenly"
        )
    return config
