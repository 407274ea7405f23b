"""A folder of the user's own pictures with captions, as a data source; see `data.listing`."""

from __future__ import annotations

import copy
import logging
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.data.images import read_picture, read_size
from instella_jax.data.listing import WAYS, Entry, Listing, list_pictures, read_captions
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.runtime.files import printable

logger = logging.getLogger(__name__)

SPLITS = ("all", "train", "heldout")


class FolderSource:
    """Pictures as they are, with their captions; random access, in the order of their names.

    `source[i]` is {"image": uint8 [h, w, 3], "texts": tuple of str}; give the loader a transform
    (`data.transforms`) that brings them to one size and picks a caption. It raises `BadSample` for
    a picture that cannot be read, which the loader skips. `source.entries[i]` names its file.
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
          UserError: no such folder, no pictures, no captions, or a broken metadata file.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        self._root = Path(path).expanduser()
        self._decode_side, self._max_pixels = decode_side, max_pixels
        self._captions = captions
        if not self._root.is_dir():
            raise UserError(f"{self._root} is not a folder; give a folder of pictures")
        listing = list_pictures(self._root)
        entries = self._captioned(listing) if captions else listing.entries
        self.entries = _part(entries, split, heldout)

    def _captioned(self, listing: Listing) -> list[Entry]:
        """Leave out pictures without a caption, or refuse a folder without any."""
        entries = listing.entries
        found = [entry for entry in entries if entry.texts or entry.files]
        if not found:
            raise UserError(f"{self._root} has no captions, only {listing.seen()}; expected {WAYS}")
        if len(found) < len(entries):
            missing = next(entry for entry in entries if not (entry.texts or entry.files))
            logger.warning(
                "%d of %d pictures have no caption and are left out, the first is %s",
                len(entries) - len(found),
                len(entries),
                printable(missing.name),
            )
        return found

    def __len__(self) -> int:
        """Return the number of pictures, broken ones included."""
        return len(self.entries)

    def __repr__(self) -> str:
        """Name the folder; grain stores this to recognise the source."""
        return f"FolderSource({str(self._root)!r}, {len(self)} pictures)"

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

        def size(entry: Entry) -> tuple[int, int]:
            try:
                return read_size(self._root / entry.name, printable(entry.name))
            except BadSample as error:
                unknown.append(str(error))
                return 0, 0

        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
            found = np.array(list(pool.map(size, self.entries)), np.int32).reshape(-1, 2)
        if unknown:
            first = min(unknown)
            logger.warning("%d pictures have no size, and no bucket: %s", len(unknown), first)
        return found

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one picture and its captions.

        Raises:
          BadSample: the picture or its caption cannot be read.
        """
        entry = self.entries[index]
        image = read_picture(
            self._root / entry.name, decode_side=self._decode_side, max_pixels=self._max_pixels
        )
        return {"image": image, "texts": self._texts(entry) if self._captions else ("",)}

    def _texts(self, entry: Entry) -> tuple[str, ...]:
        files = " and ".join(printable(self._root / file) for file in entry.files)
        try:
            texts, _ = read_captions(self._root, entry)
        except BadSample as error:
            raise BadSample(f"{error}: {files}") from None
        if not texts:
            raise BadSample(f"{printable(entry.name)} has no caption: {files} is empty")
        return texts


def _part(entries: list[Entry], split: str, heldout: float) -> list[Entry]:
    """Return the entries of a split; all captions of a picture are in the same one."""
    names = {entry.name for entry in entries}
    if split == "all" or len(names) < 2:
        return entries
    count = min(max(1, round(heldout * len(names))), len(names) - 1)
    ranked = sorted(names, key=lambda name: (zlib.crc32(os.fsencode(name)), name))
    kept_out = set(ranked[:count])
    return [entry for entry in entries if (entry.name in kept_out) == (split == "heldout")]
