"""Tests that need torch, which is in one of CI's environments only: `pytest -m torch` there."""

import importlib.util

import pytest

HAS_TORCH = importlib.util.find_spec("torch") is not None
_skip = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


def needs_torch(test):
    """Mark a test that is skipped without torch."""
    return pytest.mark.torch(_skip(test))
