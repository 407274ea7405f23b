"""Trains the 1D binary tokenizer.

Demo (no variant), 64x64 emoji scenes in 16 tokens of 32 bits, on any CPU:
  python -m instella_jax.main --config=configs/tokenizer.py
Published sizes, on your own pictures:
  python -m instella_jax.main --config=configs/tokenizer.py:instella_512 \
      --config.data.folder.path=/my/pictures
In several shapes, each batch in one of them; a picture goes to the closest, see
`instella_jax/data/buckets.py`. Held-out pictures are measured at data.image_size, square:
  python -m instella_jax.main --config=configs/tokenizer.py:instella_512 \
      --config.data.folder.path=/my/pictures \
      --config.data.buckets=512x512,384x640,640x384,768x768
A second stage, in which the encoder and so every code stays and the decoder learns more shapes:
  python -m instella_jax.main --config=configs/tokenizer.py:instella_512 \
      --workdir=runs/decoder --config.init_from=runs/tokenizer-instella_512/model \
      --config.loss.freeze_encoder=True --config.data.folder.path=/my/pictures \
      --config.data.buckets=512x512,768x768,1024x1024
docs/demo.md says what the demo costs and reaches.
"""

from typing import Any

from ml_collections import ConfigDict

from instella_jax.config import base


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "" (demo), "instella_512" or "instella_1024"."""
    c = base("tokenizer", variant)
    # models.tokenizer.TokenizerConfig
    sizes: dict[str, Any] = dict(
        patch_size=16,
        num_tokens=128,
        bits=64,
        encoder_layers=12,
        encoder_heads=12,
        encoder_head_dim=64,
        decoder_layers=16,
        decoder_heads=16,
        decoder_head_dim=64,
        rope_axes=(8, 28, 28),
        rope_theta=10_000.0,
        downsample_after=(7,),
        upsample_after=(7,),
        scale=1024,
        latent_grid=False,
    )
    c.model = sizes
    # Temperature of the sampled bits: linear from start to end over so many steps. With a frozen
    # encoder no bits are sampled, and only decoder and bit vectors are trained.
    c.loss = dict(
        code_weight=0.01,
        temperature=dict(start=1.0, end=0.1, steps=50_000),
        freeze_encoder=False,
    )
    if variant:
        c.train.update(steps=1_000_000, batch_size=256)
        c.optimizer.update(b2=0.95, warmup_steps=9_000)
        return c
    c.model.update(
        num_tokens=16,
        bits=32,
        encoder_layers=2,
        encoder_heads=4,
        encoder_head_dim=48,
        decoder_layers=4,
        decoder_heads=4,
        decoder_head_dim=48,
        rope_axes=(8, 20, 20),
        downsample_after=(),
        upsample_after=(),
        scale=64,
        latent_grid=True,
    )
    # As the demo's generators have it.
    c.data.scenes.places = "thirds"
    c.loss.update(code_weight=0.0, temperature=dict(start=0.5, end=0.1, steps=2_000))
    c.optimizer.update(
        learning_rate=2e-3, warmup_steps=200, b2=0.95, schedule="cosine", final_fraction=0.02
    )
    c.train.update(
        steps=9_000, batch_size=32, steps_per_call=10, ema_decay=0.998, keep=2,
        log_every=100, eval_every=500, save_every=500, image_every=2_000,
    )  # fmt: skip
    return c
