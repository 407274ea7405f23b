"""Pictures and tables as HTML that needs nothing from anywhere else."""

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np

from instella_jax.errors import UserError

FAILED = "this failed; the server's log says why"


def data_uri(picture: np.ndarray) -> str:
    """Return a picture, uint8 [h, w, 3], as a PNG inside of a link."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def across(count: int) -> int:
    """Return how many of `count` pictures stand in a row."""
    return min(4, math.ceil(math.sqrt(count)))


def progress(pictures: np.ndarray, share: float) -> str:
    """Return pictures, uint8 [B, h, w, 3], as they look after a share of their steps."""
    images = "".join(f'<img src="{data_uri(picture)}" alt="">' for picture in pictures)
    return (
        f'<div class="shown"><div class="pictures" style="--across:{across(len(pictures))}">'
        f'{images}</div><div class="bar"><i style="width:{share:.0%}"></i></div></div>'
    )


def waiting(text: str) -> str:
    """Return a place for pictures that are not there yet."""
    return f'<div class="empty">{html.escape(text)}</div>'


def said(text: str) -> str:
    """Return a line about what happens."""
    return f'<div class="said" role="status">{html.escape(text)}</div>'


def notice(error: Exception) -> str:
    """Return what went wrong, as the sentence of a mistake or else without details."""
    text = str(error) if isinstance(error, UserError) else FAILED
    text = f"{text[:1].upper()}{text[1:].rstrip('.')}."
    return f'<div class="notice" role="alert">{html.escape(text)}</div>'


def figure(picture: np.ndarray, title: str, caption: str) -> str:
    """Return a picture, uint8 [h, w, 3], with what it is."""
    return (
        f'<figure class="part pictures"><img src="{data_uri(picture)}" alt="{html.escape(title)}">'
        f"<figcaption><b>{html.escape(title)}</b><br>{html.escape(caption)}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], ours: int) -> str:
    """Return a table whose row `ours` stands out; all columns but the first hold numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if number else ''}>{html.escape(value)}</{tag}>"
            for number, value in enumerate(values)
        )

    body = "".join(
        f"<tr{' class=ours' if number == ours else ''}>{cells('td', row)}</tr>"
        for number, row in enumerate(rows)
    )
    return (
        f'<table class="bytes"><thead><tr>{cells("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def words(known: Sequence[str]) -> str:
    """Return the list of words that a model knows."""
    return '<div class="words">' + "<br>".join(map(html.escape, known)) + "</div>"
