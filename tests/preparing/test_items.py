"""What is a caption: the same bytes are read, or refused, in every kind of input."""

import io
import json

import pytest

from instella_jax.data.captions import BROKEN_CAPTION, captions, named, read_json
from instella_jax.data.samples import BadSample
from instella_jax.preparing.importing import import_dataset
from tests.small_data_sets import contents, make_tfds, picture, write_tar

TEXT = "eine Möwe, 海鸥"
GOOD = {"utf8": TEXT.encode(), "bom": TEXT.encode("utf-8-sig")}
BROKEN = {
    "latin1": "eine Möwe".encode("latin-1"),
    "utf16": TEXT.encode("utf-16"),
    "utf16le": "a gull".encode("utf-16-le"),
    "gbk": "海鸥".encode("gbk"),
    "nul": b"a gull\0",
    "cut": TEXT.encode()[:-1],
}
CAPTIONS = {**GOOD, **BROKEN}


def check_import(source, out, names=lambda key: key, **options):
    report = import_dataset(source, out, **options)
    found = {names(key): texts for key, (texts, _) in contents(out).items()}
    assert found == {name: [TEXT] for name in GOOD}
    assert report["dropped"] == {BROKEN_CAPTION: len(BROKEN)}
    assert report["read"] == len(CAPTIONS)


def test_caption_bytes_of_a_tar(tmp_path):
    members = []
    for name, text in CAPTIONS.items():
        members += [(f"{name}.png", picture(10)), (f"{name}.txt", text)]
    write_tar(tmp_path / "a.tar", members)
    check_import(tmp_path / "a.tar", tmp_path / "out")


def test_json_bytes_of_a_tar(tmp_path):
    def around(text):
        bom = b"\xef\xbb\xbf" if text.startswith(b"\xef\xbb\xbf") else b""
        return bom + b'{"caption": "' + text.removeprefix(bom) + b'"}'

    members = []
    for name, text in CAPTIONS.items():
        whole = json.dumps({"caption": TEXT}).encode("utf-16") if name == "utf16" else around(text)
        members += [(f"{name}.png", picture(10)), (f"{name}.json", whole)]
    write_tar(tmp_path / "a.tar", members)
    check_import(tmp_path / "a.tar", tmp_path / "out")


def test_caption_bytes_of_a_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in CAPTIONS.items():
        (folder / f"{name}.png").write_bytes(picture(10))
        (folder / f"{name}.txt").write_bytes(text)
    check_import(folder, tmp_path / "out", lambda key: key.removesuffix(".png"))


def test_caption_bytes_of_a_parquet_file(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    order = list(CAPTIONS)
    table = pa.table({"image": [picture(10)] * len(order), "caption": list(CAPTIONS.values())})
    assert table.schema.field("caption").type == pa.binary()
    parquet.write_table(table, tmp_path / "a.parquet")
    check_import(tmp_path / "a.parquet", tmp_path / "out", lambda key: order[int(key.split()[-1])])


def test_caption_bytes_of_a_tfds_data_set(tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
    examples = [{"image": io.BytesIO(picture(10)), "text": text} for text in CAPTIONS.values()]
    folder = make_tfds(tmp_path / "in", features, examples)
    report = import_dataset(folder, tmp_path / "out")
    assert report["dropped"] == {BROKEN_CAPTION: len(BROKEN)}
    assert [texts for texts, _ in contents(tmp_path / "out").values()] == [[TEXT]] * len(GOOD)


def test_one_broken_caption_is_not_hidden_by_another():
    with pytest.raises(BadSample, match="^broken caption$"):
        captions({"text": ["a gull", b"\xff"]}, ("text",))
    with pytest.raises(BadSample, match="^broken caption$"):
        captions({"text": "a gull\0"}, ("text",))
    # What is not asked for is not looked at.
    assert captions({"text": "a gull", "sha": b"\xff"}, ("text",)) == ("a gull",)


def test_json_is_an_object_or_nothing():
    assert read_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert read_json(b"[1]") == {}
    for broken in (b"", b"{", b"[" * 100_000):
        with pytest.raises(BadSample, match="^broken JSON$"):
            read_json(broken)


def test_case_counts_only_where_names_differ_in_nothing_else():
    assert named(["url", "Text"], ("text",)) == ["Text"]
    assert named(["Text", "text"], ("text",)) == ["text"]
    assert named(["Text", "TEXT"], ("text",)) == []
