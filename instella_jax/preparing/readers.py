"""What `data import` reads: webdataset tars, parquet files, TFDS data sets, folders.

`find_units` cuts a data set into units, `read_unit` yields what is in one. Nothing is unpacked to
disk, and nothing of a file is trusted: what cannot be read is yielded as a `Problem`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from instella_jax.data.captions import CAPTION_KEYS
from instella_jax.data.images import is_picture
from instella_jax.data.listing import METADATA, UNLISTED, Entry, list_pictures, read_captions, walk
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.preparing.items import (
    MAX_BYTES,
    WATERMARK,
    Item,
    NotRead,
    Problem,
    is_hidden,
    kind_of,
)
from instella_jax.runtime.files import printable

logger = logging.getLogger(__name__)

KINDS = ("webdataset", "parquet", "tfds", "folder")


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of the input that is read at one go.

    Attributes:
      name: tells it, and its version, from the others.
      kind: one of `KINDS`.
      path: a file, or the folder of the whole data set.
      rows: its part of that: (start, stop) of a TFDS split, or the entries of a folder.
      split: of a TFDS data set.
      pictures: how many it has, 0 where that is not known before it is read.
      root: folder of the data set that a file belongs to.
      left_out: why the whole of it is left out; "" if it is read.
    """

    name: str
    kind: str
    path: str
    rows: tuple[Any, ...] = ()
    split: str = ""
    pictures: int = 0
    root: str = ""
    left_out: str = ""


