"""Hashes of the files of a folder, so that damage is noticed before anything of it is used."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(folder: Path, leave_out: frozenset[str] = frozenset()) -> None:
    """Writes `manifest.json`: size and SHA-256 of every file under a folder, by relative path.

    Args:
      folder: of the files.
      leave_out: relative paths of files that may change later.

    Raises:
      OSError: a file cannot be read, or the manifest not be written.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name not in leave_out and name != MANIFEST]
    # Hashing lets go of the interpreter: large checkpoints use several cores.
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    scratch = folder / f".{MANIFEST}.{os.getpid()}"
    with scratch.open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, folder / MANIFEST)


def find_damage(folder: Path) -> str | None:
    """Says what differs from the manifest of a folder: the first file and how; None if nothing.

    Raises:
      FileNotFoundError: there is no manifest.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in json.loads(text)["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"

    def check(name: str) -> str | None:
        size, digest = files[name]
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} of {size} bytes"
            return None if _digest(path) == digest else f"{name} has other bytes than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(4) as pool:
        return next((fault for fault in pool.map(check, sorted(files)) if fault), None)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
