"""Trains the autoregressive text-to-image generator on the codes of a frozen tokenizer.

Demo (no variant), emoji scenes on the shipped tokenizer, some minutes on any CPU:
  python -m instella_jax.main --config=configs/t2i_ar.py
Published sizes, on your own pictures, with a tokenizer and OLMo as model folders:
  python -m instella_jax.main --config=configs/t2i_ar.py:instella_512 \
      --config.tokenizer=/models/tokenizer --config.text.encoder=/models/olmo \
      --config.data.folder.path=/my/pictures
"""

from ml_collections import ConfigDict

from instella_jax.config import base, generator


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "" (demo) or one of `config.VARIANTS`."""
    c = base("ar", variant)
    c.update(generator(variant))
    # How often a caption is dropped, for guidance, and how much of the earlier bits is random.
    c.loss = dict(caption_dropout=0.1, bit_noise=0.0 if variant else 0.3)
    if not variant:
        c.train.update(steps=1_400, eval_every=280, save_every=140, image_every=280)
    c.sample.update(guidance=9.0 if variant else 1.0, temperature=0.5)
    return c
