"""The names of the published checkpoints' tensors, and which of our parameters each one is.

A reference state dict has one tensor per block; here blocks are stacked along a leading layers
axis.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import Network
from instella_jax.models.olmo import Olmo, OlmoConfig
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.models.tokenizer_config import TokenizerConfig


def _from_patch_convolution(x: np.ndarray) -> np.ndarray:
    """Return [D, 3, P, P] -> [P * P * 3, D]: a patch is laid out (row, column, channel)."""
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _to_patch_convolution(x: np.ndarray) -> np.ndarray:
    """Return [P * P * 3, D] -> [D, 3, P, P]."""
    side = math.isqrt(x.shape[0] // 3)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


# How a reference tensor is turned into ours, and back.
FORMS: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    "patch": (_from_patch_convolution, _to_patch_convolution),
    "lead1": (lambda x: x.reshape(x.shape[1:]), lambda x: x[None]),
    "lead2": (lambda x: x.reshape(x.shape[2:]), lambda x: x[None, None]),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One reference tensor.

    Attributes:
      name: its name in the state dict.
      path: our parameter, "encoder/out/kernel".
      form: how it is turned, a key of `FORMS`.
      layer: its place on our parameter's layers axis, None where there is none.
    """

    name: str
    path: str
    form: str = "same"
    layer: int | None = None


def _linear(name: str, path: str, layer: int | None = None, *, bias: bool) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", f"{path}/kernel", "linear", layer)
    if bias:
        yield Entry(f"{name}.bias", f"{path}/bias", "same", layer)


def _conv(name: str, path: str, form: str = "conv") -> Iterator[Entry]:
    yield Entry(f"{name}.weight", f"{path}/kernel", form)
    yield Entry(f"{name}.bias", f"{path}/bias")


def _attention(name: str, path: str, layer: int, *, norms: bool = True) -> Iterator[Entry]:
    for part in "qkvo":
        yield from _linear(f"{name}.{part}_proj", f"{path}/{part}", layer, bias=False)
    if norms:
        yield Entry(f"{name}.norm_q.weight", f"{path}/q_norm/scale", layer=layer)
        yield Entry(f"{name}.norm_k.weight", f"{path}/k_norm/scale", layer=layer)


def _swiglu(name: str, path: str, layer: int) -> Iterator[Entry]:
    for part in ("gate", "up", "down"):
        yield from _linear(f"{name}.{part}_proj", f"{path}/{part}", layer, bias=False)


def _gelu_mlp(name: str, path: str, layer: int) -> Iterator[Entry]:
    yield from _linear(f"{name}.net.0.proj", f"{path}/up", layer, bias=True)
    yield from _linear(f"{name}.net.2", f"{path}/down", layer, bias=True)


def _norms(name: str, path: str, layer: int) -> Iterator[Entry]:
    yield Entry(f"{name}.input_layernorm.weight", f"{path}/attention_norm/scale", layer=layer)
    yield Entry(f"{name}.post_attention_layernorm.weight", f"{path}/mlp_norm/scale", layer=layer)


def _trunk(
    side: str, num_layers: int, resample_after: tuple[int, ...], resample: str
) -> Iterator[Entry]:
    """Return blocks of the encoder or decoder: ours restart their numbering at each change of
    grid."""
    changes = sorted(resample_after)
    for number in range(len(changes)):
        conv = f"{side}/trunk/resample_{number}/conv"
        yield from _conv(f"{side}.{resample}_layers.{number}.conv", conv)
    for index in range(num_layers):
        segment = sum(index > change for change in changes)
        layer = index - (changes[segment - 1] + 1 if segment else 0)
        name, path = f"{side}.transformer_blocks.{index}", f"{side}/trunk/blocks_{segment}"
        yield from _norms(name, path, layer)
        yield from _attention(f"{name}.attn", f"{path}/attention", layer)
        yield from _swiglu(f"{name}.mlp", f"{path}/mlp", layer)


