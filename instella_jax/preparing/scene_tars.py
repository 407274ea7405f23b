"""Emoji scenes as webdataset tars: something small to try `data import` with."""

import io
import json
import os
import tarfile
from pathlib import Path

from instella_jax.data.scenes.source import EmojiScenes
from instella_jax.errors import UserError


def write_tars(
    out: str | os.PathLike[str], count: int, per_tar: int, size: int = 64, seed: int = 0
) -> list[Path]:
    """Write training scenes as PNG with a caption in `.txt` and the size in `.json`.

    Args:
      out: folder; made if it is not there, and without tars.
      count: scenes.
      per_tar: scenes in a tar.
      size: side of the pictures in pixels.
      seed: of the scenes.

    Returns:
      The tars.

    Raises:
      UserError: the folder has tars, or cannot be written.
    """
    from PIL import Image

    out = Path(out)
    scenes, paths = EmojiScenes(size, seed), []
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.glob("*.tar")):
            raise UserError(f"{out} has tars already; choose another folder")
        for number, start in enumerate(range(0, count, per_tar)):
            path = out / f"{number:05d}.tar"
            with tarfile.open(path, "w") as tar:
                for index in range(start, min(start + per_tar, count)):
                    sample = scenes[index]
                    file = io.BytesIO()
                    Image.fromarray(sample["image"]).save(file, "png")
                    meta = {"caption": sample["text"], "width": size, "height": size}
                    _add(tar, f"{index:08d}.png", file.getvalue())
                    _add(tar, f"{index:08d}.txt", sample["text"].encode())
                    _add(tar, f"{index:08d}.json", json.dumps(meta).encode())
            paths.append(path)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror})") from None
    return paths


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
