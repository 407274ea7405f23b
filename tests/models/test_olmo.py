"""Our OLMo against the torch implementation of transformers, at random tiny sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from instella_jax.models.functional import apply
from instella_jax.models.olmo import Olmo
from instella_jax.weights import reference_sizes
from tests.needs_torch import needs_torch
from tests.reference_params import to_params

SIZES = {
    "plain": dict(),
    "grouped heads": dict(num_attention_heads=4, num_key_value_heads=2),
    "one key head": dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=24),
    "clipped": dict(clip_qkv=0.05),
    "another theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    "deep, all": dict(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, clip_qkv=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, vocab_size=71,
    ),
}  # fmt: skip


@needs_torch
@pytest.mark.parametrize("name", SIZES)
def test_hidden_states_are_those_of_transformers(name, tmp_path):
    """Files that transformers writes, read by us: sizes, names, layouts and mathematics."""
    import torch
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(len(name))
    sizes = dict(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True, initializer_range=0.3,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    theirs = OlmoForCausalLM(OlmoConfig(**{**sizes, **SIZES[name]})).eval()
    theirs.save_pretrained(tmp_path)

    config = reference_sizes.measure_olmo(
        json.loads((tmp_path / "config.json").read_text()), {}, "config.json"
    )
    ours = Olmo(config)
    params = to_params(ours, load_file(tmp_path / "model.safetensors"))

    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (4, 9))
    # Padding on the left: none, some, all but one, all.
    mask = np.arange(9)[None] >= np.array([0, 4, 8, 9])[:, None]
    with torch.no_grad():
        # Positions count from the start of the row, padding included.
        expected = theirs(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            position_ids=torch.arange(9)[None].expand(4, 9),
            output_hidden_states=True,
        ).hidden_states
    with jax.default_matmul_precision("highest"):
        got = np.asarray(apply(ours, params, jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))
    assert len(got) == len(expected) == config.num_hidden_layers + 1
    for layer, (a, b) in enumerate(zip(got, expected, strict=True)):
        # What padding sees differs, and no generator reads it.
        np.testing.assert_allclose(
            a[mask], b.numpy()[mask], rtol=1e-4, atol=1e-5, err_msg=f"layer {layer}"
        )
    assert np.abs(got[-1][mask]).mean() > 0.1
