"""What is in a folder of pictures: the pictures, and where the captions of each are.

Subfolders are read too, and folders that links lead to. Captions are in

- `metadata.jsonl`, `.csv` or `.parquet`, in the folder or in those of its splits, a row for each
  picture: "file_name", relative to that file, and "text" or another of `CAPTION_KEYS`;
- files beside a picture, of its name with its own suffix or without: `.txt` and `.caption` (a
  caption a line), `.json` (an object with `CAPTION_KEYS`);
- the names of folders, one for each class, where there are no captions at all.
"""

from __future__ import annotations

import csv
import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from instella_jax.data.captions import (
    BROKEN_CAPTION,
    CAPTION_KEYS,
    caption_lines,
    captions,
    label_caption,
    named,
    read_json,
)
from instella_jax.data.images import SUFFIXES, is_other_picture, is_picture
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.runtime.files import printable

logger = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
UNLISTED = "not in the metadata file"
_BESIDE = (".txt", ".caption", ".json")
# Names of folders that are no classes.
_NO_CLASSES = {
    "train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "data",
    "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos",
}  # fmt: skip
WAYS = (
    "metadata.jsonl, metadata.csv or metadata.parquet with file_name and text, a .txt, .caption or "
    ".json file of the same name beside each picture, or a folder for each class"
)


class Entry(NamedTuple):
    """A picture: its path in the folder, captions that are known, and files that captions are in.

    `left_out` says why it is not read, "" if it is; `meta` has the columns of a metadata file that
    were asked for. A byte of a name that is not UTF-8 is kept as
    Python keeps it, by half of a surrogate pair.
    """

    name: str
    texts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    left_out: str = ""
    meta: tuple[tuple[str, Any], ...] = ()


class Listing(NamedTuple):
    """The pictures of a folder, and those that the metadata file above them does not list."""

    entries: list[Entry]
    unlisted: list[str]
    kinds: Counter[str]

    def seen(self) -> str:
        """Say which files there are."""
        return ", ".join(f"{number} {kind}" for kind, number in self.kinds.most_common(8))


def list_pictures(
    root: Path, keys: Sequence[str] = CAPTION_KEYS, columns: Sequence[str] = ()
) -> Listing:
    """List the pictures of a folder; none is opened.

    What is left out, and captions made from the names of folders, are logged.

    Args:
      root: the folder.
      keys: columns of metadata files that captions are in.
      columns: other columns of them that are wanted.

    Raises:
      UserError: there are no pictures, or a metadata file is broken.
    """
    tree = dict(walk(root))
    listed: list[Entry] = []
    beside: list[Entry] = []
    unlisted: list[str] = []
    kinds: Counter[str] = Counter()
    covered: dict[str, set[str] | None] = {}
    for folder, files in tree.items():
        above = None if folder == "." else covered[str(PurePosixPath(folder).parent)]
        if table := next((name for name in METADATA if name in files), None):
            rows = list(_read_metadata(root, PurePosixPath(folder, table), keys, columns))
            listed += rows
            above = {row.name for row in rows} | (above or set())
        covered[folder] = above
        kinds.update(os.path.splitext(name)[1].lower() or name for name in files)
        pictures = [name for name in files if is_picture(name)]
        if above is not None:
            paths = (str(PurePosixPath(folder, name)) for name in pictures)
            unlisted += [path for path in paths if path not in above]
        else:
            beside += _beside(folder, files, pictures)
    listed = [_with_json(entry, tree) for entry in listed]
    entries = listed + _classes(root, sorted(beside), bool(listed))
    if not entries:
        tables = [
            str(PurePosixPath(f, n)) for f, names in tree.items() for n in names if n in METADATA
        ]
        where = root / tables[0] if tables else root
        raise UserError(f"{where} has no pictures; expected files ending in {', '.join(SUFFIXES)}")
    listing = Listing(entries, unlisted, kinds)
    _tell(root, listing, [name for names in tree.values() for name in names])
    return listing


