"""Tests of the web demo, whose packages are in one of CI's environments only: `pytest -m app`."""

import importlib.util
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def _marks(*names, browser=False):
    """Marks of what is skipped where one of the packages, or a browser, is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if browser and not CHROMIUM:
        missing.append("chromium")
    reason = f"not installed: {', '.join(missing)}"
    return [pytest.mark.app, pytest.mark.skipif(bool(missing), reason=reason)]


_SERVER = ("gradio", "fastapi", "uvicorn", "openai")
NEEDS_APP = _marks(*_SERVER)
NEEDS_BROWSER = _marks(*_SERVER, "playwright", browser=True)
