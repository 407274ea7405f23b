"""Text features of prompts, each encoded by itself and once.

Axes: U different prompts, L text length, Dt width of the text encoder.
"""

import collections
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from instella_jax.errors import UserError
from instella_jax.models.functional import Params, apply
from instella_jax.models.olmo import Olmo
from instella_jax.models.text import TextTokenizer

# Text is padded to a multiple of this, so that few lengths are ever compiled.
TEXT_BLOCK = 32
# Bytes of text features that are kept for prompts that come again.
TEXT_CACHE = 2**28


@functools.partial(jax.jit, static_argnames="network")
def text_features(
    network: Olmo, params: Params, ids: Int[Array, "U L"], mask: Bool[Array, "U L"]
) -> Float[Array, "layers U L Dt"]:
    """Return the text features that the blocks of a generator attend to."""
    return apply(network, params, ids, mask)[1:]


@jax.jit
def _rows_of(
    features: tuple[Float[Array, "layers 1 L Dt"], ...], rows: Int[Array, " rows"]
) -> Float[Array, "layers rows L Dt"]:
    """Return the features of rows, each one of those given."""
    return jnp.take(jnp.concatenate(features, axis=1), rows, axis=1)


class PromptFeatures:
    """A text encoder that remembers the prompts it has seen.

    No prompt's features depend on the others', and those that come again are remembered, the last
    ones in `TEXT_CACHE` bytes.
    """

    def __init__(
        self, network: Olmo, params: Params, text_tokenizer: TextTokenizer, max_length: int
    ):
        """Join the parts; `max_length` is that of a prompt in tokens."""
        self.network, self.params = network, params
        self.text_tokenizer, self.max_length = text_tokenizer, max_length
        self._ids: dict[str, np.ndarray] = {}
        # Features by prompt and padded length, the latest last.
        self._known: collections.OrderedDict[tuple[str, int], jax.Array] = collections.OrderedDict()

    def length(self, prompts: Sequence[str]) -> int:
        """Return the number of tokens that prompts are padded to: that of the longest, rounded up.

        Rounded, so that few lengths are compiled.

        Raises:
          UserError: a prompt is no text.
        """
        longest = max([1, *map(len, self._tokens(prompts))])
        return min(-(-longest // TEXT_BLOCK) * TEXT_BLOCK, self.max_length)

    def __call__(
        self, prompts: Sequence[str], length: int
    ) -> tuple[Float[Array, "layers rows L Dt"], Bool[np.ndarray, "rows L"]]:
        """Encode prompts.

        Args:
          prompts: the texts of all rows.
          length: L, see `length`.

        Returns:
          features and mask of the rows.
        """
        unique = list(dict.fromkeys(prompts))
        mask = np.zeros((len(unique), length), bool)
        for row, ids in zip(mask, self._tokens(unique), strict=True):
            row[length - len(ids) :] = True
        rows = np.array([unique.index(prompt) for prompt in prompts])
        features = tuple(self._features(prompt, length) for prompt in unique)
        return _rows_of(features, rows), mask[rows]

    def _tokens(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each prompt, int32 without padding."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._ids]
        for prompt in new:
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise UserError(f"prompt {prompt!r} is not UTF-8: give it as UTF-8 text")
        if new:
            if len(self._ids) >= 2**16:
                new = list(dict.fromkeys(prompts))
                self._ids.clear()
            rows = self.text_tokenizer.encode(new, max_length=self.max_length)
            own = {prompt: ids[mask] for prompt, ids, mask in zip(new, *rows, strict=True)}
            self._ids.update(own)
        return [self._ids[prompt] for prompt in prompts]

    def _features(self, prompt: str, length: int) -> Float[Array, "layers 1 L Dt"]:
        if (prompt, length) in self._known:
            self._known.move_to_end((prompt, length))
            return self._known[prompt, length]
        (ids,) = self._tokens([prompt])
        if len(ids):
            padded = np.full((1, length), self.text_tokenizer.pad_id, np.int32)
            padded[0, length - len(ids) :] = ids
            mask = np.arange(length)[None] >= length - len(ids)
            features = text_features(self.network, self.params, padded, mask)
        else:
            # Nothing sees the states of the empty prompt, so that any do.
            sizes = self.network.config
            shape = (sizes.num_hidden_layers, 1, length, sizes.hidden_size)
            features = jax.device_put(np.zeros(shape, jnp.dtype(self.network.run.output_dtype)))
        self._known[prompt, length] = features
        while sum(x.nbytes for x in self._known.values()) > TEXT_CACHE and len(self._known) > 1:
            self._known.popitem(last=False)
        return features
