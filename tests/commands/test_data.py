"""`instella-jax data`: from tars to pictures by a generator that trained on codes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from instella_jax import cli
from instella_jax.commands.generate import generate
from instella_jax.data.shards import Records
from instella_jax.reporting.metrics import read_metrics
from instella_jax.runtime import compile_cache
from instella_jax.training.loop import train
from tests import tiny_diffusion
from tests.small_data_sets import picture, samples, write_tar


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the console command and returns its exit status and what it says."""
    # What is set once per process is set for all tests already.
    monkeypatch.setattr(compile_cache, "use_cache", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["instella-jax", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.slow
def test_from_tars_to_pictures(command, tmp_path, tiny_tokenizer_folder):
    tars, shards, codes = tmp_path / "tars", tmp_path / "shards", tmp_path / "codes"
    config = tiny_diffusion.get_config()
    size = config.data.image_size
    assert command("data", "scenes", tars, "--count=50", "--per-tar=30", f"--size={size}")[0] == 0
    status, out, _ = command("data", "import", tars, shards, "--workers=1", "--min-side=16")
    assert status == 0 and "kept 50 of 50 pictures with 50 captions in 2 shard(s)" in out
    status, out, _ = command("data", "encode", tiny_tokenizer_folder, shards, codes, "--crops=2")
    assert status == 0 and "encoded 50 pictures" in out
    texts = [Records(folder, kind).read(7)[0]["texts"]
             for folder, kind in ((shards, "images"), (codes, "codes"))]  # fmt: skip
    assert texts[0] == texts[1]

    config.tokenizer = str(tiny_tokenizer_folder)
    config.data.kind = "codes"
    config.data.codes.update(path=f"{codes},{codes}", weights="3:1", heldout=0.2)
    config.train.update(
        steps=4, batch_size=8, log_every=2, eval_every=4, save_every=4, image_every=0
    )
    config.mesh.data = 8
    config.eval.update(batch_size=8, batches=1, pictures=0)
    config.sample.update(prompt="a red heart", steps=2, out=str(tmp_path / "drawn"))
    train(config.lock(), tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert 0 <= rows[-1]["train/data_wait"] <= 1
    total = [sum(row[f"train/samples_codes_{i}"] for row in rows) for i in (0, 1)]
    # All that were taken, of which the last batch may be logged with the next steps.
    assert total in ([24, 8], [18, 6]) and np.isfinite(rows[-1]["train/loss"])
    grid = generate(config, tmp_path / "run")
    with Image.open(grid) as drawn:
        assert drawn.size[0] >= size


def test_mistakes_are_one_sentence(command, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    wrong = [
        ("data", "import", tmp_path / "missing", tmp_path / "out"),
        ("data", "import", tmp_path / "full", tmp_path / "out"),
        ("data", "import", tmp_path / "full", tmp_path / "out", "--part=2/2"),
        ("data", "import", tmp_path / "full", tmp_path / "out", "--workers=-1"),
        ("data", "import", tmp_path / "full", tmp_path / "out", "--max-watermark=2"),
        ("data", "encode", "demo", tmp_path, tmp_path / "out"),
        ("data", "encode", tmp_path, tmp_path, tmp_path / "out"),
        ("data", "scenes", tmp_path / "out", "--size=17"),
        ("data", "scenes", tmp_path / "out", "--count=0"),
    ]
    for arguments in wrong:
        status, _, err = command(*arguments)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, arguments
    assert command("data")[0] == 2
    result = subprocess.run(
        [sys.executable, "-m", "instella_jax", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("data", "doctor", "export", "--config:", "--workdir:", "--mode:", "--process_id:"):
        assert word in result.stdout
    status, out, _ = command("data", "import", "--help")
    assert status == 0 and "--max-watermark" in out and "goes on where it stopped" in out


def test_what_was_left_out_is_told(command, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, side in (("good", 64), ("small", 16)):
        Image.new("RGB", (side, side)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    (folder / "bad.png").write_bytes(b"x")
    (folder / "bad.txt").write_text("x")
    status, out, _ = command("data", "import", folder, tmp_path / "out", "--min-side=32")
    assert status == 0
    # The last line of the progress is there where lines stay too.
    assert "unit 1/1  3/3 pictures" in out
    assert "left out, too small: 1 (small.png)" in out
    assert "left out, broken picture: 1 (bad.png)" in out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept"] == 1
    again = command("data", "import", folder, tmp_path / "out", "--min-side=32")
    assert again[0] == 0 and "kept 1 of 3" in again[1]
    status, _, err = command("data", "import", folder, tmp_path / "out", "--min-side=33")
    assert status == 2 and "begun with other options" in err


def test_several_tars_and_what_became_of_what_is_in_them(command, tmp_path):
    loose = [("a.jpg", picture(10, kind="jpeg")), ("b.txt", b"b"), ("a.npy", b"x")]
    for number, members in enumerate((samples([10, 20]), samples([30]), loose)):
        write_tar(tmp_path / f"{number:03d}.tar", members)
    one, two, three, out = (tmp_path / name for name in ("000.tar", "001.tar", "002.tar", "out"))
    status, printed, _ = command("data", "import", one, two, three, out, "--workers=1")
    assert status == 0
    for line in (
        "kept 3 of 5 pictures with 3 captions in 2 shard(s)",
        "  left out, no caption: 1 (a)",
        "  left out, caption without a picture: 1 (b)",
        "  a picture and its caption go together by their names",
        "  not read, .npy: 1 (a.npy)",
    ):
        assert any(told.startswith(line) for told in printed.splitlines()), line
    report = json.loads((out / "report.json").read_text())
    assert report["read"] == report["kept"] + sum(report["dropped"].values()) == 5
    assert report["not_read"] == {".npy": 1}
    pattern = tmp_path / "{000..001}.tar"
    status, printed, _ = command("data", "import", pattern, tmp_path / "braces", "--workers=1")
    assert status == 0 and "kept 3 of 3 pictures" in printed
    status, printed, _ = command("data", "import", f"{one},{two}", tmp_path / "commas")
    assert status == 0 and "kept 3 of 3 pictures" in printed
    status, _, err = command("data", "import", tmp_path / "{000..004}.tar", tmp_path / "none")
    assert status == 2 and "003.tar does not exist" in err and err.count("\n") == 1
