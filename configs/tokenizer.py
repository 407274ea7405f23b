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
Resolutions in turn: each begins with the weights of the one before, which fit because coordinates
span the same range at every size:
  python -m instella_jax.main --config=configs/tokenizer.py:instella_768 \
      --config.init_from=runs/tokenizer-instella_512/model --config.data.folder.path=/my/pictures
A second stage, in which the encoder and so every code stays, and the decoder learns its size, half
as much again and twice it; `+stage2` goes with every variant:
  python -m instella_jax.main --config=configs/tokenizer.py:instella_512+stage2 \
      --config.data.folder.path=/my/pictures
Fine-tuning on a few hundred pictures, the whole of it or the decoder alone:
  python -m instella_jax.main --config=configs/tokenizer.py:instella_512+finetune \
      --config.init_from=/a/model --config.data.folder.path=/my/pictures
On a folder of photographs, at 256 pixels on a GPU or at 128 in minutes on a CPU, with LPIPS (which
needs `pip install -e '.[perceptual]'`) and a discriminator; docs/tokenizer.md has figures:
  python -m instella_jax.main --config=configs/tokenizer.py:photographs_256 \
      --config.data.folder.path=/my/pictures
docs/demo.md says what the demo costs and reaches.
"""

from typing import Any

from ml_collections import ConfigDict

from instella_jax.config import Config, base
from instella_jax.errors import UserError

# Variants for a folder of photographs, by the side of the pictures in pixels.
PHOTOGRAPHS = {"photographs_128": 128, "photographs_256": 256}


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant.

    Args:
      variant: "" (demo), "instella_512", "instella_768", "instella_1024", or one of `PHOTOGRAPHS`;
        then, after a "+", one of `RECIPES`, which begin with a model that there is: that of the
        variant's own run, unless `init_from` names another.
    """
    variant, plus, recipe = variant.partition("+")
    c: Config = photographs(PHOTOGRAPHS[variant]) if variant in PHOTOGRAPHS else scratch(variant)
    if not plus:
        return c
    if recipe not in RECIPES:
        raise UserError(f"unknown variant +{recipe}: expected one of +{', +'.join(RECIPES)}")
    c.init_from = f"runs/tokenizer{'-' * bool(variant)}{variant}/model"
    c.shipped = ""
    # Bits are sure of themselves by now.
    c.loss.temperature.update(start=c.loss.temperature.end, steps=1)
    RECIPES[recipe](c)
    return c