def find_units(
    path: str | os.PathLike[str],
    kind: str = "auto",
    *,
    split: str = "train",
    size: int = 10_000,
    caption_keys: Sequence[str] = CAPTION_KEYS,
) -> list[Unit]:
    """Cut a data set into units: tar and parquet files as they are, else `size` pictures each.

    Args:
      path: a file, or a folder that is searched with its subfolders.
      kind: one of `KINDS`, or "auto".
      split: which part of a TFDS data set, or of parquet files that are named by their splits;
        "all" is every one of the latter.
      size: pictures in a unit.
      caption_keys: columns of a folder's metadata file that captions are in.

    Raises:
      UserError: there is nothing of the kind.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{root} does not exist; give the file or folder to import")
    kind = _guess(root) if kind == "auto" else kind
    if kind in _SUFFIXES:
        files = _files(root, kind)
        if not files:
            raise UserError(f"{root} has no {kind} files ({', '.join(_SUFFIXES[kind])})")
        base = root if root.is_dir() else root.parent
        others: dict[Path, str] = {}
        if kind == "parquet" and root.is_dir():
            others = _of_other_splits(root, files, split)
        units = []
        for file in files:
            name = f"{file.relative_to(base)} ({file.stat().st_size} bytes)"
            left_out = f"of split {others[file]}" if file in others else ""
            name += f", {left_out}" if left_out else ""
            units.append(Unit(name, kind, str(file), root=str(base), left_out=left_out))
        return units
    if kind == "tfds":
        from instella_jax.preparing.tfds_reader import count_examples

        total = count_examples(root, split)
        ranges = [(start, min(start + size, total)) for start in range(0, total, size)]
        return [Unit(f"{split}[{a}:{b}]", kind, str(root), (a, b), split, b - a) for a, b in ranges]
    if kind == "folder":
        listing = list_pictures(root, caption_keys, (WATERMARK,))
        entries = listing.entries + [Entry(name, left_out=UNLISTED) for name in listing.unlisted]
        units = []
        for start in range(0, len(entries), size):
            rows = tuple(entries[start : start + size])
            digest = zlib.crc32(repr(rows).encode())
            name = f"{printable(rows[0].name)} and {len(rows)} ({digest:08x})"
            units.append(Unit(name, kind, str(root), rows, pictures=len(rows)))
        return units
    raise UserError(f"unknown kind {kind!r}; expected auto, {', '.join(KINDS)}")


def find_all(
    paths: Sequence[Path],
    kind: str = "auto",
    *,
    split: str = "train",
    size: int = 10_000,
    without: str | os.PathLike[str] | None = None,
    caption_keys: Sequence[str] = CAPTION_KEYS,
) -> tuple[list[Unit], list[NotRead]]:
    """Return the units of several inputs, each once, and the files that belong to none.

    Args:
      paths: files or folders.
      kind: see `find_units`.
      split: see `find_units`.
      size: see `find_units`.
      without: a folder that is not part of the input where it is inside of it.
      caption_keys: see `find_units`.

    Raises:
      UserError: see `find_units`.
    """
    units: dict[tuple[Any, ...], Unit] = {}
    others: dict[str, NotRead] = {}
    for path in paths:
        found = find_units(path, kind, split=split, size=size, caption_keys=caption_keys)
        for unit in found:
            name = unit.name if len(paths) == 1 else f"{path}: {unit.name}"
            part = (unit.kind, os.path.abspath(unit.path), unit.rows, unit.split)
            units.setdefault(part, dataclasses.replace(unit, name=name))
        if path.is_dir() and found:
            others.update((os.path.abspath(path / o.name), o) for o in _others(path, found))
    for unit in units.values():
        others.pop(os.path.abspath(unit.path), None)
    inside = os.path.join(os.path.abspath(without), "") if without else None
    return list(units.values()), [
        other for path, other in others.items() if not (inside and path.startswith(inside))
    ]


def _others(root: Path, units: Sequence[Unit]) -> Iterator[NotRead]:
    """Yield the files of a folder that belong to no unit."""
    if units[0].kind == "tfds":
        return
    used = set()
    for unit in units:
        if unit.kind != "folder":
            used.add(os.path.relpath(unit.path, root))
        else:
            used.update(name for entry in unit.rows for name in (entry.name, *entry.files))
    metadata = METADATA if units[0].kind == "folder" else ()
    for name in _walk(root):
        if name not in used and os.path.basename(name) not in metadata:
            yield NotRead(printable(name), kind_of(name))


_SUFFIXES = {
    "webdataset": (
        ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz",
        ".tar.zst", ".tar.zstd", ".tzst",
    ),
    "parquet": (".parquet",),
}  # fmt: skip


def _walk(root: Path) -> Iterator[str]:
    """Yield the files of a folder, relative to it; of what is hidden the folders too, unopened."""
    for folder, files in walk(root, hidden=True):
        yield from (str(PurePosixPath(folder, name)) for name in files)


def _is_a(name: str, kind: str) -> bool:
    wanted = name.lower().endswith(_SUFFIXES[kind]) and not is_hidden(name)
    return wanted and os.path.basename(name) not in METADATA


def _files(root: Path, kind: str) -> list[Path]:
    if root.is_file():
        return [root]
    found = (root / name for name in _walk(root) if _is_a(name, kind))
    return sorted(path for path in found if path.is_file())


_SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


def _split_of(file: Path) -> str:
    """Return the split that a file is named by, as `train-00000-of-00005.parquet` or
    `test/0000.parquet` are; "" for none."""
    for part in (file.name, *reversed(file.parts[:-1])):
        word = re.match(r"[A-Za-z]*", part)
        whole = word and re.match(r"[-_.]|$", part[word.end() :])
        if word and whole and (split := _SPLITS.get(word[0].lower())):
            return split
    return ""


def _of_other_splits(root: Path, files: Sequence[Path], wanted: str) -> dict[Path, str]:
    """Return the files that are not of a split, with their own splits.

    Raises:
      UserError: there is no file of it.
    """
    splits = {file: _split_of(file.relative_to(root)) for file in files}
    known = sorted({split for split in splits.values() if split})
    wanted = _SPLITS.get(wanted, wanted)
    if wanted == "all" or (not known and wanted == "train"):
        return {}
    if wanted not in known:
        there = f"only {', '.join(known)}" if known else "its files are not named by splits"
        raise UserError(
            f"{root} has no split {wanted!r}, {there}; choose one by --split, or all of them by "
            "--split=all"
        )
    others = {file: split or "none" for file, split in splits.items() if split != wanted}
    if others:
        logger.warning(
            "of %s only the split %s is read (%d of %d files); --split chooses another, or all",
            root, wanted, len(files) - len(others), len(files),
        )  # fmt: skip
    return others


def _left_out(unit: Unit) -> Iterator[Problem]:
    """Count the rows of a parquet file that is not read."""
    from instella_jax.preparing.parquet_reader import count_rows

    rows = count_rows(unit.path)
    if rows is None:
        yield Problem(unit.path, "damaged parquet file", of_file=True)
    elif rows:
        yield Problem(unit.path, unit.left_out, count=rows)


def _guess(root: Path) -> str:
    if (
        root.is_dir()
        and (root / "dataset_info.json").is_file()
        and (root / "features.json").exists()
    ):
        return "tfds"
    names = [root.name] if root.is_file() else list(_walk(root))
    for kind in _SUFFIXES:
        if any(_is_a(name, kind) for name in names):
            return kind
    if root.is_dir() and any(is_picture(name) for name in names):
        return "folder"
    readable = ", ".join(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
    if root.is_file():
        raise UserError(
            f"{root} is neither a tar nor a parquet file; give one ({readable}), or a folder"
        )
    kinds = Counter(map(kind_of, names)).most_common(5)
    found = ", ".join(f"{kind} {number}" for kind, number in kinds) or "nothing"
    raise UserError(
        f"{root} has no pictures and no files to read them from ({readable}), but {found}"
    )


def read_unit(
    unit: Unit, caption_keys: Sequence[str] = CAPTION_KEYS, image_key: str = ""
) -> Iterator[Item | Problem | NotRead]:
    """Yield what is in a unit, in its order.

    Args:
      unit: see `find_units`.
      caption_keys: columns, JSON keys or features that captions are in; all that are there count.
      image_key: the column or feature of the picture; "" for the usual names.
    """
    keys = tuple(caption_keys)
    if unit.kind == "webdataset":
        from instella_jax.preparing.tar_reader import read_tar

        return read_tar(unit.path, keys)
    if unit.kind == "parquet":
        from instella_jax.preparing.parquet_reader import read_parquet

        if unit.left_out:
            return _left_out(unit)
        return read_parquet(unit.path, keys, image_key, unit.root)
    if unit.kind == "tfds":
        from instella_jax.preparing.tfds_reader import read_tfds

        start, end = unit.rows
        return read_tfds(unit.path, unit.split, start, end, keys, image_key)
    return _read_folder(unit, keys)


def _read_folder(unit: Unit, keys: tuple[str, ...]) -> Iterator[Item | Problem]:
    root = Path(unit.path)
    for entry in unit.rows:
        path, name = root / entry.name, printable(entry.name)
        if entry.left_out:
            yield Problem(name, entry.left_out)
            continue
        try:
            if path.stat().st_size > MAX_BYTES:
                yield Problem(name, "file too large")
                continue
            image = path.read_bytes()
            texts, meta = read_captions(root, entry, keys)
        except OSError:
            yield Problem(name, "file cannot be read")
        except BadSample as reason:
            yield Problem(name, str(reason))
        else:
            seen = (*dict.fromkeys(PurePosixPath(file).suffix for file in entry.files), *meta)
            yield Item(name, image, texts, meta, seen)
