"""A tokenizer to use: pictures to bits and back, of any size, in memory or as files.

Axes: B pictures, N latent tokens, K bits, T tiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instella_jax.codec import tiles
from instella_jax.codec.format import HASH_BYTES, BadCode, CodeFile, unpack
from instella_jax.codec.pictures import Decoding, Encoding, Picture, as_pixels, assemble
from instella_jax.codec.shapes import decoding_shape, encoding_shape, trained_shapes
from instella_jax.data.buckets import Shape
from instella_jax.data.codes import pack_bits
from instella_jax.data.transforms import resize
from instella_jax.errors import UserError
from instella_jax.models.functional import Params, apply, check_tensor
from instella_jax.models.layers import Execution
from instella_jax.models.pixels import to_float, to_uint8
from instella_jax.models.quantizers import hard_code
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.runtime import sharding
from instella_jax.runtime.digest import digest
from instella_jax.weights import model_folder

BATCH = 16


@functools.partial(jax.jit, static_argnames="network")
def encode_packed(network: TokenizerNetwork, params: Params, images: jax.Array) -> jax.Array:
    """Encode uint8 [B, height, width, 3] to packed codes uint8 [B, ceil(N K / 8)]."""
    logits = apply(network, params, to_float(images), method="encode")
    return pack_bits(hard_code(logits))


@functools.partial(jax.jit, static_argnames=("network", "height", "width"))
def decode_codes(
    network: TokenizerNetwork, params: Params, codes: jax.Array, height: int, width: int
) -> jax.Array:
    """Decode codes uint8 [B, N, K] to uint8 [B, height, width, 3]."""
    codes = codes.astype(jnp.float32)
    return to_uint8(apply(network, params, codes, height, width, method="decode"))


class BinaryTokenizer:
    """Turns pictures into bits and back.

    A batch of another size sums in another order: a logit that is within rounding of 0 may then
    give another bit, and a pixel another grey level.
    """

    def __init__(
        self,
        network: TokenizerNetwork,
        params: Params,
        *,
        shapes: Sequence[Shape],
        nested: bool = False,
        fingerprint: str = "",
        mesh: Mesh | None = None,
        batch_size: int = BATCH,
    ):
        """Join a network and its parameters.

        Args:
          network: with N tokens of K bits.
          params: of it, on the mesh.
          shapes: heights and widths in pixels that it was trained at, () where that is not known.
          nested: whether it was trained to decode the first tokens of a code alone.
          fingerprint: what files name the weights by, see `runtime.digest`; "": it makes none.
          mesh: devices to compute on; None is the default device.
          batch_size: pictures at a time, at most.
        """
        self.network, self.params, self._shapes = network, params, tuple(shapes)
        self.nested, self.fingerprint = nested, fingerprint
        self.mesh, self.batch_size = mesh, batch_size

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str] = "demo",
        run: Execution = Execution(),  # noqa: B008 (frozen)
        *,
        mesh: Mesh | None = None,
        batch_size: int = BATCH,
    ) -> BinaryTokenizer:
        """Read a model folder; "demo" is the shipped tokenizer.

        Args:
          folder: with an image tokenizer.
          run: how the network is computed.
          mesh: devices to compute on; None is the default device.
          batch_size: pictures at a time, at most.

        Raises:
          UserError: there is no tokenizer, or it is damaged or does not fit the mesh.
        """
        place = model_folder.find(os.fspath(folder), "tokenizer")
        description = model_folder.read_description(place)
        sizes = model_folder.tokenizer_config(description.get("tokenizer", {}))
        network = TokenizerNetwork(sizes, run)
        if mesh is not None:
            check_tensor({"tokenizer": network}, mesh)
        params = model_folder.load(place, "tokenizer", network, run.param_dtype, mesh)
        fingerprint = digest(model_folder.weights_path(place, "tokenizer"))
        shapes = trained_shapes(description)
        return cls(
            network, params, shapes=shapes, nested=bool(description.get("tail_drop", 0)),
            fingerprint=fingerprint, mesh=mesh, batch_size=batch_size,
        )  # fmt: skip

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Heights and widths in pixels that it was trained at.

        Raises:
          UserError: they are not known.
        """
        if not self._shapes:
            raise UserError(
                "the model folder does not say which picture size it was trained at: config.json "
                'has no "image_size"'
            )
        return self._shapes

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.network.config.num_tokens

    @property
    def bits(self) -> int:
        """K, bits of a token."""
        return self.network.config.bits

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode pictures of one size, as they are.

        Args:
          images: uint8 [B, height, width, 3], or one picture without B; sides are multiples of
            `network.config.multiple`. `fit` brings any picture to a size that was trained.

        Returns:
          uint8 [B, N, K] of 0 and 1, or [N, K].

        Raises:
          UserError: the images have another form, or their size does not fit.
        """
        batch = np.asarray(images)
        if batch.dtype != np.uint8 or batch.ndim not in (3, 4) or batch.shape[-1] != 3:
            raise UserError(
                f"images are {batch.dtype} {list(batch.shape)}: expected uint8 [B, height, width, "
                "3], or one without B"
            )
        if batch.ndim == 3:
            return self.encode(batch[None])[0]
        self.network.config.grid(*batch.shape[1:3])
        found = [np.zeros((0, self.num_tokens, self.bits), np.uint8)]
        for rows in self._batches(batch):
            packed = sharding.fetch(self.dispatch_encode(rows))[: len(rows)]
            found.append(unpack(packed, self.num_tokens, self.bits))
        return np.concatenate(found)

    def decode(self, codes: np.ndarray, height: int = 0, width: int = 0) -> np.ndarray:
        """Decode codes.

        Args:
          codes: 0 and 1, [B, N, K], or one code without B; of a tokenizer that was trained for it
            also fewer than N tokens, the first ones.
          height: of the pictures in pixels, a multiple of `network.config.multiple`; 0 is the
            first size that was trained. The decoder takes any, and is best at those.
          width: likewise.

        Returns:
          uint8 [B, height, width, 3], or one picture.

        Raises:
          UserError: the codes have another form, or the size does not fit.
        """
        batch = np.asarray(codes)
        if batch.ndim == 2:
            return self.decode(batch[None], height, width)[0]
        right = batch.ndim == 3 and batch.shape[2] == self.bits
        if (
            not right
            or not 1 <= batch.shape[1] <= self.num_tokens
            or not np.isin(batch, (0, 1)).all()
        ):
            raise UserError(
                f"codes are {batch.dtype} {list(batch.shape)}: expected 0 and 1, "
                f"[B, {self.num_tokens}, {self.bits}], or one without B"
            )
        self.check_tokens(batch.shape[1])
        batch = self._filled(batch.astype(np.uint8))
        height, width = height or self.shapes[0][0], width or self.shapes[0][1]
        self.network.config.grid(height, width)
        found = [np.zeros((0, height, width, 3), np.uint8)]
        for rows in self._batches(batch):
            pictures = self.dispatch_decode(rows, height, width)
            found.append(sharding.fetch(pictures)[: len(rows)])
        return np.concatenate(found)

    def fit(self, image: Picture) -> np.ndarray:
        """Bring a picture, as a whole, to the closest size that was trained.

        Args:
          image: uint8 [h, w, 3], or of Pillow.

        Returns:
          uint8 [height, width, 3] for `encode`; sides are stretched where the aspect ratio is none
          that was trained.
        """
        picture = as_pixels(image)
        return resize(picture, *encoding_shape(self.shapes, *picture.shape[:2]))

    def to_bytes(self, image: Picture, encoding: Encoding = Encoding()) -> bytes:  # noqa: B008
        """Return a picture of any size as the bytes of a `.b1d` file, see docs/formats.md.

        Args:
          image: uint8 [h, w, 3], or of Pillow.
          encoding: how it is encoded.

        Raises:
          UserError: this tokenizer makes no files, or the picture does not fit the format.
        """
        file, parts = self.prepare(image, encoding)
        codes = self.encode(parts)[:, : file.stored]
        return dataclasses.replace(file, codes=codes).to_bytes()

    def from_bytes(self, data: bytes, decoding: Decoding = Decoding()) -> np.ndarray:  # noqa: B008
        """Return the picture of the bytes of a `.b1d` file.

        Args:
          data: what `to_bytes` has returned.
          decoding: how it is decoded.

        Returns:
          uint8 [h, w, 3], as large as the original where no other size is asked for.

        Raises:
          BadCode: the bytes are damaged, or were made with other weights.
        """
        file = CodeFile.from_bytes(data)
        codes = self.whole(file, decoding)
        return assemble(file, self.decode(codes, *self.decoding_shape(file, decoding)), decoding)

    def prepare(
        self, image: Picture, encoding: Encoding, size: Shape | None = None
    ) -> tuple[CodeFile, np.ndarray]:
        """Bring a picture to what is encoded, one tile or several.

        Args:
          image: uint8 [h, w, 3], or of Pillow.
          encoding: how it is encoded.
          size: height and width of the original, where `image` is a smaller copy of it.

        Returns:
          A file whose bits are all 0 yet, and uint8 [T, height, width, 3] for `encode`.

        Raises:
          UserError: see `to_bytes`.
        """
        if not self.fingerprint:
            raise UserError(
                "this tokenizer makes no files: they name the weights of a model folder, and it "
                "was not read from one"
            )
        self.check_tokens(encoding.tokens)
        picture = as_pixels(image)
        height, width = size or picture.shape[:2]
        rows, columns, overlap = encoding.tiling(height, width)
        shape = encoding_shape(self.shapes, height // rows, width // columns)
        grid_rows, grid_columns = self.network.config.grid(*shape)
        stored = encoding.tokens or self.num_tokens
        file = CodeFile(
            model=self.fingerprint[: 2 * HASH_BYTES],
            height=height,
            width=width,
            grid_rows=grid_rows,
            grid_columns=grid_columns,
            num_tokens=self.num_tokens,
            bits=self.bits,
            stored=stored,
            tile_rows=rows,
            tile_columns=columns,
            overlap=overlap,
            codes=np.zeros((rows * columns, stored, self.bits), np.uint8),
            metadata=encoding.metadata,
        )
        return file, tiles.cut(picture, rows, columns, overlap, *shape)

    def check_tokens(self, tokens: int) -> None:
        """Check that codes may be cut after so many tokens; 0 is all of them.

        Raises:
          UserError: the tokenizer was not trained for that, or has no so many.
        """
        if tokens in (0, self.num_tokens):
            return
        if not 1 <= tokens <= self.num_tokens:
            raise UserError(f"tokens must be in 1 to {self.num_tokens}, got {tokens}")
        if not self.nested:
            raise UserError(
                f"this tokenizer decodes all {self.num_tokens} tokens of a code or none: to use "
                f"{tokens}, train one with loss.tail_drop"
            )

    def whole(self, file: CodeFile, decoding: Decoding) -> np.ndarray:
        """Return the codes of a file that these weights have made: uint8 [T, N, K].

        Raises:
          BadCode: they have not.
          UserError: `decoding` asks for fewer tokens, and the tokenizer was not trained for that.
        """
        own = self.fingerprint[: 2 * HASH_BYTES]
        if file.model != own:
            raise BadCode(
                f"it was made by the model {file.model}, and this one is {own or 'of no folder'}: "
                "give the model that made it"
            )
        if (file.num_tokens, file.bits) != (self.num_tokens, self.bits):
            raise BadCode(
                f"it has {file.num_tokens} tokens of {file.bits} bits, the model "
                f"{self.num_tokens} of {self.bits}"
            )
        self.check_tokens(file.stored)
        self.check_tokens(decoding.tokens)
        return self._filled(file.codes[:, : decoding.tokens or file.stored])

    def _filled(self, codes: np.ndarray) -> np.ndarray:
        """Fill codes up to N tokens: one without a bit adds nothing to what the decoder reads."""
        return np.pad(codes, ((0, 0), (0, self.num_tokens - codes.shape[1]), (0, 0)))

    def decoding_shape(self, file: CodeFile, decoding: Decoding) -> Shape:
        """Return height and width that the tiles of a file are decoded at.

        Raises:
          BadCode: it was encoded at a size that was not trained.
          UserError: the decoder cannot draw the size that is asked for.
        """
        if decoding.grid:
            self.network.config.grid(*decoding.grid)
            return decoding.grid
        if decoding.size:
            height, width = decoding.target(file)
            rows, columns = file.tile_rows, file.tile_columns
            return decoding_shape(self.shapes, height // rows, width // columns)
        side = self.network.config.patch_size
        shape = file.grid_rows * side, file.grid_columns * side
        if shape not in self.shapes:
            raise BadCode(
                f"it was encoded at {shape[0]}x{shape[1]}, at which this tokenizer was not trained"
            )
        return shape

    def dispatch_encode(self, images: np.ndarray, rows: int = 0) -> jax.Array:
        """Begin to encode a batch; the result is there when it is read.

        Args:
          images: uint8 [B, height, width, 3].
          rows: of the batch that is computed, B or more; 0: few different ones.

        Returns:
          uint8 [rows or more, ceil(N K / 8)], the first B of them valid.
        """
        with self._on_mesh():
            return encode_packed(self.network, self.params, self._place(images, rows))

    def dispatch_decode(self, codes: np.ndarray, height: int, width: int) -> jax.Array:
        """Begin to decode a batch [B, N, K]: uint8 [B or more, height, width, 3]."""
        with self._on_mesh():
            return decode_codes(self.network, self.params, self._place(codes), height, width)

    def _batches(self, array: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(array), self.batch_size):
            yield array[start : start + self.batch_size]

    def _on_mesh(self) -> contextlib.AbstractContextManager[None]:
        return sharding.use(self.mesh) if self.mesh else contextlib.nullcontext()

    def _place(self, array: np.ndarray, rows: int = 0) -> Any:
        """Fill a batch up, so that few shapes are compiled, and put it on the devices."""
        # The next power of two.
        rows = rows or min(1 << (len(array) - 1).bit_length(), max(len(array), self.batch_size))
        parts = sharding.batch_parts(self.mesh) if self.mesh else 1
        rows = -(-rows // parts) * parts
        filled = np.pad(array, ((0, rows - len(array)), *((0, 0),) * (array.ndim - 1)))
        return sharding.place_copy(filled, self.mesh) if self.mesh else jax.device_put(filled)
