"""The diffusion stage in a size that compiles in seconds, on the codes of the tiny tokenizer."""

from configs import t2i_diffusion
from tests.tiny_tokenizer import shrink


def get_config(variant=""):
    """Returns the demo's config, made small; its tokenizer is still to be named."""
    config = shrink(t2i_diffusion.get_config(variant))
    config.tokenizer = ""
    config.text.trainable = True  # in sizes of which no weights are shipped
    config.loss.update(target="epsilon", time_shift=1.0, draws=1)  # as published
    config.model.update(num_layers=2, num_heads=2, head_dim=8, num_tokens=4, bits=8)
    config.text.model.update(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return config
