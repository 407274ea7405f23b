"""Files of bits: what is written comes back, and nothing else is read."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest

from instella_jax.codec.format import BadCode, CodeFile
from tests.codec.alterations import alter, sealed


def make_file(seed=0, **changes):
    rng = np.random.default_rng(seed)
    tokens, bits = (int(n) for n in rng.integers(1, 40, 2))
    rows, columns = (int(n) for n in rng.integers(1, 4, 2))
    values = dict(
        model=rng.bytes(8).hex(),
        height=int(rng.integers(3, 2_000)),
        width=int(rng.integers(3, 2_000)),
        grid_rows=int(rng.integers(1, 257)),
        grid_columns=int(rng.integers(1, 257)),
        num_tokens=tokens,
        bits=bits,
        stored=tokens,
        tile_rows=rows,
        tile_columns=columns,
        overlap=0,
        metadata=rng.bytes(int(rng.integers(0, 50))),
        codes=rng.integers(0, 2, (rows * columns, tokens, bits), np.uint8),
    )
    return CodeFile(**{**values, **changes})


def same(one, other):
    fields = [field.name for field in dataclasses.fields(one) if field.name != "codes"]
    return np.array_equal(one.codes, other.codes) and all(
        getattr(one, name) == getattr(other, name) for name in fields
    )


def test_what_is_written_comes_back():
    for seed in range(200):
        file = make_file(seed)
        assert same(CodeFile.from_bytes(file.to_bytes()), file)


def test_the_greatest_numbers_come_back():
    greatest = dict(height=1 << 16, width=1_300, grid_rows=256, grid_columns=256)
    code = np.ones((1, 1, 1 << 16), np.uint8)
    file = make_file(
        **greatest, num_tokens=1 << 16, stored=1, bits=1 << 16, codes=code, tile_rows=1,
        tile_columns=1, overlap=650, metadata=b"x" * 65_535,
    )  # fmt: skip
    assert same(CodeFile.from_bytes(file.to_bytes()), file)


def test_the_bytes_are_those_of_the_document():
    codes = np.array([[[1, 0, 0], [0, 0, 1]], [[1, 1, 1], [1, 1, 1]]], np.uint8)
    file = CodeFile(
        model="0123456789abcdef", height=480, width=640, grid_rows=4, grid_columns=5,
        num_tokens=2, bits=3, stored=2, tile_rows=1, tile_columns=2, overlap=7, metadata=b"EX",
        codes=codes,
    )  # fmt: skip
    # As docs/formats.md has it, one field after the other.
    body = b"\x89B1D" + b"\x01" + bytes.fromhex("0123456789abcdef")
    body += (479).to_bytes(2, "little") + (639).to_bytes(2, "little") + bytes([3, 4])
    body += (1).to_bytes(2, "little") + (2).to_bytes(2, "little") + (1).to_bytes(2, "little")
    body += bytes([0, 1]) + (7).to_bytes(2, "little") + (2).to_bytes(2, "little")
    assert len(body) == 31
    body += bytes([0b10000100, 0b11111100]) + b"EX"
    assert file.to_bytes() == body + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(height=0), "height is 0"),
        (dict(width=65_537), "width is 65537"),
        (dict(height=20_000, width=20_000), "over 89,478,485 pixels"),
        (dict(stored=3, num_tokens=2), "3 tokens are stored of 2"),
        (dict(height=2, tile_rows=3), "more tiles than pixels"),
        (dict(height=90, width=90, tile_rows=3, tile_columns=3, overlap=16), "over a half"),
        (dict(metadata=bytes(65_536)), "65,536 bytes"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(changes, said):
    with pytest.raises(BadCode, match=said):
        make_file(**changes)


def test_a_file_that_is_no_such_file_is_said_to_be_none():
    data = make_file().to_bytes()
    for other, said in [
        (b"", "no .b1d file"),
        (b"\x89PNG\r\n\x1a\n" + data, "no .b1d file"),
        (data[:34], "cut short"),
        (data[:-1], "cut short: .* expected"),
        (data + b"\0", "expected"),
        (sealed(data[:4] + b"\x02" + data[5:]), "version 2 .* reads 1"),
        (data[:-8] + bytes([data[-8] ^ 1]) + data[-7:], "checksum"),
    ]:
        with pytest.raises(BadCode, match=said):
            CodeFile.from_bytes(other)


def test_bits_after_the_last_token_are_refused():
    file = make_file(
        num_tokens=1, bits=3, stored=1, tile_rows=1, tile_columns=1, metadata=b"",
        codes=np.ones((1, 1, 3), np.uint8),
    )  # fmt: skip
    data = file.to_bytes()
    for bit in range(5):
        code = struct.pack("<B", data[31] | 1 << bit)
        with pytest.raises(BadCode, match="after the last token"):
            CodeFile.from_bytes(sealed(data[:31] + code + data[32:]))


def test_altered_files_are_refused():
    rng = np.random.default_rng(0)
    originals = [make_file(seed).to_bytes() for seed in range(20)]
    for number in range(2_000):
        original = originals[number % 20]
        altered = alter(original, rng)
        if altered != original:
            with pytest.raises(BadCode):
                CodeFile.from_bytes(altered)


def test_altered_files_with_a_true_checksum_are_read_or_refused():
    rng = np.random.default_rng(1)
    read = 0
    for number in range(2_000):
        data = sealed(alter(make_file(number % 20).to_bytes(), rng))
        try:
            file = CodeFile.from_bytes(data)
        except BadCode:
            continue
        read += 1
        assert file.to_bytes() == data
    assert 100 < read < 2_000
