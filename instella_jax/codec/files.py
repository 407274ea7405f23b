"""Files of pictures to `.b1d` files, and back."""

from __future__ import annotations

import dataclasses
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from instella_jax.codec.format import SUFFIX, CodeFile, unpack
from instella_jax.codec.metadata import kept_metadata
from instella_jax.codec.pictures import Decoding, Encoding, assemble
from instella_jax.codec.streaming import Entry, Work, stream
from instella_jax.codec.tokenizer import BinaryTokenizer
from instella_jax.data.images import is_picture, read_picture, read_size
from instella_jax.data.listing import walk
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.runtime.files import printable, write_bytes

THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclasses.dataclass
class Report:
    """What became of the files.

    Attributes:
      files: one entry for each that was made.
      refused: "file" and "reason" of each other one.
    """

    files: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    refused: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def refuse(self, path: str | os.PathLike[str], reason: object) -> str:
        """Note a file that was refused, and return the sentence that says so."""
        name, text = printable(path), printable(str(reason))
        self.refused.append({"file": name, "reason": text})
        return text if name in text else f"{name}: {text}"


def is_code(name: str) -> bool:
    """Return whether a file of this name is taken for a file of bits."""
    return name.lower().endswith(SUFFIX)


def find_entries(
    inputs: Sequence[Path], takes: Callable[[str], bool], out: Path, suffix: str, report: Report
) -> Iterator[Entry]:
    """Return the files to read, with those to make.

    A folder is read at any depth, and its own folders are made again in `out`. The new name is the
    old one with another suffix; where two would share it, both keep their old suffix too.

    Args:
      inputs: files and folders.
      takes: whether a name in a folder is one of those meant.
      out: folder of the new files.
      suffix: of them.
      report: is told of what is not there.
    """
    found: list[tuple[Path, PurePath]] = []
    for path in inputs:
        if path.is_dir():
            inner = [
                PurePath(folder, name)
                for folder, names in walk(path)
                for name in names
                if takes(name)
            ]
            if not inner:
                report.refuse(path, "the folder holds no file of the kind that is read")
            found += [(path / name, name) for name in inner]
        elif path.exists():
            found.append((path, PurePath(path.name)))
        else:
            report.refuse(path, "there is no such file or folder")
    short = Counter(name.with_suffix(suffix) for _, name in found)
    taken: dict[PurePath, Path] = {}
    for path, name in found:
        target = name.with_suffix(suffix)
        if short[target] > 1:
            target = name.with_name(name.name + suffix)
        if target in taken:
            report.refuse(path, f"{out / target} is made of {printable(taken[target])} already")
            continue
        taken[target] = path
        yield Entry(path, out / target)


