"""What is set once per process before any computation: compile cache, log of the backend."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where compiled programs are kept: the user's own cache folder, or INSTELLA_JAX_CACHE."""
    given = os.environ.get("INSTELLA_JAX_CACHE")
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "instella_jax" / "xla"


def start() -> None:
    """Turns the persistent compilation cache on and says which devices are used."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            jax.config.update("jax_compilation_cache_dir", str(folder))
        except OSError as error:
            logger.warning("no compilation cache: %s cannot be written (%s)", folder, error)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    devices = jax.devices()
    print(f"{len(devices)} {devices[0].platform} device(s): {devices[0].device_kind}", flush=True)
