"""Prompts to token ids: the only module that touches a text tokenizer."""

import difflib
import functools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from instella_jax.errors import UserError
from instella_jax.runtime.files import write_json

DEMO_FOLDER = Path(__file__).parents[1] / "assets" / "demo_text"
# How the demo's vocabulary marks the start and the end of a word.
WORD_START, WORD_END = "▁", "</w>"
_PAD_TOKENS = ("[PAD]", "<|padding|>", "<pad>", "<|endoftext|>")
# What a folder says of its tokenizer beside the tokenizer itself.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Vocabularies of folders from before tokenizer.json.
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
# After so many, warnings come only when their number has grown tenfold.
_REPORTED_ALONE = 10

_log = logging.getLogger(__name__)
# The training loader encodes in a thread of its own.
_lock = threading.Lock()


class TextTokenizer:
    """A `tokenizers` tokenizer with the padding and truncation of published models.

    Rows are padded on the left, cut at their end, and get no begin token, whatever the tokenizer's
    own settings say.

    Attributes:
      vocab_size: the highest id, of a token or the padding, + 1.
      pad_id: the id that fills masked positions.
      folder: where it was read from, None for nowhere.
    """

    def __init__(self, tokenizer: Any, pad_id: int | None = None, folder: Path | None = None):
        """Wrap a `tokenizers.Tokenizer`; without a pad id it is looked up in the vocabulary."""
        self.folder = folder
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        if pad_id is None:
            ids = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
            pad_id = next((number for number in ids if number is not None), 0)
        assert pad_id is not None
        self.pad_id = pad_id
        self.vocab_size = 1 + max(pad_id, *tokenizer.get_vocab().values())
        # Only a closed vocabulary of whole words can tell that it does not know a word.
        model = json.loads(tokenizer.to_str())["model"]
        self._closed = bool(model.get("unk_token") and model.get("end_of_word_suffix") == WORD_END)
        self._unknown_id = tokenizer.token_to_id(model["unk_token"]) if self._closed else None
        self._unknown: set[str] = set()
        self._texts = self._cut = 0
        self._cut_reported: set[str] = set()
        self._next_unknown = self._next_cut = _REPORTED_ALONE

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TextTokenizer":
        """Read the text tokenizer of a folder, without network and without code of the folder's.

        The pad id is the one of our `config.json`, of the tokenizer's own settings, or of a
        language model's `config.json`, the first of these that names one.

        Raises:
          UserError: there is no text tokenizer, or it cannot be read.
        """
        folder = Path(folder)
        tokenizer, own = _read_tokenizer(folder)
        ours, language = _configured_pad_ids(folder / "config.json")
        named = (number for number in (ours, own, language) if number is not None)
        return cls(tokenizer, next(named, None), folder)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder, which is made, so that `from_folder` reads it.

        Raises:
          UserError: it was not read from a folder, or that cannot be read any more.
        """
        if self.folder is None:
            raise UserError("this text tokenizer was read from no folder, so there is none to copy")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in tokenizer_files(self.folder).items():
            (folder / name).write_bytes(content)
        write_json(folder / "config.json", {"pad_token_id": self.pad_id})

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
        """Return the words of a prompt that a closed vocabulary does not hold whole."""
        if not self._closed:
            return []
        found = self._tokenizer.normalizer.normalize_str(prompt).split()
        return [word for word in dict.fromkeys(found) if word not in self._word_set]

    @functools.cached_property
    def _word_set(self) -> frozenset[str]:
        return frozenset(self.words)

    def encode(
        self, prompts: Sequence[str], max_length: int = 128, pad_to: int | None = None
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Turn prompts into rows of ids, padded on the left.

        Args:
          prompts: B texts; '' is the unconditional prompt, a fully masked row.
          max_length: longer prompts lose their end, which is counted and told.
          pad_to: length L of the rows; None for the longest prompt's, at least 1.

        Returns:
          ids, and a mask that is true at real tokens.
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

    def decode(self, ids: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B L"]) -> list[str]:
        """Return the texts of rows of `encode`."""
        return [
            self._tokenizer.decode(row[keep].tolist(), skip_special_tokens=False)
            for row, keep in zip(ids, mask, strict=True)
        ]

    def _warn(self, prompts: Sequence[str], lengths: Sequence[int], limit: int) -> None:
        """Say what the model does not see as it was written; the more there is, the rarer."""
        with _lock:
            self._warn_of_length(prompts, lengths, limit)
            if self._closed:
                self._warn_of_words(prompts)

    def _warn_of_length(self, prompts: Sequence[str], lengths: Sequence[int], limit: int) -> None:
        cut = [(text, n) for text, n in zip(prompts, lengths, strict=True) if n > limit]
        self._texts += len(prompts)
        self._cut += len(cut)
        fresh = [pair for pair in cut if pair[0] not in self._cut_reported]
        if not fresh or (len(self._cut_reported) >= _REPORTED_ALONE and self._cut < self._next_cut):
            return
        self._next_cut = 10 * max(self._cut, self._next_cut)
        self._cut_reported.update(text for text, _ in fresh[:_REPORTED_ALONE])
        text, length = fresh[0]
        _log.warning(
            "%d of %d texts have more than %d tokens and lose their end, such as %r with %d tokens",
            self._cut, self._texts, limit, _shortened(text), length,
        )  # fmt: skip

    def _warn_of_words(self, prompts: Sequence[str]) -> None:
        words = dict.fromkeys(word for prompt in prompts for word in self.unknown_words(prompt))
        fresh = [word for word in words if word not in self._unknown]
        before = len(self._unknown)
        self._unknown.update(fresh)
        named = fresh[: max(_REPORTED_ALONE - before, 0)]
        if not fresh or (not named and len(self._unknown) < self._next_unknown):
            return
        if len(self._unknown) >= _REPORTED_ALONE:
            self._next_unknown = 10 * len(self._unknown)
        number = len(fresh) if named else len(self._unknown)
        listed = ", ".join(map(self._described, named or fresh[:1]))
        more = number - len(named or fresh[:1])
        _log.warning(
            "%d word%s not in this model's vocabulary and spelled in pieces: %s%s",
            number, "s are" if number > 1 else " is", listed, f" and {more} more" if more else "",
        )  # fmt: skip

    def _described(self, word: str) -> str:
        near = difflib.get_close_matches(word, self.words, n=1)
        hint = f" (nearest known: {near[0]!r})" if near else ""
        if self._unknown_id in self._tokenizer.encode(word, add_special_tokens=False).ids:
            hint += " (without the characters that it lacks)"
        return f"{_shortened(word)!r}{hint}"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:79]}…"


def _read_tokenizer(folder: Path) -> tuple[Any, int | None]:
    """Return a `tokenizers.Tokenizer`, and the pad id of its settings."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            raise UserError(f"no text tokenizer at {path}: expected a folder with tokenizer.json")
        return _unwrapped(_read_pretrained("AutoTokenizer", folder))
    if any((folder / name).is_file() for name in _SETTINGS):
        # AutoTokenizer would build the class that the settings name anew, with what that class
        # does before and after; the file holds what the model was trained with.
        return _unwrapped(_read_pretrained("PreTrainedTokenizerFast", folder))
    # The file says everything, so the second that transformers takes to import can be spared.
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)), None
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer of the tokenizers library: {error}") from None


