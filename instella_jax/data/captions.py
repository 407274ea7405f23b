"""What bytes are a caption, wherever they come from: tars, Parquet files, folders."""

from instella_jax.data.samples import BadSample

_BOM = "\ufeff"


def decode_text(data: bytes) -> str:
    """Return the text of bytes in UTF-8, with or without a byte order mark.

    Nothing else is guessed at: Latin-1, GBK and the like can be told apart only by what they say.

    Raises:
      BadSample: they are not UTF-8, or hold a NUL, as UTF-16 and binary files do.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    return check_text(text)


def check_text(text: str) -> str:
    """Return a text without its byte order mark.

    Raises:
      BadSample: it holds a NUL.
    """
    if "\0" in text:
        raise BadSample("not text: it holds a NUL")
    return text.removeprefix(_BOM)
