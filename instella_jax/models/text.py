"""Prompts to token ids: the only module that touches a text tokenizer."""

import difflib
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.errors import UserError

DEMO_FOLDER = Path(__file__).parents[1] / "assets" / "demo_text"
# How the demo's vocabulary marks the start and the end of a word.
WORD_START, WORD_END = "▁", "</w>"
_PAD_TOKENS = ("[PAD]", "<|padding|>", "<pad>", "<|endoftext|>")

_log = logging.getLogger(__name__)


class TextTokenizer:
    """A `tokenizers` tokenizer that pads on the left and adds no begin token.

    Attributes:
      vocab_size: number of token ids.
      pad_id: the id that fills masked positions.
    """

    def __init__(self, tokenizer: Any, pad_id: int | None = None):
        """Wrap a `tokenizers.Tokenizer`; without a pad id it is looked up in the vocabulary."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        if pad_id is None:
            ids = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
            pad_id = next((number for number in ids if number is not None), 0)
        self.pad_id = pad_id
        # Only a closed vocabulary of whole words can tell that it does not know a word.
        model = json.loads(tokenizer.to_str())["model"]
        self._closed = bool(model.get("unk_token") and model.get("end_of_word_suffix") == WORD_END)
        self._told: set[str] = set()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TextTokenizer":
        """Read `tokenizer.json`, and the pad id out of `config.json` where that names one.

        Raises:
          UserError: there is no tokenizer.json, or it cannot be read.
        """
        from tokenizers import Tokenizer

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no text tokenizer at {path}: expected a folder with tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"{path} is not a tokenizer of the tokenizers library: {error}"
            ) from None
        return cls(tokenizer, _configured_pad_id(folder / "config.json"))

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The whole words of a closed vocabulary, sorted; empty for an open one."""
        if not self._closed:
            return ()
        tokens = self._tokenizer.get_vocab()
        return tuple(
            sorted(
                token[len(WORD_START) : -len(WORD_END)]
                for token in tokens
                if token.startswith(WORD_START) and token.endswith(WORD_END)
            )
        )

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that a closed vocabulary does not hold."""
        if not self._closed:
            return []
        found = self._tokenizer.normalizer.normalize_str(prompt).split()
        return [word for word in dict.fromkeys(found) if word not in self._word_set]

    @functools.cached_property
    def _word_set(self) -> frozenset[str]:
        return frozenset(self.words)

    def encode(
        self, prompts: Sequence[str], max_length: int = 128, pad_to: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turn prompts into rows of ids, padded on the left.

        Args:
          prompts: B texts; '' is the unconditional prompt, a fully masked row.
          max_length: longer prompts lose their end, with a warning.
          pad_to: length L of the rows; None for the longest prompt's, at least 1.

        Returns:
          ids int32 [B, L] and mask bool [B, L], true at real tokens.
        """
        limit = max_length if pad_to is None else min(max_length, pad_to)
        rows = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
        self._warn(prompts, [len(row) for row in rows], limit)
        rows = [row[:limit] for row in rows]
        length = max([1, *map(len, rows)]) if pad_to is None else pad_to
        ids = np.full((len(rows), length), self.pad_id, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for index, row in enumerate(rows):
            if row:
                ids[index, -len(row) :] = row
                mask[index, -len(row) :] = True
        return ids, mask

    def decode(self, ids: np.ndarray, mask: np.ndarray) -> list[str]:
        """Return the texts of rows of `encode`."""
        return [
            self._tokenizer.decode(row[keep].tolist(), skip_special_tokens=False)
            for row, keep in zip(ids, mask, strict=True)
        ]

    def _warn(self, prompts: Sequence[str], lengths: Sequence[int], limit: int) -> None:
        """Say once for each prompt and each word what the model will not see."""
        for prompt, length in zip(prompts, lengths, strict=True):
            if length > limit and prompt not in self._told:
                self._told.add(prompt)
                _log.warning(
                    "a prompt of %d tokens is cut to its first %d: %r", length, limit, prompt
                )
        if not self._closed:
            return
        unknown = dict.fromkeys(word for prompt in prompts for word in self.unknown_words(prompt))
        fresh = [word for word in unknown if word not in self._told]
        if not fresh:
            return
        self._told.update(fresh)
        _log.warning(
            "this model was never shown the word%s %s",
            "s" if len(fresh) > 1 else "",
            ", ".join(self._with_nearest(word) for word in fresh),
        )

    def _with_nearest(self, word: str) -> str:
        near = difflib.get_close_matches(word, self.words, n=1)
        return f"{word!r} (nearest known: {near[0]!r})" if near else repr(word)


def _configured_pad_id(path: Path) -> int | None:
    """Return the pad id in a config.json, ours (under "text") or a language model's own."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    text = config.get("text")
    text_id = text.get("pad_token_id") if isinstance(text, dict) else None
    return config.get("pad_token_id") if text_id is None else text_id
