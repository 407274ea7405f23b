"""Codes as training data: each picture's bits from the tokenizer, packed.

Axes: B batch, N latent tokens, K bits, V variants of a picture (crops, mirrored or not).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instella_jax.data.samples import BadSample
from instella_jax.data.shards import Records, read_dataset_file
from instella_jax.data.transforms import with_text
from instella_jax.errors import UserError
from instella_jax.runtime.digest import digest

if TYPE_CHECKING:
    import jax


def packed_bytes(num_tokens: int, bits: int) -> int:
    """Return the size in bytes of a packed code."""
    return -(-num_tokens * bits // 8)


def pack_bits(code: jax.Array) -> jax.Array:
    """Pack codes [..., N, K] of 0 and 1 to uint8 [..., ceil(N K / 8)], the first bit on top."""
    import jax.numpy as jnp

    flat = code.reshape(*code.shape[:-2], -1)
    return jnp.packbits(flat.astype(jnp.bool_), axis=-1)


def unpack_bits(packed: jax.Array, num_tokens: int, bits: int) -> jax.Array:
    """Undo `pack_bits`: uint8 [B, ceil(N K / 8)] -> float32 [B, N, K]."""
    import jax.numpy as jnp

    flat = jnp.unpackbits(packed, axis=-1, count=num_tokens * bits)
    return flat.reshape(packed.shape[0], num_tokens, bits).astype(jnp.float32)


def fingerprint(tokenizer: Path) -> str:
    """Tell the weights of an image tokenizer's model folder from others.

    Raises:
      UserError: the folder has none.
    """
    path = tokenizer / "tokenizer.safetensors"
    try:
        return digest(path)
    except OSError as error:
        raise UserError(f"no image tokenizer at {tokenizer} ({error.strerror})") from None


def check_dataset(
    folder: str | os.PathLike[str],
    num_tokens: int,
    bits: int,
    image_size: int,
    tokenizer: Path | None,
) -> None:
    """Check that a data set of codes is of the shape and the tokenizer that training expects.

    Args:
      folder: of the data set.
      num_tokens: N.
      bits: K.
      image_size: side in pixels of the encoded pictures.
      tokenizer: model folder that will decode the codes; None if there is none.

    Raises:
      UserError: it is not.
    """
    description = read_dataset_file(folder, "codes")
    wanted = {"num_tokens": num_tokens, "bits": bits, "image_size": image_size}
    for name, value in wanted.items():
        if description[name] != value:
            raise UserError(
                f"the codes of {folder} have {name}={description[name]}, the config {value}; "
                "change the config, or encode again"
            )
    if tokenizer is not None and fingerprint(tokenizer) != description["tokenizer"]:
        raise UserError(
            f"the codes of {folder} were not made by the tokenizer {tokenizer}; give the one that "
            "made them, or encode again"
        )


class CodeShards(Records):
    """Codes of a data set with their captions, as a source.

    `source[i]` is {"code": uint8 [V, bytes], "texts": tuple of str}; `PickVariant` takes one.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, split: str = "all", heldout: float = 0.02
    ):
        """Open a data set of codes; see `Records`."""
        super().__init__(folder, "codes", split=split, heldout=heldout)
        self._bytes = packed_bytes(self.description["num_tokens"], self.description["bits"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read the code and the captions of one picture.

        Raises:
          BadSample: the record is damaged, or the picture could not be encoded.
        """
        header, payload = self.read(index)
        name = f"{header.get('key')} of {self.folder}"
        if not payload or len(payload) % self._bytes:
            raise BadSample(f"{name} has no code: {header.get('dropped', 'wrong length')}")
        if not header.get("texts"):
            raise BadSample(f"{name} has no caption")
        code = np.frombuffer(payload, np.uint8).reshape(-1, self._bytes)
        return {"code": code, "texts": tuple(header["texts"])}


class PickVariant:
    """One variant and one caption of each picture: at random, or the first of both."""

    def __init__(self, train: bool):
        """Choose between random and first ones."""
        self._train = train

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the sample with "code" uint8 [bytes] and "text"."""
        variants = sample["code"]
        chosen = int(rng.integers(len(variants))) if self._train else 0
        return with_text({**sample, "code": variants[chosen]}, rng if self._train else None)
