"""Writes random weights in the layout of the published checkpoints, to try import and sampling on.

python tools/make_random_published.py OUT --scale published
instella-jax import OUT/model --text-encoder OUT/olmo --out MODEL

Makes OUT/model (bae/model.safetensors, diffusion.pt, ar.pt), OUT/olmo (config.json,
model.safetensors, tokenizer.json) and OUT/sizes.json, what a tiny import needs as --sizes.
"published" takes 8 GB of disk in bfloat16.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from instella_jax.errors import command_line
from instella_jax.models.functional import Network
from instella_jax.models.olmo import Olmo
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.runtime.files import fresh_folder
from instella_jax.weights import convert, model_parts, reference_names, reference_sizes
from instella_jax.weights.published import TOKENIZER_FILE
from instella_jax.weights.tensor_files import Spec, write_safetensors
from instella_jax.weights.torch_files import import_torch, write_torch

SCALES: dict[str, dict[str, Any]] = {
    "tiny": {
        "bae": dict(
            patch_size=4, num_latent_tkns=8, codebook_size=10, encoder_layers=3,
            encoder_num_heads=2, encoder_head_dim=16, decoder_layers=3, decoder_num_heads=3,
            decoder_head_dim=16, axes_dims_rope=[4, 6, 6], downsample_idx=[1], upsample_idx=[1],
        ),
        "generator": dict(
            num_layers=2, num_attention_heads=2, attention_head_dim=16, text_cond_dim=24
        ),
        "text": dict(
            model_type="olmo", vocab_size=320, hidden_size=24, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, pad_token_id=1,
            tie_word_embeddings=True, rope_theta=10000.0, clip_qkv=None,
        ),
        "tokens": 300,
    },
    "published": {
        "bae": dict(
            patch_size=16, num_latent_tkns=128, codebook_size=64, encoder_layers=12,
            encoder_num_heads=12, encoder_head_dim=64, decoder_layers=16, decoder_num_heads=16,
            decoder_head_dim=64, axes_dims_rope=[8, 28, 28], downsample_idx=[7], upsample_idx=[7],
        ),
        "generator": dict(
            num_layers=16, num_attention_heads=16, attention_head_dim=128, text_cond_dim=2048
        ),
        "text": dict(
            model_type="olmo", vocab_size=50304, hidden_size=2048, intermediate_size=8192,
            num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, pad_token_id=1,
            tie_word_embeddings=True, rope_theta=10000.0, clip_qkv=None,
        ),
        "tokens": 50280,
    },
}  # fmt: skip


def tensors(network: Network, seed: int, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor that the reference has for a network: random, norms 1, biases 0."""
    rng = np.random.default_rng(seed)
    # Drawing each of a billion values anew would take longer than everything else.
    pool = (0.02 * rng.standard_normal(1_000_003)).astype(dtype)
    copies = {original: name for name, original in reference_names.copies(network).items()}
    shapes = {**convert.reference_shapes(network), **reference_names.unused_shapes(network)}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        if name.endswith(".bias"):
            value = np.zeros(shape, dtype)
        elif len(shape) == 1:
            value = np.ones(shape, dtype)
        else:
            value = np.resize(np.roll(pool, -int(rng.integers(len(pool)))), size).reshape(shape)
        yield name, value
        if name in copies:
            yield copies[name], value


def specs(network: Network, dtype: Any) -> dict[str, Spec]:
    """Return shapes and types of what `tensors` yields."""
    shapes = convert.reference_shapes(network)
    for copy, original in reference_names.copies(network).items():
        shapes[copy] = shapes[original]
    return {
        name: (shape, np.dtype(dtype))
        for name, shape in {**shapes, **reference_names.unused_shapes(network)}.items()
    }


def write_text_tokenizer(path: Path, size: int) -> None:
    """Write a byte-level BPE in GPT-NeoX's form: end and padding first, runs of spaces last."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    spaces = [" " * count for count in range(24, 1, -1)]
    names = ["<|endoftext|>", "<|padding|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges: list[tuple[str, str]] = []
    rng = np.random.default_rng(0)
    while len(vocabulary) < size - len(spaces):
        left, right = (names[2 + rng.integers(len(names) - 2)] for _ in range(2))
        if left + right not in vocabulary and len(left + right) < 16:
            vocabulary[left + right] = len(vocabulary)
            names.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:2])
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in spaces])
    tokenizer.save(str(path))


def make(out: Path, scale: str, dtype: Any = jnp.bfloat16, torch: bool = True) -> None:
    """Write everything; see the module.

    Args:
      out: folder to make.
      scale: a key of `SCALES`.
      dtype: of the tensors.
      torch: whether generators are torch files; else safetensors of the same names.

    Raises:
      UserError: torch is wanted and not installed, or the folder is there already.
    """
    if torch:
        import_torch()  # before anything large is written
    sizes = SCALES[scale]
    config = reference_sizes.tokenizer_sizes(sizes["bae"])
    olmo = Olmo(reference_sizes.olmo_config(sizes["text"]))
    generator = reference_sizes.generator_sizes(sizes["generator"], sizes["bae"])
    with fresh_folder(out) as folder:
        files: dict[str, Network] = {f"model/{TOKENIZER_FILE}": TokenizerNetwork(config)}
        for kind, network in model_parts.GENERATORS.items():
            files[f"model/{kind}.{'pt' if torch else 'safetensors'}"] = network(**generator)
        files["olmo/model.safetensors"] = olmo
        for seed, (name, network) in enumerate(files.items()):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".pt":
                write_torch(path, tensors(network, seed, dtype))
            else:
                write_safetensors(path, specs(network, dtype), tensors(network, seed, dtype))
        write_text_tokenizer(folder / "olmo/tokenizer.json", sizes["tokens"])
        (folder / "olmo/config.json").write_text(json.dumps(sizes["text"], indent=1))
        given = {key: sizes[key] for key in ("bae", "generator")}
        (folder / "sizes.json").write_text(json.dumps(given, indent=1))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-torch", action="store_true", help="generators as safetensors")
    options = parser.parse_args()
    with command_line():
        make(options.out, options.scale, jnp.dtype(options.dtype), not options.no_torch)


if __name__ == "__main__":
    main()
