"""What tells the bytes of one model from those of another."""

import hashlib
from pathlib import Path


def digest(path: Path) -> str:
    """Return 32 hexadecimal digits that stand for the bytes of a file, or of a folder's files.

    Raises:
      OSError: it is not there or cannot be read.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    whole = hashlib.sha256()
    for inner in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{inner.relative_to(path).as_posix()}\0{digest(inner)}\0".encode())
    return whole.hexdigest()[:32]