def stage2(c: Config) -> None:
    """Train the decoder alone, at several sizes."""
    side = c.data.image_size
    c.loss.freeze_encoder = True
    if c.data.kind == "folder":
        c.data.buckets = ",".join(f"{s}x{s}" for s in (side, side * 3 // 2, 2 * side))
    c.train.batch_size = max(8, c.train.batch_size // 4)


def finetune(c: Config) -> None:
    """Train on a few hundred pictures, in less than 16 GB at the published size."""
    c.data.kind = "folder"
    c.data.folder.heldout = 0.1
    c.loss.perceptual.update(weight=c.loss.perceptual.weight or 1.0, start=0, warmup=100)
    if c.data.image_size > 256:
        c.loss.perceptual.window = 256
    # A discriminator of its own would see too few pictures.
    c.loss.adversarial.weight = 0.0
    c.run.remat = "full"
    c.optimizer.update(learning_rate=5e-5, warmup_steps=100, schedule="cosine", final_fraction=0.1)
    c.train.update(
        steps=2_000, batch_size=8, accumulate=2, steps_per_call=1, ema_decay=0.99, log_every=20,
        eval_every=250, save_every=250, image_every=500, keep=2,
    )  # fmt: skip
    c.eval.update(batch_size=4, batches=16, pictures=8)
    c.plan.update(chip="L40S", devices=1, memory_gb=16.0)


def finetune_decoder(c: Config) -> None:
    """Do the same with a frozen encoder, after which codes made before still decode."""
    finetune(c)
    c.loss.freeze_encoder = True
    c.optimizer.learning_rate = 1e-4


RECIPES = {"stage2": stage2, "finetune": finetune, "finetune_decoder": finetune_decoder}


def scratch(variant: str) -> Config:
    """Return the config of the demo or of the published sizes."""
    c = base("tokenizer", variant)
    # models.tokenizer_config.TokenizerConfig
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
    # Each loss counts from step `start` on, and its weight rises over `warmup` steps from there.
    # A weight of 0 computes, loads and trains nothing.
    c.loss = dict(
        pixel=dict(kind="smooth_l1", weight=1.0, start=0, warmup=0),
        # Of the bits: p (1 - p) and entropy of each, and evenness of their use.
        code=dict(weight=0.01, start=0, warmup=0),
        entropy=dict(weight=0.0, start=0, warmup=0),
        balance=dict(weight=0.0, start=0, warmup=0),
        # LPIPS.
        perceptual=dict(weight=0.0, start=0, warmup=10_000, weights="", window=0),
        adversarial=dict(
            kind="patches", weight=0.0, start=20_000, warmup=0, adaptive=True, lecam=0.001,
            augment=True, width=64, halvings=3, heads=4, learning_rate=1e-4, b1=0.5, b2=0.9,
        ),
        # Through the features of the frozen network in the folder `vision`.
        features=dict(weight=0.0, start=0, warmup=10_000),
        alignment=dict(weight=0.0, start=0, warmup=0, block=7, learning_rate=1e-4),
        vision="",
        quantizer="bernoulli",
        tail_drop=0.0,
        # Temperature of the sampled bits: linear from start to end over so many steps. With a
        # frozen encoder no bits are sampled, and only decoder and bit vectors are trained.
        temperature=dict(start=1.0, end=0.1, steps=50_000),
        freeze_encoder=False,
    )  # fmt: skip
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
    c.loss.update(
        code=dict(weight=0.0),
        temperature=dict(start=0.5, end=0.1, steps=2_000),
        alignment=dict(block=1),
    )
    c.optimizer.update(
        learning_rate=2e-3, warmup_steps=200, b2=0.95, schedule="cosine", final_fraction=0.02
    )
    c.train.update(
        steps=9_000, batch_size=32, steps_per_call=10, ema_decay=0.998, keep=2,
        log_every=100, eval_every=500, save_every=500, image_every=2_000,
    )  # fmt: skip
    return c


def photographs(side: int) -> Config:
    """Return the config for a folder of photographs: smooth-L1, LPIPS, and later a discriminator.

    Args:
      side: of the pictures in pixels: 256 for a GPU, 128 for a CPU.
    """
    c: Config = scratch("")
    c.shipped = ""
    c.data.update(kind="folder", image_size=side, workers=0)
    c.data.folder.update(heldout=0.1, min_keep=0.5)
    c.loss.temperature.update(start=0.5, end=0.1)
    c.loss.perceptual.weight = 1.0
    c.loss.adversarial.weight = 0.5
    c.optimizer.update(final_fraction=0.1)
    if side == 256:
        c.data.workers = 8
        c.model.update(
            num_tokens=256, bits=32, encoder_layers=8, encoder_heads=8, encoder_head_dim=64,
            decoder_layers=8, decoder_heads=8, decoder_head_dim=64, rope_axes=(8, 28, 28),
            scale=1024,
        )  # fmt: skip
        c.run.update(dtype="bfloat16", remat="dots", unroll=False)
        c.loss.temperature.steps = 50_000
        c.loss.features.warmup = 2_000
        c.loss.alignment.block = 3
        c.loss.perceptual.warmup = 2_000
        c.loss.adversarial.update(start=20_000, warmup=2_000)
        c.optimizer.update(learning_rate=3e-4, warmup_steps=2_000)
        c.train.update(
            steps=100_000, batch_size=64, steps_per_call=1, ema_decay=0.9999, eval_every=2_500,
            save_every=2_500, image_every=2_500,
        )  # fmt: skip
        return c
    c.model.update(num_tokens=64, scale=128)
    c.loss.temperature.steps = 400
    c.loss.features.warmup = 50
    # On windows LPIPS pulls harder: at weight 1 it left textures of no shape (docs/tokenizer.md).
    c.loss.perceptual.update(weight=0.1, warmup=50, window=48)
    c.loss.adversarial.update(start=500, warmup=50, width=32)
    c.optimizer.update(warmup_steps=50)
    c.train.update(
        steps=800, batch_size=8, steps_per_call=1, ema_decay=0.99, log_every=20, eval_every=200,
        save_every=100, image_every=400,
    )  # fmt: skip
    c.eval.update(batch_size=8, batches=8, pictures=8)
    return c
