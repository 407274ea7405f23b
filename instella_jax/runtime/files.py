"""Output folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from instella_jax.errors import UserError


@contextlib.contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, which takes that name when the block ends well.

    Raises:
      UserError: `out` is there already, or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} is there already: give another --out or move it away")
    out = out.absolute()
    missing = [parent for parent in out.parents if not parent.exists()]
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        os.rename(scratch, out)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {out} ({error.strerror or error})") from None
        raise
