"""Webdataset shards: tar files in which files of one name are a picture and what goes with it.

`000123.jpg`, `000123.txt` (a caption) and `000123.json` (captions and columns) are one sample,
wherever in the tar they are, and so are `000123.jpg` and `000123.jpg.json`: headers are read first,
and contents by their place then. Memory holds about 1 KB a sample, one picture, and, of a
compressed tar, up to 64 MiB of captions, the rest of which waits in a temporary file. A damaged tar
is read past the damage, as far as there are headers to go by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import lzma
import os
import posixpath
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from instella_jax.data.captions import caption_lines, captions, read_json
from instella_jax.data.images import is_picture
from instella_jax.data.samples import BadSample
from instella_jax.errors import UserError
from instella_jax.preparing.decompression import decompressed
from instella_jax.preparing.items import (
    MAX_BYTES,
    UNPAIRED,
    Item,
    NotRead,
    Problem,
    is_hidden,
    kind_of,
)
from instella_jax.runtime.files import printable

_TEXTS = (".txt", ".caption")
_SIDECARS = (*_TEXTS, ".json")
_BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)
_DAMAGED = "damaged tar"
# Headers are read in one sweep: small pictures between them are not worth a seek each.
_SWEEP = 4 * 2**20
_TEXTS_IN_MEMORY = 64 * 2**20
_MAX_LINKS = 8


def read_tar(path: str, keys: Sequence[str]) -> Iterator[Item | Problem | NotRead]:
    """Yield the samples of a tar file, compressed or not.

    Each picture is yielded once, as an item or as a problem; so is each caption without a picture,
    and each other file.

    Args:
      path: of the file.
      keys: JSON keys that captions are in.

    Raises:
      UserError: the file is not there, or captions find no room in the temporary folder.
    """
    contents = _Contents(path)
    try:
        yield from _read(contents, keys)
    finally:
        contents.close()


def _read(contents: _Contents, keys: Sequence[str]) -> Iterator[Item | Problem | NotRead]:
    samples: list[_Sample] = []
    index = _Index()
    for found in contents.files():
        if found is None:
            yield from index.finish(samples)
            index = _Index()
        elif isinstance(found, _File):
            yield from index.add(found)
        else:
            yield found
    yield from index.finish(samples)
    # A compressed tar can only be read forwards.
    samples.sort(key=lambda sample: sample.pictures[0].start)
    for sample in samples:
        yield _item(sample, contents, keys)


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """A file in a tar.

    Attributes:
      name: its path.
      start: where its content begins: in the tar, or in the store of captions.
      size: in bytes.
      stored: whether it is in that store.
      link: path of the file that it is a link to, "" for one with a content of its own.
    """

    name: str
    start: int = 0
    size: int = 0
    stored: bool = False
    link: str = ""


@dataclasses.dataclass(slots=True)
class _Sample:
    """What has one name but for the suffix; the captions by suffix."""

    name: str
    pictures: list[_File] = dataclasses.field(default_factory=list)
    sidecars: dict[str, _File] = dataclasses.field(default_factory=dict)
    used: bool = False


class _Index:
    """The files of a tar by their names, up to the mark of its end, after which names may recur."""

    def __init__(self):
        self._samples: dict[str, list[_Sample]] = {}
        self._files: dict[str, _File] = {}

    def add(self, file: _File) -> Iterator[NotRead]:
        """Note a file; yield it if it is of no use itself. It may still be what a link leads to."""
        self._files[file.name] = file
        key, suffix = posixpath.splitext(file.name)[0], _suffix(file.name)
        picture = is_picture(file.name)
        if is_hidden(file.name) or not (picture or suffix in _SIDECARS):
            yield NotRead(printable(file.name), kind_of(file.name))
            return
        versions = self._samples.setdefault(key, [])
        last = versions[-1] if versions else None
        # The same name once more begins another sample, as where a tar was appended to a tar.
        again = last is not None and (
            any(other.name == file.name for other in last.pictures) or suffix in last.sidecars
        )
        if last is None or again:
            versions.append(last := _Sample(key))
        if picture:
            last.pictures.append(file)
        else:
            last.sidecars[suffix] = file

    def finish(self, samples: list[_Sample]) -> Iterator[Problem]:
        """Add the samples to a list, each with one picture; yield what is not part of one."""
        for key, versions in self._samples.items():
            for sample in versions:
                if not sample.pictures:
                    continue
                first, *others = sorted(sample.pictures, key=lambda file: file.name)
                own = sample.sidecars | self._of_file(first.name, versions.index(sample))
                sample.sidecars = {**self._inherited(key, own), **own}
                for other in others:
                    yield Problem(printable(other.name), "second picture of a sample")
                reason = self._resolve(sample, first)
                if reason:
                    yield Problem(printable(key), reason)
                else:
                    samples.append(sample)
        for key, versions in self._samples.items():
            for sample in versions:
                if not (sample.pictures or sample.used):
                    yield Problem(printable(key), UNPAIRED)
        self._samples, self._files = {}, {}

    def _of_file(self, name: str, version: int) -> dict[str, _File]:
        """Return what `a.jpg.txt` and `a.jpg.json` say of `a.jpg`, by `.jpg.txt` and `.jpg.json`.

        The second of them goes with the second `a.jpg`.
        """
        versions = [s for s in self._samples.get(name, ()) if not s.pictures]
        if version >= len(versions):
            return {}
        versions[version].used = True
        whole = posixpath.splitext(name)[1]
        return {whole + suffix: file for suffix, file in versions[version].sidecars.items()}

    def _inherited(self, key: str, own: Mapping[str, _File]) -> dict[str, _File]:
        """Return what `a.txt` and `a.json` without a picture say of the picture `a.left.jpg`."""
        found: dict[str, _File] = {}
        folder, base = posixpath.split(key)
        while "." in base.lstrip("."):
            base = base.rpartition(".")[0]
            for sample in self._samples.get(posixpath.join(folder, base), [])[-1:]:
                new = sample.sidecars.keys() - own.keys() - found.keys()
                if new and not sample.pictures:
                    sample.used = True
                    found.update((suffix, sample.sidecars[suffix]) for suffix in new)
        return found

    def _resolve(self, sample: _Sample, picture: _File) -> str:
        """Follow the links of a sample; return why it cannot be read, or ""."""
        whole = {"": picture, **sample.sidecars}
        for suffix, file in whole.items():
            for _ in range(_MAX_LINKS):
                if not file.link:
                    break
                target = self._files.get(file.link)
                if target is None:
                    break
                file = target
            if file.link:
                return "broken link"
            if file.size > MAX_BYTES:
                return "file too large"
            whole[suffix] = file
        sample.pictures = [whole.pop("")]
        sample.sidecars = whole
        return ""


def _item(sample: _Sample, contents: _Contents, keys: Sequence[str]) -> Item | Problem:
    name = printable(sample.name)
    try:
        image = contents.read(sample.pictures[0])
        parts = {suffix: contents.read(file) for suffix, file in sample.sidecars.items()}
        by_kind = {
            kind: [content for suffix, content in parts.items() if suffix.endswith(kind)]
            for kind in _SIDECARS
        }
        lines = [line for kind in _TEXTS for text in by_kind[kind] for line in caption_lines(text)]
        objects = [read_json(content) for content in by_kind[".json"]]
        texts = captions({"text": lines}, ("text",))
        texts += tuple(text for found in objects for text in captions(found, keys))
        meta = {name: value for found in objects for name, value in found.items()}
    except _BROKEN:
        return Problem(name, "file cannot be read")
    except BadSample as reason:
        return Problem(name, str(reason))
    return Item(name, image, tuple(dict.fromkeys(texts)), meta, seen=tuple(meta))


class _Contents:
    """A tar that is read twice: once for the places of its files, then for what is in them."""

    def __init__(self, path: str):
        self._path = path
        self._open = contextlib.ExitStack()
        self._stream: IO[bytes] | None = None
        self._plain = False
        self._store: IO[bytes] | None = None
        self._last: tuple[int, bytes] = -1, b""

    def close(self) -> None:
        self._open.close()

    def files(self) -> Iterator[_File | Problem | NotRead | None]:
        """Yield the files, None where one tar ends and another begins, and what is damaged.

        Raises:
          UserError: the file is not there, or captions find no room in the temporary folder.
        """
        path, end = self._path, 0
        try:
            stream = self._decompressed()
            # ignore_zeros: without it a damaged header would be taken for the end of the file.
            tar = self._open.enter_context(
                _Tar.open(fileobj=stream, mode="r:", ignore_zeros=True, encoding="utf-8")
            )
            while (member := tar.next()) is not None:
                tar.forget()
                between = tar.take_gap()
                if between.damaged:
                    yield Problem(f"{path} at byte {end}", _DAMAGED, of_file=True)
                if between.zeros:
                    yield None
                if not member.isdir():
                    yield self._found(stream, member)
                end = tar.offset
            after = tar.take_gap()
            if after.damaged or not after.zeros:
                yield Problem(f"{path} at byte {end}", _DAMAGED, of_file=True)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist any more; give the input as it was") from None
        except _BROKEN:
            yield Problem(f"{path} after byte {end}", _DAMAGED, of_file=True)

    def _decompressed(self) -> IO[bytes]:
        """Open the file, whatever its name says that it is."""
        file = self._open.enter_context(open(self._path, "rb", buffering=_SWEEP))
        stream = decompressed(file)
        self._plain = stream is file
        self._stream = file if self._plain else self._open.enter_context(stream)
        return self._stream

    def _found(self, stream: IO[bytes], member: tarfile.TarInfo) -> _File | NotRead:
        """Return a member's place.

        Raises:
          EOFError: its content is not all there.
        """
        name = posixpath.normpath(member.name)
        if member.islnk():
            return _File(name, link=posixpath.normpath(member.linkname))
        if member.issym():
            target = posixpath.join(posixpath.dirname(name), member.linkname)
            return _File(name, link=posixpath.normpath(target))
        if not member.isreg() or member.issparse():
            return NotRead(printable(name), "special file")
        start, size = member.offset_data, member.size
        kept = not self._plain and size <= MAX_BYTES and _suffix(name) in _SIDECARS
        if kept:
            stream.seek(start)
            content = stream.read(size)
            if len(content) == size:
                return _File(name, self._keep(content), size, stored=True)
            raise EOFError
        # A tar that ends within a file would be noticed at the next header only.
        stream.seek(start + max(size, 1) - 1)
        if size and not stream.read(1):
            raise EOFError
        return _File(name, start, size)

    def _keep(self, content: bytes) -> int:
        """Store a caption; return where."""
        if self._store is None:
            self._store = self._open.enter_context(
                tempfile.SpooledTemporaryFile(max_size=_TEXTS_IN_MEMORY)
            )
        try:
            start = self._store.seek(0, io.SEEK_END)
            self._store.write(content)
        except OSError as error:
            raise UserError(
                f"the captions of {self._path} do not fit into {tempfile.gettempdir()} "
                f"({error.strerror}); free some space there, or set TMPDIR to another folder"
            ) from None
        return start

    def read(self, file: _File) -> bytes:
        """Return what is in a file.

        Raises:
          OSError, EOFError, zlib.error, lzma.LZMAError: it cannot be read.
        """
        if file.stored:
            assert self._store is not None
            self._store.seek(file.start)
            return self._store.read(file.size)
        # Of several links to one picture, all but the first would lead backwards.
        if self._last[0] != file.start:
            self._last = file.start, self._read(file.start, file.size)
        return self._last[1]

    def _read(self, start: int, size: int) -> bytes:
        assert self._stream is not None
        if self._plain:
            content = os.pread(self._stream.fileno(), size, start)
        else:
            self._stream.seek(start)
            content = self._stream.read(size)
        if len(content) < size:
            raise EOFError
        return content


@dataclasses.dataclass(slots=True)
class _Gap:
    """What is between two members: zeros, which end a tar, or what should not be there."""

    zeros: bool = False
    damaged: bool = False


class _Header(tarfile.TarInfo):
    """A header that notes in its tar what it meets in place of one."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        """Read a header; see the base class."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            tar.gap.zeros = True
            raise
        except tarfile.InvalidHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            tar.gap.damaged = True
            raise


class _Tar(tarfile.TarFile):
    tarinfo = _Header

    def __init__(self, *args: Any, **options: Any):
        self.gap = _Gap()
        super().__init__(*args, **options)

    def forget(self) -> None:
        """Drop the members, which it would all keep."""
        self.members: list[tarfile.TarInfo] = []

    def take_gap(self) -> _Gap:
        """Return what was met since this was last asked."""
        gap, self.gap = self.gap, _Gap()
        return gap


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()
