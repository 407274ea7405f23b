import jax.numpy as jnp

import configs.tokenizer
from instella_jax.data.counters import make_counter


def test_samples_are_counted_by_source_and_shape():
    config = configs.tokenizer.get_config()
    config.data.update(kind="shards", buckets="16x16,16x32")
    config.data.shards.path = "/some/a,/some/b,/other/a"
    batches = {
        "image": jnp.zeros((2, 3, 16, 32, 3), jnp.uint8),
        "source": jnp.int32([[0, 2, 2], [1, 2, 0]]),
        "skipped_before": jnp.int32([[0, 4, 0], [1, 0, 0]]),
    }
    counts = {name: int(n) for name, n in make_counter(config)(batches, jnp.bool_(True)).items()}
    assert counts == {
        "skipped_samples": 5, "samples_a_0": 2, "samples_b": 1, "samples_a_2": 3,
        "samples_16x16": 0, "samples_16x32": 6,
    }  # fmt: skip
