"""FLOPs of the networks by formula, and the peak rates of chips.

Matrix products, attention and convolutions count, a multiply-add as two operations. Training takes
three forward passes of each trained network, one of each frozen network and two of a frozen network
with trained adapters, whose own few operations are left out; recomputation under rematerialisation
does not count. Utilisation is measured by this count: 6 * parameters * tokens would be too high,
since the modulation of the diffusion blocks runs once per image.

Axes: B batch, N latent tokens, K bits, L text length, T sequence, D width, P patch.
"""

import dataclasses
import functools
import itertools
import logging
import math
from typing import Any

from instella_jax.config import Config
from instella_jax.data import buckets
from instella_jax.models.olmo import OlmoConfig
from instella_jax.models.tokenizer_config import TokenizerConfig
from instella_jax.stages.precomputed_codes import trains_on_codes
from instella_jax.weights import model_folder


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
      name: its usual name.
      tflops: dense bfloat16 peak of what jax calls a device, in TFLOP/s.
      memory_gb: device memory, in units of 10^9 bytes.
      kinds: prefixes of `jax.Device.device_kind`.
    """

    name: str
    tflops: float
    memory_gb: float
    kinds: tuple[str, ...]


# From the makers' data sheets, without sparsity: NVIDIA A100, L40S, H100, H200 (SXM) and DGX B200;
# AMD Instinct MI300X, MI325X and MI355X; Google Cloud's pages of TPU v5e, v5p, v6e and Ironwood, of
# which a chip is two devices. ROCm may tell the architecture alone, which two of AMD's share with
# their peak.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("MI300X", 1_307, 192, ("AMD Instinct MI300X", "gfx942")),
        Chip("MI325X", 1_307, 256, ("AMD Instinct MI325X",)),
        Chip("MI355X", 2_517, 288, ("AMD Instinct MI355X", "gfx950")),
        Chip("A100", 312, 80, ("NVIDIA A100",)),
        Chip("L40S", 362, 48, ("NVIDIA L40S",)),
        Chip("H100", 989, 80, ("NVIDIA H100",)),
        Chip("H200", 989, 141, ("NVIDIA H200",)),
        Chip("B200", 2_250, 180, ("NVIDIA B200",)),
        Chip("v5e", 197, 16, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 459, 95, ("TPU v5p", "TPU v5")),
        Chip("v6e", 918, 32, ("TPU v6 lite", "TPU v6e")),
        Chip("v7x", 1_153, 96, ("TPU7x", "TPU v7x")),
    )
}

_log = logging.getLogger(__name__)


@functools.cache
def find_chip(device_kind: str) -> Chip | None:
    """Return the chip of a `jax.Device.device_kind`.

    Where its peak is not known it is None, which is said once of an accelerator.
    """
    found = next((c for c in CHIPS.values() if device_kind.startswith(c.kinds)), None)
    if found is None and device_kind != "cpu":
        _log.warning(
            "the peak of %s is not known, so that no share of it is reported: known are %s",
            device_kind, ", ".join(CHIPS),
        )  # fmt: skip
    return found


def _dense(rows: int, fan_in: int, fan_out: int) -> int:
    return 2 * rows * fan_in * fan_out


def _attention(queries: int, keys: int, width: int) -> int:
    return 4 * queries * keys * width


def text_keys_values(sizes: Any, text_width: int, text_length: int) -> int:
    """Count the keys and values of a prompt in all blocks; see `diffusion_forward`."""
    width = sizes["num_heads"] * sizes["head_dim"]
    text = _dense(text_length, text_width, width) + 2 * _dense(text_length, width, width)
    return sizes["num_layers"] * text


def _generator_blocks(sizes: Any, text_width: int, text_length: int) -> int:
    width, tokens = sizes["num_heads"] * sizes["head_dim"], sizes["num_tokens"]
    image = 4 * _dense(tokens, width, width) + 2 * _dense(tokens, width, 4 * width)
    mixing = _attention(tokens, tokens + text_length, width)
    text = text_keys_values(sizes, text_width, text_length)
    return text + sizes["num_layers"] * (image + mixing)


def diffusion_forward(sizes: Any, text_width: int, text_length: int) -> int:
    """Count a forward pass of the diffusion generator for one image.

    Args:
      sizes: num_layers, num_heads, head_dim, num_tokens (N), bits (K).
      text_width: width of the text features.
      text_length: L.
    """
    width = sizes["num_heads"] * sizes["head_dim"]
    ends = 2 * _dense(sizes["num_tokens"], sizes["bits"], width)
    modulation = sizes["num_layers"] * _dense(1, width, 6 * width) + _dense(1, width, 2 * width)
    time = _dense(1, 1, width) + _dense(1, width, width)
    return _generator_blocks(sizes, text_width, text_length) + ends + modulation + time


def ar_forward(sizes: Any, text_width: int, text_length: int) -> int:
    """Count a forward pass of the autoregressive generator over all tokens of one image.

    See `diffusion_forward` for the arguments.
    """
    width, tokens = sizes["num_heads"] * sizes["head_dim"], sizes["num_tokens"]
    ends = _dense(tokens - 1, sizes["bits"], width) + _dense(tokens, sizes["bits"], width)
    return _generator_blocks(sizes, text_width, text_length) + ends


def olmo_forward(sizes: OlmoConfig, text_length: int) -> int:
    """Count the forward pass of the text encoder over one prompt padded to L."""
    width, inner = sizes.hidden_size, sizes.intermediate_size
    narrow = sizes.num_key_value_heads * sizes.head_dim
    layer = 2 * _dense(text_length, width, width) + 2 * _dense(text_length, width, narrow)
    layer += 3 * _dense(text_length, width, inner) + _attention(text_length, text_length, width)
    return sizes.num_hidden_layers * layer


def _convolution(grid: tuple[int, int], padding: int, fan_in: int, fan_out: int) -> int:
    """Count a 3x3 convolution at each point of the output grid.

    Each axis leaves out `padding` rows of zeros.
    """
    rows, columns = grid
    return _dense((3 * rows - padding) * (3 * columns - padding), fan_in, fan_out)


def _trunk(
    width: int, layers: int, grids: list[tuple[int, int]], ends: list[int], latent: int
) -> int:
    total = 0
    for grid, (start, end) in zip(grids, itertools.pairwise([0, *ends, layers]), strict=True):
        tokens = latent + math.prod(grid)
        block = 4 * _dense(tokens, width, width) + 3 * _dense(tokens, width, 4 * width)
        total += (end - start) * (block + _attention(tokens, tokens, width))
    return total


def encoder_forward(sizes: TokenizerConfig, height: int, width: int) -> int:
    """Count the forward pass from an image of height x width pixels to the logits of its bits."""
    rows, columns = sizes.grid(height, width, len(sizes.downsample_after))
    wide, ends = sizes.encoder_width, [i + 1 for i in sorted(sizes.downsample_after)]
    grids = [(rows // 2**level, columns // 2**level) for level in range(len(ends) + 1)]
    total = _dense(math.prod(grids[0]), 3 * sizes.patch_size**2, wide)
    total += sum(_convolution(grid, 1, wide, wide) for grid in grids[1:])
    total += _trunk(wide, sizes.encoder_layers, grids, ends, sizes.num_tokens)
    return total + _dense(sizes.num_tokens, wide, wide + sizes.bits)


def decoder_forward(sizes: TokenizerConfig, height: int, width: int) -> int:
    """Count the forward pass from a code to an image of height x width pixels."""
    levels = len(sizes.upsample_after)
    rows, columns = sizes.grid(height, width, levels)
    wide, ends = sizes.decoder_width, [i + 1 for i in sorted(sizes.upsample_after)]
    shrink = 2 * levels or 1
    rows, columns = rows // shrink, columns // shrink
    grids = [(rows * 2**level, columns * 2**level) for level in range(levels + 1)]
    total = _dense(sizes.num_tokens, sizes.bits + wide, sizes.encoder_width)
    total += sum(_convolution(grid, 2, wide, 4 * wide) for grid in grids[:-1])
    total += _trunk(wide, sizes.decoder_layers, grids, ends, sizes.num_tokens)
    return total + _dense(math.prod(grids[-1]), wide, 3 * sizes.patch_size**2)


def training(config: Config, shape: tuple[int, int] | None = None) -> dict[str, int]:
    """Return the FLOPs of one training step per image, by part of the model.

    Args:
      config: config of any stage.
      shape: height and width of the image in pixels; None for the largest that the config has.

    Raises:
      UserError: sizes are missing or do not fit, or the tokenizer's folder is no model folder.
    """
    shape = shape or buckets.shapes(config)[0]
    if config.stage == "tokenizer":
        sizes = model_folder.tokenizer_config(config.model)
        encoder = encoder_forward(sizes, *shape) * (1 if config.loss.freeze_encoder else 3)
        return {"tokenizer": encoder + 3 * decoder_forward(sizes, *shape)}
    length = config.text.max_length
    text = model_folder.build(OlmoConfig, config.text.model, "text.model")
    forward = diffusion_forward if config.stage == "diffusion" else ar_forward
    generator = forward(config.model, text.hidden_size, length)
    if config.stage == "diffusion":
        again = generator - text_keys_values(config.model, text.hidden_size, length)
        generator += (config.loss.draws - 1) * again
    parts = {
        # With adapters the generator's own kernels get no gradients.
        "generator": (2 if config.lora.rank else 3) * generator,
        "text encoder": (3 if config.text.trainable else 1) * olmo_forward(text, length),
    }
    if not trains_on_codes(config):
        model = config.model
        sizes = model_folder.code_sizes(config.tokenizer, model.num_tokens, model.bits)
        parts["image encoder"] = encoder_forward(sizes, *shape)
    return parts


def speed(
    images_per_second: float, per_image: float, device_kind: str, devices: int
) -> dict[str, float]:
    """Return throughput metrics.

    Args:
      images_per_second: throughput of all devices together.
      per_image: FLOPs per image, the sum of `training`.
      device_kind: `jax.Device.device_kind` of the devices.
      devices: number of devices.

    Returns:
      Images per second in total and per device, TFLOP/s per device and, for a chip whose peak is
      known, the utilisation (0 to 1).
    """
    one = images_per_second / devices
    metrics = {
        "images_per_second": images_per_second,
        "images_per_second_per_device": one,
        "model_tflops_per_device": one * per_image / 1e12,
    }
    chip = find_chip(device_kind)
    if chip is not None:
        metrics["model_flops_utilisation"] = one * per_image / (chip.tflops * 1e12)
    return metrics
