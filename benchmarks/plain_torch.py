"""The networks and samplers of docs/model.md in plain PyTorch, to be timed beside ours.

Weights `w` are dictionaries of tensors with the published names. Attention is PyTorch's own
`scaled_dot_product_attention`; nothing is compiled or fused by hand. As in the published system the
text's keys and values are made in every step, and each token recomputes its whole prefix.

Axes: B batch, N latent tokens, K bits, T sequence, L text length, H heads, D width; images are
[B, 3, height, width].
"""

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F

from instella_jax.models.tokenizer_config import TokenizerConfig

Weights = dict[str, torch.Tensor]
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Generator:
    """Sizes of a generator."""

    num_layers: int
    num_heads: int
    head_dim: int
    num_tokens: int
    bits: int


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Apply a dense layer."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def rms(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Norm the last axis by its root mean square, with a scale."""
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], EPSILON)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    """Norm the last axis without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def heads(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return [B, H, T, dim] of [B, T, D]."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return softmax attention of [B, H, T, dim], the heads side by side."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


@functools.cache
def rotary(
    config: TokenizerConfig, rows: int, columns: int, scale: int | None, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the positions of [latent tokens ; image patches]."""

    def axis(count: int) -> torch.Tensor:
        index = torch.arange(count, dtype=torch.float32)
        return index if scale is None else index / max(count - 1, 1) * (scale - 1)

    ids = torch.zeros(config.num_tokens + rows * columns, 3)
    ids[: config.num_tokens, 0] = torch.arange(config.num_tokens)
    grid = torch.meshgrid(axis(rows), axis(columns), indexing="ij")
    ids[config.num_tokens :, 1:] = torch.stack(grid, -1).flatten(0, 1)
    angles = [
        ids[:, a, None].double() * config.rope_theta ** (-torch.arange(0, d, 2).double() / d)
        for a, d in enumerate(config.rope_axes)
    ]
    angle = torch.cat([x.repeat_interleave(2, -1) for x in angles], -1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions by halves."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def trunk(
    w: Weights, config: TokenizerConfig, side: str, latent: torch.Tensor, image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the blocks of the encoder or decoder on latent [B, N, D] and image [B, D, h, w]."""
    down = side == "encoder"
    changes = config.downsample_after if down else config.upsample_after
    layers = config.encoder_layers if down else config.decoder_layers
    dim = config.encoder_head_dim if down else config.decoder_head_dim
    scale = None if config.scale is None else config.scale // config.patch_size
    if scale is not None and not down:
        scale //= 2 * len(changes) or 1
    tokens = latent.shape[1]
    for i in range(layers):
        name, (rows, columns) = f"{side}.transformer_blocks.{i}", image.shape[2:]
        turn = rotary(config, rows, columns, scale, str(image.device))
        x = torch.cat([latent, image.flatten(2).transpose(1, 2)], 1)
        h = rms(w, f"{name}.input_layernorm", x)
        q, k, v = (heads(linear(w, f"{name}.attn.{p}_proj", h), dim) for p in "qkv")
        q = rotate(rms(w, f"{name}.attn.norm_q", q), *turn)
        k = rotate(rms(w, f"{name}.attn.norm_k", k), *turn)
        x = x + linear(w, f"{name}.attn.o_proj", attend(q, k, v))
        h = rms(w, f"{name}.post_attention_layernorm", x)
        gated = F.silu(linear(w, f"{name}.mlp.gate_proj", h)) * linear(w, f"{name}.mlp.up_proj", h)
        x = x + linear(w, f"{name}.mlp.down_proj", gated)
        latent, image = x[:, :tokens], x[:, tokens:].transpose(1, 2).unflatten(2, (rows, columns))
        if i not in changes:
            continue
        layer = f"{side}.{'down' if down else 'up'}_layers.{changes.index(i)}.conv"
        kernel, bias = w[f"{layer}.weight"], w[f"{layer}.bias"]
        if down:
            image = F.conv2d(image, kernel, bias, 2, 1) + F.avg_pool2d(image, 2)
        else:
            larger = F.pixel_shuffle(F.conv2d(image, kernel, bias, 1, 1), 2)
            image = larger + F.interpolate(image, scale_factor=2.0)
        if scale is not None:
            scale = scale // 2 if down else scale * 2
    return latent, image


def encode(w: Weights, config: TokenizerConfig, images: torch.Tensor) -> torch.Tensor:
    """Return logits [B, N, K] of images."""
    side = config.patch_size
    x = F.conv2d(images, w["encoder.patch_embedder.weight"], w["encoder.patch_embedder.bias"], side)
    latent = w["encoder.latent_tokens"].expand(len(images), -1, -1)
    latent, _ = trunk(w, config, "encoder", latent, x)
    latent = linear(w, "encoder.proj_out", rms(w, "encoder.norm_out", latent))
    return linear(w, "quantizer.proj.0", latent)


def decode(
    w: Weights, config: TokenizerConfig, code: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Return images of codes [B, N, K]."""
    side = config.patch_size
    shrink = side * (2 * len(config.upsample_after) or 1)
    latent = rms(w, "decoder.input_layer.0", code @ w["quantizer.embed"])
    latent = linear(w, "decoder.input_layer.1", latent)
    mask = w["decoder.mask_tokens"].reshape(1, -1, 1, 1)
    image = mask.expand(len(code), -1, height // shrink, width // shrink)
    _, image = trunk(w, config, "decoder", latent, image)
    x = linear(w, "to_pixel", rms(w, "decoder.norm_out", image.permute(0, 2, 3, 1)))
    x = x.unflatten(-1, (side, side, 3)).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(code), 3, height, width)


def _joint(
    w: Weights, name: str, h: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, dim: int
) -> torch.Tensor:
    both = torch.cat([linear(w, f"{name}.proj_cond", text), h], 1)
    q = rms(w, f"{name}.attn.norm_q", heads(linear(w, f"{name}.attn.q_proj", h), dim))
    k = rms(w, f"{name}.attn.norm_k", heads(linear(w, f"{name}.attn.k_proj", both), dim))
    v = heads(linear(w, f"{name}.attn.v_proj", both), dim)
    return linear(w, f"{name}.attn.o_proj", attend(q, k, v, mask))


def _feed_forward(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(
        w, f"{name}.net.2", F.gelu(linear(w, f"{name}.net.0.proj", x), approximate="tanh")
    )


def diffusion(
    w: Weights,
    sizes: Generator,
    z: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor,
) -> torch.Tensor:
    """Return flip logits [B, N, K] of noisy bits at times [B], for text [layers, B, L, Dt]."""
    time = F.silu(linear(w, "time_embed.linear_1", t[:, None].to(z.dtype)))
    condition = F.silu(linear(w, "time_embed.linear_2", time))
    mask = torch.cat([text_mask > 0, text_mask.new_ones(z.shape[:2]) > 0], 1)[:, None, None]
    x = linear(w, "x_embedder", z)
    for i in range(sizes.num_layers):
        name = f"transformer_blocks.{i}"
        parts = linear(w, f"{name}.norm1.linear", condition)[:, None].chunk(6, -1)
        h = layer_norm(x) * (1 + parts[1]) + parts[0] + w[f"{name}.pos_emb"]
        x = x + parts[2] * _joint(w, name, h, text[i], mask, sizes.head_dim)
        h = layer_norm(x) * (1 + parts[4]) + parts[3]
        x = x + parts[5] * _feed_forward(w, f"{name}.ff", h)
    scale, shift = linear(w, "norm_out.linear", condition)[:, None].chunk(2, -1)
    return linear(w, "proj_out", layer_norm(x) * (1 + scale) + shift)


def autoregressive(
    w: Weights, sizes: Generator, z: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
) -> torch.Tensor:
    """Return logits of the first T + 1 tokens from the bits of the first T."""
    x = torch.cat([w["split_token"].expand(len(z), -1, -1), linear(w, "x_embedder", z)], 1)
    length = x.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=z.device).tril()
    of_text = (text_mask > 0)[:, None].expand(-1, length, -1)
    mask = torch.cat([of_text, causal.expand(len(z), -1, -1)], -1)[:, None]
    for i in range(sizes.num_layers):
        name = f"transformer_blocks.{i}"
        h = rms(w, f"{name}.input_layernorm", x) + w[f"{name}.pos_emb"][:, :length]
        x = x + _joint(w, name, h, text[i], mask, sizes.head_dim)
        x = x + _feed_forward(w, f"{name}.mlp", rms(w, f"{name}.post_attention_layernorm", x))
    return linear(w, "proj_out", rms(w, "norm_out", x))


def _guided(logits: torch.Tensor, guidance: float, temperature: float) -> torch.Tensor:
    conditional, unconditional = logits.chunk(2)
    return ((1 + guidance) * conditional - guidance * unconditional) / temperature


def sample_diffusion(
    predict: Any,
    uniforms: torch.Tensor,
    *,
    guidance: float,
    temperature: float = 1.0,
    rho: float = 1.0,
    protocol: int = 1,
) -> torch.Tensor:
    """Sample codes [B, N, K] by `predict(z [2B, N, K], t [2B])` with uniforms [steps, B, N, K]."""
    steps = len(uniforms)
    z = (uniforms[0] < 0.5).to(uniforms.dtype)
    for i in range(steps):
        t, following = ((1 - j / steps) ** rho for j in (i, i + 1))
        both = torch.cat([z, z])
        flip = _guided(predict(both, both.new_full((len(both),), t)), guidance, temperature)
        p = torch.where(z > 0.5, torch.sigmoid(-flip), torch.sigmoid(flip))
        if i + 1 == steps:
            return (p > 0.5).to(z.dtype)
        mixed = p * (1 - following) + 0.5 * following
        if protocol == 2:
            one = mixed * (z - (t - following) * (z - 0.5))
            zero = (1 - mixed) * ((1 - z) - (t - following) * (0.5 - z))
            mixed = one / (one + zero)
        z = (uniforms[i + 1] < mixed).to(z.dtype)
    return z


def sample_ar(
    predict: Any, uniforms: torch.Tensor, *, guidance: float, temperature: float = 1.0
) -> torch.Tensor:
    """Sample codes by `predict(z [2B, T, K])`, token by token, with uniforms [B, N, K]."""
    z = uniforms[:, :0]
    for i in range(uniforms.shape[1]):
        logits = predict(torch.cat([z, z]))[:, -1]
        p = torch.sigmoid(_guided(logits, guidance, temperature))
        z = torch.cat([z, (uniforms[:, i] < p).to(z.dtype)[:, None]], 1)
    return z