def _tokenizer(config: TokenizerConfig) -> Iterator[Entry]:
    yield from _conv("encoder.patch_embedder", "encoder/patch_embed", "patch")
    yield Entry("encoder.latent_tokens", "encoder/latent_tokens", "lead1")
    yield from _trunk("encoder", config.encoder_layers, config.downsample_after, "down")
    yield Entry("encoder.norm_out.weight", "encoder/out_norm/scale")
    yield from _linear("encoder.proj_out", "encoder/out", bias=True)
    yield from _linear("quantizer.proj.0", "to_bits", bias=True)
    yield Entry("quantizer.embed", "embed")
    yield Entry("decoder.input_layer.0.weight", "decoder/in_norm/scale")
    yield from _linear("decoder.input_layer.1", "decoder/in", bias=True)
    yield Entry("decoder.mask_tokens", "decoder/mask_token", "lead2")
    yield from _trunk("decoder", config.decoder_layers, config.upsample_after, "up")
    yield Entry("decoder.norm_out.weight", "decoder/out_norm/scale")
    yield from _linear("to_pixel", "decoder/pixels", bias=True)


def _generator_block(index: int) -> Iterator[Entry]:
    name = f"transformer_blocks.{index}"
    yield Entry(f"{name}.pos_emb", "blocks/pos_emb", "lead1", index)
    yield from _linear(f"{name}.proj_cond", "blocks/attention/text", index, bias=True)
    yield from _attention(f"{name}.attn", "blocks/attention", index)


def _diffusion(network: DiffusionTransformer) -> Iterator[Entry]:
    yield from _linear("x_embedder", "bits_in", bias=True)
    yield from _linear("time_embed.linear_1", "time_in", bias=True)
    yield from _linear("time_embed.linear_2", "time_out", bias=True)
    for index in range(network.num_layers):
        name = f"transformer_blocks.{index}"
        yield from _generator_block(index)
        yield from _linear(f"{name}.norm1.linear", "blocks/modulation", index, bias=True)
        yield from _gelu_mlp(f"{name}.ff", "blocks/mlp", index)
    yield from _linear("norm_out.linear", "modulation", bias=True)
    yield from _linear("proj_out", "bits_out", bias=True)


def _ar(network: ArTransformer) -> Iterator[Entry]:
    yield from _linear("x_embedder", "bits_in", bias=True)
    yield Entry("split_token", "split_token", "lead2")
    for index in range(network.num_layers):
        name = f"transformer_blocks.{index}"
        yield from _generator_block(index)
        yield from _norms(name, "blocks", index)
        yield from _gelu_mlp(f"{name}.mlp", "blocks/mlp", index)
    yield Entry("norm_out.weight", "out_norm/scale")
    yield from _linear("proj_out", "bits_out", bias=True)


def _olmo(config: OlmoConfig) -> Iterator[Entry]:
    yield Entry("model.embed_tokens.weight", "embed")
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}"
        yield from _attention(f"{name}.self_attn", "blocks", index, norms=False)
        yield from _swiglu(f"{name}.mlp", "blocks/mlp", index)


def entries(network: Network) -> list[Entry]:
    """List the reference tensors that make up the parameters of a network."""
    if isinstance(network, TokenizerNetwork):
        return list(_tokenizer(network.config))
    if isinstance(network, DiffusionTransformer):
        return list(_diffusion(network))
    if isinstance(network, ArTransformer):
        return list(_ar(network))
    if isinstance(network, Olmo):
        return list(_olmo(network.config))
    raise TypeError(f"the reference has no {type(network).__name__}")


def unused_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Return shapes of the tensors that the reference carries and never uses: `time_embed` of the
    AR."""
    if not isinstance(network, ArTransformer):
        return {}
    width = network.num_heads * network.head_dim
    return {
        "time_embed.linear_1.weight": (width, 1),
        "time_embed.linear_1.bias": (width,),
        "time_embed.linear_2.weight": (width, width),
        "time_embed.linear_2.bias": (width,),
    }


def copies(network: Network) -> dict[str, str]:
    """Return names of tensors that repeat another one, and its name: OLMo's tied head."""
    if isinstance(network, Olmo):
        return {"lm_head.weight": "model.embed_tokens.weight"}
    return {}
