"""Config files: found by path or by the name of a shipped one, and read as Python."""

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.user_paths import expand

EXAMPLE = "configs/t2i_diffusion.py"


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with the package, by name."""
    package = Path(__file__).parents[1]
    # In a wheel they are inside the package, in a clone beside it.
    folder = next(
        (f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None
    )
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))} if folder else {}


def find_config(value: str) -> str:
    """Return "FILE[:VARIANT]" of a value of --config: a file's path, or a shipped config's name.

    Raises:
      UserError: there is no such file.
    """
    name, colon, variant = value.partition(":")
    path, shipped = Path(expand(name)), shipped_configs()
    if path.suffix != ".py" or not path.is_file():
        if name not in shipped:
            raise UserError(
                f"config file {name!r} does not exist: expected a Python file, for example "
                f"{EXAMPLE}, or one of {', '.join(shipped)}"
            )
        path = shipped[name]
    return f"{path}{colon}{variant}"


def load_config(config: str) -> Config:
    """Return the config that a file gives, with a variant after a colon where one is wanted.

    Raises:
      UserError: the file is no Python, fails, or gives no config; with the line that failed.
    """
    from ml_collections import ConfigDict

    path, *variant = config.split(":", 1)
    try:
        module = _run(path)
        if not hasattr(module, "get_config"):
            raise UserError(f"config file {path} has no get_config(), which returns a config")
        made = module.get_config(*variant)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {path} fails{_where(error, path)}") from error
    if not isinstance(made, ConfigDict):
        raise UserError(
            f"config file {path}: get_config returned {type(made).__name__}, expected an "
            "ml_collections.ConfigDict"
        )
    return made


def _run(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"given_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _where(error: Exception, path: str) -> str:
    """Return " at line N: what went wrong" of an error that a config file raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
    line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
    what = " ".join(traceback.format_exception_only(error)[-1].split())
    return f"{f' at line {line}' if line else ''}: {what}"
