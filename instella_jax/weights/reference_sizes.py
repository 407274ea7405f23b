"""The reference's sizes, by its own names or as its tensors' shapes tell them, -> ours."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from instella_jax.errors import UserError
from instella_jax.models.olmo import OlmoConfig
from instella_jax.models.tokenizer_config import TokenizerConfig

Shapes = Mapping[str, tuple[int, ...]]


def tokenizer_sizes(bae: Mapping[str, Any], scale: int | None = 1024) -> TokenizerConfig:
    """Read the reference's names of the tokenizer's sizes.

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
    """Read the reference's names of a generator's sizes: arguments of both generators here."""
    return {
        "num_layers": generator["num_layers"],
        "num_heads": generator["num_attention_heads"],
        "head_dim": generator["attention_head_dim"],
        "num_tokens": bae["num_latent_tkns"],
        "bits": bae["codebook_size"],
        "text_width": generator["text_cond_dim"],
    }


def olmo_config(text: Mapping[str, Any]) -> OlmoConfig:
    """Read an OLMo's `config.json`.

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
        clip_qkv=None if not text.get("clip_qkv") else float(text["clip_qkv"]),
    )
    if config.hidden_size % (2 * heads) or heads % config.num_key_value_heads:
        raise UserError(
            f"text encoder: {heads} heads of {config.hidden_size} with "
            f"{config.num_key_value_heads} key and value heads do not divide evenly"
        )
    return config


# What shapes do not tell, as published.
TOKENIZER_DEFAULTS = {
    "axes_dims_rope": [8, 28, 28],
    "downsample_idx": [7],
    "upsample_idx": [7],
    "theta": 10_000.0,
}
_SIDE = {
    r"{side}\.transformer_blocks\.\d+\.input_layernorm\.weight": ("{side}_width",),
    r"{side}\.transformer_blocks\.\d+\.attn\.norm_[qk]\.weight": ("{side}_head_dim",),
}
# The axes of tensors that tell sizes: a tensor of a wrong shape is outvoted by the others.
_TOKENIZER_AXES = {
    r"encoder\.latent_tokens": (None, "num_latent_tkns", "encoder_width"),
    r"encoder\.patch_embedder\.weight": ("encoder_width", None, "patch_size", "patch_size"),
    r"quantizer\.proj\.0\.weight": ("codebook_size", "encoder_width"),
    r"quantizer\.proj\.0\.bias": ("codebook_size",),
    r"quantizer\.embed": ("codebook_size", "encoder_width"),
    **{
        pattern.replace("{side}", side): tuple(axis.replace("{side}", side) for axis in axes)
        for side in ("encoder", "decoder")
        for pattern, axes in _SIDE.items()
    },
}
_GENERATOR_AXES = {
    r"x_embedder\.weight": ("width", "codebook_size"),
    r"proj_out\.weight": ("codebook_size", "width"),
    r"proj_out\.bias": ("codebook_size",),
    r"transformer_blocks\.\d+\.pos_emb": (None, "positions", "width"),
    r"transformer_blocks\.\d+\.proj_cond\.weight": ("width", "text_cond_dim"),
    r"transformer_blocks\.\d+\.attn\.norm_[qk]\.weight": ("attention_head_dim",),
}


def _vote(
    shapes: Shapes,
    axes: Mapping[str, tuple[str | None, ...]],
    expected: Mapping[str, Any],
    what: str,
) -> dict[str, int]:
    """Return the size that most tensors give each axis; what is expected counts as one that comes
    first.

    Raises:
      UserError: no tensor tells a size.
    """
    votes: dict[str, Counter[int]] = {}
    for name, shape in shapes.items():
        for pattern, names in axes.items():
            if len(shape) == len(names) and re.fullmatch(pattern, name):
                for axis, size in zip(names, shape, strict=True):
                    if axis is not None:
                        first = [expected[axis]] if type(expected.get(axis)) is int else []
                        votes.setdefault(axis, Counter(first))[size] += 1
    for pattern, names in axes.items():
        for axis in filter(None, names):
            if not votes.get(axis) or not votes[axis].most_common(1)[0][0]:
                example = re.sub(r"\\d\+|\[qk\]", lambda m: "0" if "d" in m[0] else "q", pattern)
                example = example.replace("\\", "")
                raise UserError(f"{what}: tensor {example!r} is missing or has no usable shape")
    return {axis: counter.most_common(1)[0][0] for axis, counter in votes.items()}


def _count(shapes: Shapes, prefix: str) -> int:
    """Return how many tensors' numbers there are after a prefix, counted from 0 without a gap."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    numbers = {int(found[1]) for name in shapes if (found := pattern.match(name))}
    return next(i for i in range(len(numbers) + 1) if i not in numbers)


def _heads(width: int, head_dim: int, what: str) -> int:
    if width % head_dim:
        raise UserError(f"{what}: heads of {head_dim} do not divide the width {width}")
    return width // head_dim


