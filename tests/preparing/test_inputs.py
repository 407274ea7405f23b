"""Which inputs are read: several, patterns as a shell expands them, and suffixes in any case."""

import subprocess

import pytest

from instella_jax.errors import UserError
from instella_jax.preparing.importing import import_dataset
from instella_jax.preparing.inputs import expand
from tests.small_data_sets import contents, picture, samples, write_tar


@pytest.mark.parametrize(
    "pattern",
    [
        "shards-{000..012}.tar", "s-{08..11}", "s-{7..12}.tar", "s-{3..1}", "{a,b}/{0..2}.tar",
        "{a,b{1,2}}.tar", "{00..2}{x,y}", "plain.tar", "{-2..1}", "s{9..10}{08..9}",
    ],
)  # fmt: skip
def test_patterns_are_what_the_shell_makes_of_them(pattern):
    result = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True
    )
    assert [str(path) for path in expand([pattern])] == result.stdout.split()


def test_several_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,{1..2}.tar").touch()
    names = ["x.tar,y/{1,2}.tar::z", "x.tar", "a,{1..2}.tar", "{x}"]
    assert [str(path) for path in expand(names)] == [
        "x.tar", "y/1.tar", "y/2.tar", "z", "a,{1..2}.tar", "{x}",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no input is named"):
        expand([","])
    with pytest.raises(UserError, match="stands for over 1000000 files; give a folder"):
        expand(["{0..999999999999}"])


def test_several_inputs_are_one_data_set(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "p.png").write_bytes(picture(60))
    (tmp_path / "folder" / "p.txt").write_text("sixty")
    for number in range(3):
        write_tar(tmp_path / f"{number:03d}.tar", samples([10 * number + 10]))
    inputs = [f"{tmp_path}/{{000..001}}.tar", tmp_path / "folder", tmp_path / "001.tar"]
    report = import_dataset(inputs, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["000010", "000020", "p.png"]
    assert report["read"] == report["kept"] == 3
    assert import_dataset(inputs, tmp_path / "out") == report
    with pytest.raises(UserError, match="begun with other input"):
        import_dataset(tmp_path / "000.tar", tmp_path / "out")
    with pytest.raises(UserError, match=r"003.tar does not exist; give the file or folder"):
        import_dataset(f"{tmp_path}/{{000..003}}.tar", tmp_path / "none")


def test_suffixes_in_any_case(tmp_path):
    for number, name in enumerate(
        ("a.TAR", "b.tar.bz2", "c.tar.XZ", "d.tgz", "e.Tar.Gz", "f.tbz2")
    ):
        kind = name.lower().rpartition(".")[2]
        mode = {"tar": "w", "tgz": "w:gz", "tbz2": "w:bz2"}.get(kind, f"w:{kind}")
        write_tar(tmp_path / name, samples([10 * number + 10]), mode)
    report = import_dataset(tmp_path, tmp_path / "out")
    assert report["kept"] == 6 and report["not_read"] == {}
    assert import_dataset(tmp_path / "a.TAR", tmp_path / "one")["kept"] == 1


def test_what_is_read_is_said_where_nothing_can_be(tmp_path):
    (tmp_path / "a.tar.lz4").write_bytes(b"x")
    (tmp_path / "b.zip").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"neither a tar nor a parquet file; .*\.tar, .*\.txz, .*\.tzst"
    ):
        import_dataset(tmp_path / "a.tar.lz4", tmp_path / "out")
    with pytest.raises(UserError, match=r"has no pictures .*\.parquet\), but \.lz4 1, \.zip 1$"):
        import_dataset(tmp_path, tmp_path / "out")
    write_tar(tmp_path / "c.tar", samples([10]))
    report = import_dataset(tmp_path, tmp_path / "out")
    assert report["not_read"] == {".lz4": 1, ".zip": 1}
