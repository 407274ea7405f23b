"""A folder of the user's own pictures with captions, as a data source.

Captions are in `metadata.jsonl` at the top of the folder, one JSON object a line with "file_name"
(relative to the folder) and "text" (a caption, or a list of captions); or, without that file, in
one `.txt` beside each picture, of the same name. Subfolders are read too.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from instella_jax.data.captions import decode_text
from instella_jax.data.images import SUFFIXES, is_picture, read_picture, read_size
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = ("all", "train", "heldout")


class FolderSource:
    """Pictures as they are, with their captions; random access, in the order of their names.

    `source[i]` is {"image": uint8 [h, w, 3], "texts": tuple of str}; give the loader a transform
    (`data.transforms`) that brings them to one size and picks a caption. It raises `BadSample` for
    a picture that cannot be read, which the loader skips.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        split: str = "all",
        heldout: float = 0.02,
        captions: bool = True,
        decode_side: int | None = None,
        max_pixels: int | None = None,
    ):
        """List the pictures; none is opened yet.

        Args:
          path: The folder.
          split: "train" or "heldout", disjoint parts decided by the file names, or "all".
          heldout: Part of the pictures held out, in (0, 1); at least one picture is.
          captions: Pictures need a caption; False: captions are not looked for, "texts" is ("",).
          decode_side: Large JPEGs may be decoded at a fraction of their size, as long as neither
            side falls below this many pixels: several times faster. None: at full size.
          max_pixels: Larger pictures are refused unread. Default: Pillow's limit, 89 million.

        Raises:
          UserError: no such folder, no pictures, no captions, or a broken metadata.jsonl.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        self._root = Path(path).expanduser()
        self._decode_side, self._max_pixels = decode_side, max_pixels
        self._captions = captions
        if not self._root.is_dir():
            raise UserError(f"{self._root} is not a folder; give a folder of pictures")
        entries = list_pictures(self._root)
        if captions:
            entries = self._captioned(entries)
        self._entries = _part(entries, split, heldout)

    def _captioned(
        self, entries: list[tuple[str, tuple[str, ...] | str]]
    ) -> list[tuple[str, tuple[str, ...] | str]]:
        """Leave out pictures without a caption, or refuse a folder without any."""
        found = [entry for entry in entries if entry[1]]
        if not found:
            raise UserError(
                f"{self._root} has no captions; expected metadata.jsonl with file_name and text, "
                "or a .txt file beside each picture"
            )
        if len(found) < len(entries):
            missing = next(name for name, text in entries if not text)
            logger.warning(
                "%d of %d pictures have no caption and are left out, the first is %s",
                len(entries) - len(found),
                len(entries),
                missing,
            )
        return found

    def __len__(self) -> int:
        """Return the number of pictures, broken ones included."""
        return len(self._entries)

    def __repr__(self) -> str:
        """Name the folder; grain stores this to recognise the source."""
        return f"FolderSource({str(self._root)!r}, {len(self)} pictures)"

    def name(self, index: int) -> str:
        """Return the file name of a picture, relative to the folder."""
        return self._entries[index][0]

    def decoded_at(self, decode_side: int | None) -> FolderSource:
        """Return the same source with another `decode_side`."""
        other = copy.copy(self)
        other._decode_side = decode_side
        return other

    def sizes(self) -> np.ndarray:
        """Read width and height of each picture from its header: int32 [n, 2].

        They are 0 for a picture that cannot be read.
        """

        unknown: list[str] = []

        def size(entry: tuple[str, Any]) -> tuple[int, int]:
            try:
                return read_size(self._root / entry[0], entry[0])
            except BadSample as error:
                unknown.append(str(error))
                return 0, 0

        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
            found = np.array(list(pool.map(size, self._entries)), np.int32).reshape(-1, 2)
        if unknown:
            first = min(unknown)
            logger.warning("%d pictures have no size, and no bucket: %s", len(unknown), first)
        return found

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one picture and its captions.

        Raises:
          BadSample: the picture or its caption cannot be read.
        """
        name, text = self._entries[index]
        image = read_picture(
            self._root / name, decode_side=self._decode_side, max_pixels=self._max_pixels
        )
        if not self._captions:
            text = ("",)
        return {
            "image": image,
            "texts": read_caption(self._root / text) if isinstance(text, str) else text,
        }


def list_pictures(root: Path) -> list[tuple[str, tuple[str, ...] | str]]:
    """List (picture, its captions or the name of its caption file, "" without) of a folder.

    Raises:
      UserError: there are no pictures, or metadata.jsonl is broken.
    """
    metadata = root / "metadata.jsonl"
    entries = _read_metadata(metadata) if metadata.is_file() else _scan(root)
    if not entries:
        where = metadata if metadata.is_file() else root
        raise UserError(f"{where} has no pictures; expected files ending in {', '.join(SUFFIXES)}")
    return entries


def _scan(root: Path) -> list[tuple[str, tuple[str, ...] | str]]:
    """List (picture, its caption file or "") by name, both relative to `root`."""
    entries: list[tuple[str, tuple[str, ...] | str]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        present = set(files)
        where = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in files:
            if name.startswith(".") or not is_picture(name):
                continue
            caption = os.path.splitext(name)[0] + ".txt"
            entries.append((str(where / name), str(where / caption) if caption in present else ""))
    return sorted(entries)


def _read_metadata(path: Path) -> list[tuple[str, tuple[str, ...] | str]]:
    """List (picture, its captions), in the order of the lines."""
    entries: list[tuple[str, tuple[str, ...] | str]] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    entries.append(_parse(line, f"{path}, line {number}"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    return entries


def _parse(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); expected one object a line") from None
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f'{where}: expected an object with "file_name", the name of a picture')
    if os.path.isabs(name) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise UserError(f"{where}: {name!r} leads out of the folder; keep the pictures inside it")
    text = row.get("text") or ()
    texts = (text,) if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(item, str) for item in texts):
        raise UserError(f'{where}: "text" is not a caption or a list of captions')
    return name, tuple(item.strip() for item in texts if item.strip())


def _part(entries: list[Any], split: str, heldout: float) -> list[Any]:
    """Return the entries of a split; all captions of a picture are in the same one."""
    names = {name for name, _ in entries}
    if split == "all" or len(names) < 2:
        return entries
    count = min(max(1, round(heldout * len(names))), len(names) - 1)
    ranked = sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))
    kept_out = set(ranked[:count])
    return [entry for entry in entries if (entry[0] in kept_out) == (split == "heldout")]


def read_caption(path: Path) -> tuple[str]:
    """Read the caption in a text file, on one line.

    Raises:
      BadSample: it cannot be read, or is empty.
    """
    try:
        text = " ".join(decode_text(path.read_bytes()).split())
    except (OSError, BadSample) as error:
        raise BadSample(f"caption {path}: {error}") from None
    if not text:
        raise BadSample(f"caption {path} is empty")
    return (text,)
