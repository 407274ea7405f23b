"""The shipped pipelines, read once for each file of tests."""

import pytest

from instella_jax import InstellaPipeline


@pytest.fixture(scope="module")
def pipes():
    return {name: InstellaPipeline.from_pretrained(name) for name in ("demo", "demo_ar")}


@pytest.fixture(params=["demo", "demo_ar"])
def pipe(request, pipes):
    return pipes[request.param]
