"""The examples in docstrings give what they say."""

import doctest
import importlib

import pytest

from tests.paths import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "instella_jax").rglob("*.py")
    if "    >>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


def test_the_pipeline_has_an_example():
    assert "instella_jax.sampling.pipeline" in MODULES
