"""Model folders on the Hugging Face hub: fetched and cached, and uploaded.

The one module that uses the network, and only where somebody names a repository. With
HF_HUB_OFFLINE=1 what was fetched before is used, and nothing is asked of the network.
"""

import hashlib
import os
import re
from pathlib import Path
from types import ModuleType

from instella_jax.errors import UserError

# What model folders consist of, ours and published ones.
FILES = ("*.json", "*.safetensors", "*.pt", "*.txt", "*.model", "*.md")


def is_id(name: str) -> bool:
    """Tell whether a name may be that of a repository, "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "the hub needs the package huggingface_hub: pip install 'instella-jax[hub]'"
        ) from None
    return huggingface_hub


def fetch(repository: str, revision: str | None = None) -> Path:
    """Return the folder with a repository's files, fetched or as cached before.

    Args:
      repository: "owner/name".
      revision: a branch, tag or commit; None for the main branch.

    Raises:
      UserError: it is neither on the hub nor in the cache.
    """
    library = _library()
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            library.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repository} is neither a folder nor in the cache of the hub, and the hub cannot be "
            "asked for it: look at HF_HUB_OFFLINE and the network, or give a folder"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        line = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"cannot fetch {repository} from the hub ({line})") from None


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder's files to a repository, which is made if it is not there.

    Returns:
      The address of the commit.

    Raises:
      UserError: the hub refuses, or cannot be reached.
    """
    library = _library()
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = library.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        line = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"cannot upload to {repository} ({line})") from None


def import_folder(source: Path, text_encoder: Path) -> Path:
    """Return where the import of a published model is kept, in the user's own cache folder.

    INSTELLA_JAX_MODELS names another one. The name goes by the files' names, sizes and times.
    """
    root = os.environ.get("INSTELLA_JAX_MODELS")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instella_jax"
        root = root / "models"
    known = hashlib.sha256()
    for folder in (source, text_encoder):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            status = path.stat()
            name = path.relative_to(folder).as_posix()
            known.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return Path(root) / f"{source.resolve().name}-{known.hexdigest()[:16]}"
