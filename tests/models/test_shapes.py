"""Shapes in signatures: the tests check them at every call, see conftest.py."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from tests.paths import ROOT

FOLDERS = ("models", "kernels", "stages")
BARE = r"(?:: |-> )\(?(?:tuple\[)?(?:jax\.Array|np\.ndarray)\b"


def test_a_wrong_shape_is_refused():
    logits, bits = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 5))
    binary_diffusion.loss(logits, logits)
    with pytest.raises(jaxtyping.TypeCheckError, match="K=4"):
        binary_diffusion.loss(logits, bits)


def test_methods_of_networks_are_checked_too():
    network = ArTransformer(1, 1, 2, 4, 3, 5)
    with pytest.raises(jaxtyping.TypeCheckError, match="text_mask"):
        network.init(
            jax.random.key(0), jnp.zeros((2, 3, 3)), jnp.zeros((1, 2, 6, 5)), jnp.ones((2, 7))
        )


@pytest.mark.parametrize("folder", FOLDERS)
def test_arrays_in_signatures_have_shapes(folder):
    for path in (ROOT / "instella_jax" / folder).glob("*.py"):
        bare = re.findall(BARE, path.read_text())
        assert not bare, path
