"""The autoregressive stage in a size that compiles in seconds, on codes of the tiny tokenizer."""

from configs import t2i_ar
from tests import tiny_diffusion


def get_config(variant=""):
    """Returns the demo's config, made small; its tokenizer is still to be named."""
    config, tiny = t2i_ar.get_config(variant), tiny_diffusion.get_config(variant)
    for section in ("data", "train", "eval", "optimizer", "model", "text"):
        config[section] = tiny[section]
    config.optimizer.muon.exclude = ()
    config.loss.bit_noise = 0.0  # as published
    config.tokenizer = ""
    return config