def walk(root: Path, *, hidden: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, its files) by name, parents first, each folder once.

    Links are followed out of the root; within it, folders are read where they are. What is hidden
    is left out, or with `hidden` is among the files, folders too: these are not entered.
    """
    inside = os.path.join(os.path.realpath(root), "")
    been = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, followlinks=True):
        found = files + [name for name in folders if name.startswith(".")]
        into = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            path = os.path.join(folder, name)
            target = os.path.realpath(path)
            around = os.path.join(target, "")
            linked = os.path.islink(path)
            if target in been or (
                linked and (around.startswith(inside) or inside.startswith(around))
            ):
                continue
            been.add(target)
            into.append(name)
        folders[:] = into
        where = Path(folder).relative_to(root).as_posix()
        yield where, sorted(found if hidden else (n for n in found if not n.startswith(".")))


def _with_json(entry: Entry, tree: Mapping[str, list[str]]) -> Entry:
    """Add the `.json` files beside a picture of a metadata file, if there are any."""
    path = PurePosixPath(entry.name)
    names = (path.stem + ".json", path.name + ".json")
    present = tree.get(str(path.parent), ())
    return entry._replace(files=tuple(str(path.with_name(n)) for n in names if n in present))


def _beside(folder: str, files: Iterable[str], pictures: Iterable[str]) -> Iterator[Entry]:
    present = set(files)
    for name in pictures:
        stems = os.path.splitext(name)[0], name
        names = (stem + suffix for suffix in _BESIDE for stem in stems)
        found = (file for file in names if file in present)
        where = PurePosixPath(folder)
        yield Entry(str(where / name), (), tuple(str(where / file) for file in found))


def _classes(root: Path, entries: list[Entry], listed: bool) -> list[Entry]:
    """Make captions of the names of folders if there are several, and no captions."""
    if listed or any(entry.files for entry in entries):
        return entries
    parents = {entry.name: PurePosixPath(entry.name).parent.name for entry in entries}
    names = {
        name for name in parents.values()
        if name.lower() not in _NO_CLASSES and any(map(str.isalpha, name))
    }  # fmt: skip
    if len(names) < 2:
        return entries
    _log_once(
        f"{printable(root)} has no captions: they are made from the names of {len(names)} folders, "
        f'such as "{label_caption(printable(min(names)))}"'
    )
    return [
        entry._replace(texts=(label_caption(printable(parents[entry.name])),))
        if parents[entry.name] in names
        else entry
        for entry in entries
    ]


def _tell(root: Path, listing: Listing, names: Iterable[str]) -> None:
    """Log what is left out of a listing."""
    if listing.unlisted:
        _log_once(
            f"{len(listing.unlisted)} pictures of {printable(root)} are left out, as the metadata "
            f"file above them does not list them; the first is {printable(listing.unlisted[0])}"
        )
    kinds = Counter(os.path.splitext(name)[1].lower() for name in names if is_other_picture(name))
    if kinds:
        found = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        _log_once(
            f"pictures of {printable(root)} in formats that are not read are left out: {found}"
        )


@functools.cache
def _log_once(message: str) -> None:
    """Log what each process would otherwise log for every split."""
    logger.warning("%s", message)


def _read_metadata(
    root: Path, table: PurePosixPath, keys: Sequence[str], columns: Sequence[str]
) -> Iterator[Entry]:
    """Yield the pictures of a metadata file, in the order of its rows."""
    path = root / table
    rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    try:
        for where, row in rows(path):
            entry = _entry(row, f"{printable(path)}, {where}", keys, columns)
            yield entry._replace(name=str(table.parent / entry.name))
    except (UnicodeDecodeError, BadSample):
        raise UserError(f"{printable(path)} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({error.strerror})") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    reason = getattr(error, "msg", "nested too deeply")
                    raise UserError(
                        f"{printable(path)}, line {number}: not JSON ({reason}); expected one "
                        "object a line"
                    ) from None


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        try:
            for row in rows:
                yield f"line {rows.line_num}", row
        except csv.Error as error:
            raise UserError(
                f"{printable(path)}, line {rows.line_num}: not CSV ({error}); expected a line of "
                "names, file_name among them, and a line for each picture"
            ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows))
    except ArrowException as error:
        line = str(error).splitlines()[0][:200]
        raise UserError(
            f"{printable(path)} is not a whole Parquet file ({line}); copy it again"
        ) from None


def _entry(row: Any, where: str, keys: Sequence[str], columns: Sequence[str]) -> Entry:
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        has = f", found {', '.join(map(str, row))}" if isinstance(row, dict) and row else ""
        raise UserError(f'{where}: expected an object with "file_name", the name of a picture{has}')
    if os.path.isabs(name) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise UserError(f"{where}: {name!r} leads out of the folder; keep the pictures inside it")
    for key in named(row, keys):
        text = row[key] or ()
        texts = (text,) if isinstance(text, str) else text
        if not isinstance(texts, Sequence) or not all(isinstance(item, str) for item in texts):
            raise UserError(f'{where}: "{key}" is not a caption or a list of captions')
    meta = tuple((column, row[column]) for column in named(row, columns))
    return Entry(name, captions(row, keys), meta=meta)


def read_captions(
    root: Path, entry: Entry, keys: Sequence[str] = CAPTION_KEYS
) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Read the captions of a picture, and what else is in its JSON file.

    Raises:
      BadSample: a file cannot be read; its message is `BROKEN_CAPTION` or `BROKEN_JSON`.
    """
    texts, meta = list(entry.texts), dict(entry.meta)
    for file in entry.files:
        try:
            data = (root / file).read_bytes()
        except OSError:
            raise BadSample(BROKEN_CAPTION) from None
        if file.endswith(".json"):
            found = read_json(data)
            meta |= found
            texts += captions(found, keys)
            continue
        texts += caption_lines(data)
    return captions({"text": texts}, ("text",)), meta
