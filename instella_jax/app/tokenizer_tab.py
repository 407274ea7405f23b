"""The page's second tab: a picture through the tokenizer, beside what other formats need for it."""

import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.app import markup
from instella_jax.app.studio import Studio
from instella_jax.data.images import BadPicture, decode_picture
from instella_jax.errors import UserError

# Grey levels off that the map of errors shows brightest.
BRIGHT = 64
# The map's colours from no error to `BRIGHT`, red, green and blue.
HEAT = np.array([[10, 8, 30], [95, 20, 110], [215, 60, 70], [250, 160, 60], [252, 250, 190]])
EXAMPLES = 4
ON, OFF = (20, 184, 166), (30, 41, 59)


def add_tokenizer_tab(gr: Any, studio: Studio) -> None:
    """Add the controls and what joins them."""
    codec = studio.codec
    with gr.Row():
        with gr.Column(scale=3, min_width=260):
            given = gr.Image(
                label="A picture of yours", type="filepath", sources=["upload", "clipboard"],
                image_mode=None, elem_id="upload", buttons=[], height=260,
            )  # fmt: skip
            # A file that is no picture is told of below, in words of our own.
            given.preprocess = lambda payload: payload and payload.path
            gr.Examples(
                [[path] for path in example_files()], [given], label="Or one of these",
                elem_id="tokenizer-examples",
            )  # fmt: skip
            file = gr.DownloadButton("Download the bits (.b1d)", visible=False, elem_id="bits")
        with gr.Column(scale=7, min_width=320):
            shown = gr.HTML(
                markup.waiting(
                    f"A picture becomes {codec.num_tokens} tokens of {codec.bits} bits, and comes "
                    "back from them."
                ),
                elem_id="parts",
            )

    def show(path: str | None) -> Iterator[tuple[Any, Any]]:
        nothing = gr.DownloadButton(visible=False)
        if path is None:
            yield gr.skip(), nothing
            return
        try:
            content, text = through(codec, read_upload(path, studio))
        except UserError as error:
            yield markup.notice(error), nothing
            return
        with tempfile.TemporaryDirectory(prefix="instella-jax-") as folder:
            bits = Path(folder) / "picture.b1d"
            bits.write_bytes(content)
            # gradio copies the file before it asks for more.
            yield text, gr.DownloadButton(value=str(bits), visible=True)

    given.change(
        show, given, [shown, file], concurrency_limit=1, show_progress="minimal",
        trigger_mode="always_last",
        api_visibility="private",
    )  # fmt: skip


def read_upload(path: str, studio: Studio) -> np.ndarray:
    """Read a picture that a visitor has sent, uint8 [h, w, 3].

    Raises:
      UserError: it is no picture, is broken, or is too large.
    """
    limits = studio.limits
    if os.path.getsize(path) > limits.upload_bytes:
        raise UserError(f"this file is over {limits.upload_bytes // 2**20} MB")
    try:
        return decode_picture(path, "this file", decode_side=1_024, max_pixels=limits.upload_pixels)
    except BadPicture as error:
        raise UserError(f"{str(error).rstrip('.')}") from None


def through(codec: Any, picture: np.ndarray) -> tuple[bytes, str]:
    """Send a picture through the tokenizer.

    Args:
      codec: a `codec.tokenizer.BinaryTokenizer`.
      picture: uint8 [h, w, 3].

    Returns:
      The bytes of a `.b1d` file, and the HTML that shows what came of it.
    """
    fitted = codec.fit(picture)
    code = codec.encode(fitted)
    copy = codec.decode(code, *fitted.shape[:2])
    content = codec.to_bytes(picture)
    height, width = fitted.shape[:2]
    off = np.abs(fitted.astype(int) - copy.astype(int)).mean(axis=-1)
    figures = (
        (fitted, "What it sees", f"{width} × {height} pixels"),
        (bits_picture(code), "Its bits", f"{code.shape[0]} tokens (rows) of {code.shape[1]} bits"),
        (copy, "What comes back", f"PSNR {decibel(fitted, copy):.1f} dB"),
        (heat(off), "Where they differ", f"{off.mean():.1f} grey levels on average"),
    )
    parts = "".join(markup.figure(*figure) for figure in figures)
    rows = [
        ("1D bits", f"{code.size // 8:,}", f"{decibel(fitted, copy):.1f}"),
        *others(fitted, copy),
    ]
    table = markup.table(("Format", "Bytes", "PSNR in dB"), rows, ours=0)
    note = f"The .b1d file has {len(content):,} bytes, its header and checksum with them."
    return content, f'<div class="parts">{parts}</div>{table}{markup.said(note)}'


def others(picture: np.ndarray, copy: np.ndarray) -> list[tuple[str, str, str]]:
    """Return what other formats need for a picture: at their smallest, and to be as close."""
    goal, rows = decibel(picture, copy), []
    for name, kind in (("JPEG", "jpeg"), ("WebP", "webp")):
        smallest = _saved(picture, kind, 1)
        rows.append((f"{name}, smallest", *smallest))
        for quality in range(5, 101, 5):
            content = _saved(picture, kind, quality)
            if float(content[1]) >= goal:
                rows.append((f"{name}, as close (quality {quality})", *content))
                break
    png = io.BytesIO()
    _image(picture).save(png, format="PNG", optimize=True)
    rows.append(("PNG, exact", f"{len(png.getvalue()):,}", "∞"))
    rows.append(("Plain pixels", f"{picture.size:,}", "∞"))
    return rows


def _saved(picture: np.ndarray, kind: str, quality: int) -> tuple[str, str]:
    """Return bytes and PSNR of a picture in a lossy format."""
    from PIL import Image

    file = io.BytesIO()
    _image(picture).save(file, format=kind, quality=quality)
    with Image.open(file) as image:
        back = np.asarray(image.convert("RGB"))
    return f"{len(file.getvalue()):,}", f"{decibel(picture, back):.1f}"


def _image(picture: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(picture)


def decibel(one: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of pictures of 256 levels."""
    error = ((one.astype(float) - other.astype(float)) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def bits_picture(code: np.ndarray) -> np.ndarray:
    """Return a code [N, K] as squares, a row for each token: uint8 [h, w, 3]."""
    side = 12
    squares = np.where(code[..., None] > 0, np.array(ON), np.array(OFF)).astype(np.uint8)
    large = squares.repeat(side, axis=0).repeat(side, axis=1)
    # Lines between them.
    large[::side], large[:, ::side] = large[::side] // 2, large[:, ::side] // 2
    return large


def heat(off: np.ndarray) -> np.ndarray:
    """Return grey levels off, [h, w], as colours: uint8 [h, w, 3]."""
    place = np.clip(off / BRIGHT, 0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(place, stops, HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def example_files() -> list[str]:
    """Write a few scenes that were never trained on, and return their paths."""
    from instella_jax.data.scenes.source import EmojiScenes

    scenes = EmojiScenes(64, split="heldout")
    folder = Path(tempfile.mkdtemp(prefix="instella-jax-examples-"))
    paths = []
    for number in range(1, 1 + EXAMPLES):
        path = folder / f"scene-{number}.png"
        _image(scenes[number]["image"]).save(path)
        paths.append(str(path))
    return paths