def encode_files(
    tokenizer: BinaryTokenizer,
    inputs: Sequence[Path],
    out: Path,
    encoding: Encoding,
    *,
    metadata: bool = True,
    force: bool = False,
    threads: int = THREADS,
    show: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Encode pictures to `.b1d` files.

    Args:
      tokenizer: what encodes them; its `batch_size` pictures or tiles at a time.
      inputs: files and folders of pictures.
      out: folder of the new files.
      encoding: how each is encoded.
      metadata: whether description, date, artist and copyright are kept.
      force: whether files that are there are replaced.
      threads: that read and write.
      show: is given how many are done, of how many.
      tell: is given a sentence for each that is refused.

    Raises:
      UserError: there is nothing to encode, or the encoding does not fit the tokenizer.
    """
    tokenizer.check_tokens(encoding.tokens)
    # A JPEG is decoded no larger than it has to be.
    decode_side = None if encoding.tile else max(map(max, tokenizer.shapes))

    def read(entry: Entry) -> Work:
        _check_target(entry, force)
        name = printable(entry.source)
        width, height = read_size(entry.source, name)
        image = read_picture(entry.source, decode_side=decode_side)
        block = kept_metadata(entry.source) if metadata else b""
        own = dataclasses.replace(encoding, metadata=block)
        file, parts = tokenizer.prepare(image, own, (height, width))
        return Work(parts.shape[1:3], file, parts)

    def dispatch(key: Any, rows: np.ndarray) -> Any:
        del key
        return tokenizer.dispatch_encode(rows)

    def finish(entry: Entry, file: CodeFile, packed: np.ndarray) -> dict[str, Any]:
        codes = unpack(packed, file.num_tokens, file.bits)[:, : file.stored]
        data = dataclasses.replace(file, codes=codes).to_bytes()
        entry.target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(entry.target, data)
        return {**_record(entry, file), "bytes": len(data)}

    report = Report()
    entries = list(find_entries(inputs, is_picture, out, SUFFIX, report))
    _run(entries, read, dispatch, finish, tokenizer.batch_size, threads, report, show, tell)
    return report


def decode_files(
    tokenizer: BinaryTokenizer,
    inputs: Sequence[Path],
    out: Path,
    decoding: Decoding,
    *,
    force: bool = False,
    threads: int = THREADS,
    show: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Decode `.b1d` files to PNG files; see `encode_files`.

    Raises:
      UserError: there is nothing to decode, or the decoding does not fit the tokenizer.
    """
    tokenizer.check_tokens(decoding.tokens)

    def read(entry: Entry) -> Work:
        _check_target(entry, force)
        file = CodeFile.from_bytes(entry.source.read_bytes())
        return Work(tokenizer.decoding_shape(file, decoding), file, tokenizer.whole(file, decoding))

    def dispatch(key: Any, rows: np.ndarray) -> Any:
        return tokenizer.dispatch_decode(rows, *key)

    def finish(entry: Entry, file: CodeFile, parts: np.ndarray) -> dict[str, Any]:
        from PIL import Image

        image = assemble(file, parts, decoding)
        content = io.BytesIO()
        options: dict[str, Any] = {"exif": file.metadata} if file.metadata else {}
        Image.fromarray(image).save(content, "PNG", **options)
        entry.target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(entry.target, content.getvalue())
        return {**_record(entry, file), "height": image.shape[0], "width": image.shape[1]}

    report = Report()
    entries = list(find_entries(inputs, is_code, out, ".png", report))
    _run(entries, read, dispatch, finish, tokenizer.batch_size, threads, report, show, tell)
    return report


def _check_target(entry: Entry, force: bool) -> None:
    if not force and os.path.lexists(entry.target):
        raise BadSample(f"{printable(entry.target)} is there already: --force replaces it")


def _record(entry: Entry, file: CodeFile) -> dict[str, Any]:
    return {
        "file": printable(entry.source),
        "out": printable(entry.target),
        "height": file.height,
        "width": file.width,
        "tiles": file.tiles,
        "tokens": file.stored,
        "bits": file.bits,
    }


def _run(
    entries: Sequence[Entry],
    read: Callable[[Entry], Work],
    dispatch: Callable[[Any, np.ndarray], Any],
    finish: Callable[[Entry, Any, np.ndarray], dict[str, Any]],
    batch_size: int,
    threads: int,
    report: Report,
    show: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> None:
    for missing in report.refused:
        tell(f"{missing['file']}: {missing['reason']}")
    if not entries:
        reasons = [f"{missing['file']}: {missing['reason']}" for missing in report.refused]
        raise UserError(f"there is nothing to do: {'; '.join(reasons[:3])}")
    found = stream(entries, read, dispatch, finish, batch_size=batch_size, threads=threads)
    for done, (entry, outcome) in enumerate(found, 1):
        if isinstance(outcome, Exception):
            tell(report.refuse(entry.source, _reason(outcome)))
        else:
            report.files.append(outcome)
        show(done, len(entries))
    # As they were given, not as they were done.
    order = {printable(entry.source): number for number, entry in enumerate(entries)}
    report.files.sort(key=lambda record: order[record["file"]])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    return str(error)