def _settle(
    measured: Mapping[str, Any], given: Any, defaults: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """Combine measured sizes with given ones; they may not contradict each other."""
    if not isinstance(given, Mapping):
        raise UserError(f"{what}: the sizes given are {given!r}, expected an object")
    known = {**defaults, **measured}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{what}: unknown size {key!r}: expected {sorted(known)}")
        if key in measured and value != measured[key]:
            raise UserError(
                f"{what}: the sizes given have {key}={value!r}, its tensors {measured[key]!r}"
            )
    return {**known, **given}


def measure_tokenizer(shapes: Shapes, given: Any, what: str) -> TokenizerConfig:
    """Work out a tokenizer's sizes from the shapes of its published tensors.

    Args:
      shapes: shapes by the reference's names.
      given: what shapes do not tell, by the reference's names ("axes_dims_rope", "downsample_idx",
        "upsample_idx", "theta", "bae_scale"); published values where absent. May repeat the rest.
      what: the file's name, for messages.

    Raises:
      UserError: sizes are not told, contradict each other, or do not fit.
    """
    votes = _vote(shapes, _TOKENIZER_AXES, given if isinstance(given, Mapping) else {}, what)
    measured: dict[str, Any] = {
        "in_channels": 3,
        "patch_size": votes["patch_size"],
        "num_latent_tkns": votes["num_latent_tkns"],
        "codebook_size": votes["codebook_size"],
    }
    for side in ("encoder", "decoder"):
        head_dim = votes[f"{side}_head_dim"]
        measured[f"{side}_layers"] = _count(shapes, f"{side}.transformer_blocks")
        measured[f"{side}_head_dim"] = head_dim
        measured[f"{side}_num_heads"] = _heads(votes[f"{side}_width"], head_dim, what)
    defaults = {**TOKENIZER_DEFAULTS, "bae_scale": 1024}
    bae = _settle(measured, given, defaults, what)
    for key in ("axes_dims_rope", "downsample_idx", "upsample_idx"):
        if not isinstance(bae[key], list) or not all(type(x) is int and x >= 0 for x in bae[key]):
            raise UserError(f"{what}: {key} is {bae[key]!r}, expected a list of whole numbers")
    axes, head_dims = bae["axes_dims_rope"], {bae["encoder_head_dim"], bae["decoder_head_dim"]}
    if len(axes) != 3 or {sum(axes)} != head_dims or any(axis % 2 for axis in axes):
        raise UserError(
            f"{what}: the RoPE axes {axes} are not three even numbers that add up to the head "
            f"widths {sorted(head_dims)}; give bae.axes_dims_rope with --sizes"
        )
    for side, way in (("encoder", "down"), ("decoder", "up")):
        levels, after = _count(shapes, f"{side}.{way}_layers"), bae[f"{way}sample_idx"]
        fits = len(set(after)) == levels and all(i < bae[f"{side}_layers"] for i in after)
        if not fits or len(after) != levels:
            raise UserError(
                f"{what}: {way}sample_idx is {after}, its tensors have {levels} {way}_layers and "
                f"{bae[f'{side}_layers']} {side} blocks; give bae.{way}sample_idx with --sizes"
            )
    scale = bae.pop("bae_scale")
    if scale is not None and (type(scale) is not int or scale < bae["patch_size"]):
        raise UserError(f"{what}: bae_scale is {scale!r}, expected null or a number of pixels")
    if not isinstance(bae["theta"], int | float) or not bae["theta"] > 0:
        raise UserError(f"{what}: theta is {bae['theta']!r}, expected a positive number")
    return tokenizer_sizes(bae, scale)


def measure_generator(
    shapes: Shapes, kind: str, given: Any, expected: Mapping[str, int], what: str
) -> dict[str, int]:
    """Work out a generator's sizes, arguments of both generators here, from its tensors' shapes.

    Args:
      shapes: shapes by the reference's names.
      kind: "diffusion" or "ar".
      given: the same sizes by the reference's names, checked against the shapes; may be empty.
      expected: what the tokenizer and the text encoder tell: "num_tokens", "bits", "text_width".
      what: the file's name, for messages.

    Raises:
      UserError: sizes are not told or contradict each other.
    """
    # The published autoregressive weights have a position for the split token too.
    more = int(kind == "ar")
    others = {
        "positions": expected["num_tokens"] + more,
        "codebook_size": expected["bits"],
        "text_cond_dim": expected["text_width"],
    }
    votes = _vote(shapes, _GENERATOR_AXES, others, what)
    head_dim = votes["attention_head_dim"]
    measured = {
        "num_layers": _count(shapes, "transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": _heads(votes["width"], head_dim, what),
        "text_cond_dim": votes["text_cond_dim"],
    }
    code = {
        "num_latent_tkns": votes["positions"] - more,
        "codebook_size": votes["codebook_size"],
    }
    return generator_sizes(_settle(measured, given, {}, what), code)


def measure_olmo(text: Mapping[str, Any], given: Any, what: str) -> OlmoConfig:
    """Read an OLMo's `config.json`, and sizes given beside it.

    Args:
      text: the file's values.
      given: values that the file lacks, or repeats.
      what: the file's name, for messages.

    Raises:
      UserError: a size is missing, is no whole number, or this is no OLMo that is known here.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{what}: the sizes given are {given!r}, expected an object")
    for key, value in given.items():
        if key in text and text[key] != value:
            raise UserError(
                f"{what}: the sizes given have {key}={value!r}, this file {text[key]!r}"
            )
    values = {**text, **given}
    if values.get("model_type", "olmo") != "olmo":
        raise UserError(f"{what}: model_type is {values['model_type']!r}, expected 'olmo'")
    for key in _OLMO_SIZES:
        value = values.get(key)
        if type(value) is not int or not 1 <= value <= 10_000_000:
            raise UserError(f"{what}: {key} is {value!r}, expected a positive whole number")
    key_heads = values.get("num_key_value_heads")
    if key_heads is not None and (type(key_heads) is not int or key_heads < 1):
        raise UserError(f"{what}: num_key_value_heads is {key_heads!r}, expected a whole number")
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        if not isinstance(rope, Mapping) or (
            rope.get("rope_type", rope.get("type", "default")) != "default"
        ):
            raise UserError(f"{what}: {key} is {rope!r}, expected plain rotary positions")
    try:
        return olmo_config(values)
    except (TypeError, ValueError):
        raise UserError(f"{what}: rope_theta or clip_qkv is no number") from None


_OLMO_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
