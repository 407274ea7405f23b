"""The protocol of stages, whose types are checked where they are implemented."""

import inspect

import pytest

from instella_jax.stages.autoregressive import AutoregressiveStage
from instella_jax.stages.base import Stage
from instella_jax.stages.diffusion import DiffusionStage
from instella_jax.stages.tokenizer import TokenizerStage


@pytest.mark.parametrize("name", ["loss", "evaluate", "loader", "frozen", "describe"])
@pytest.mark.parametrize("kind", [TokenizerStage, DiffusionStage, AutoregressiveStage])
def test_every_stage_has_the_signatures_of_the_protocol(kind, name):
    ours, theirs = (inspect.signature(getattr(one, name)) for one in (kind, Stage))
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("kind", [TokenizerStage, DiffusionStage])
def test_types_of_stages_are_checked(kind, request):
    """As tests/conftest.py asks for."""
    with pytest.raises(Exception, match="Type-check error|violates type hint"):
        kind.loss(None, {}, {}, {}, "no key", 0)