def _read_pretrained(kind: str, folder: Path) -> Any:
    """Return the tokenizer of a folder as transformers reads it."""
    # On import it advises to install torch, which no tokenizer needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the many kinds of tokenizers raise
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} has a text tokenizer that cannot be read: {line}") from None


def _unwrapped(pretrained: Any) -> tuple[Any, int | None]:
    tokenizer = getattr(pretrained, "backend_tokenizer", None)
    if tokenizer is None:
        raise UserError(
            f"the text tokenizer {type(pretrained).__name__} has no form as tokenizer.json: "
            "convert it to one of the tokenizers library"
        )
    tokenizer.encode_special_tokens = pretrained.split_special_tokens
    return tokenizer, pretrained.pad_token_id


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return what a copy of a folder's text tokenizer consists of: contents by file name.

    A folder from before `tokenizer.json` is converted.

    Raises:
      UserError: there is no text tokenizer, or it cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        paths = [folder / name for name in ("tokenizer.json", *_SETTINGS)]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    _read_tokenizer(folder)
    pretrained = _read_pretrained("AutoTokenizer", folder)
    with tempfile.TemporaryDirectory() as scratch:
        pretrained.save_pretrained(scratch)
        return tokenizer_files(Path(scratch))


def _configured_pad_ids(path: Path) -> tuple[int | None, int | None]:
    """Return the pad ids that a config.json has under "text", ours, and a language model's own."""
    if not path.is_file():
        return None, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    text = config.get("text")
    ours = text.get("pad_token_id") if isinstance(text, dict) else None

    def checked(number: Any) -> int | None:
        return number if isinstance(number, int) and number >= 0 else None  # -1 is none for some

    return checked(ours), checked(config.get("pad_token_id"))
