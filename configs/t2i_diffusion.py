"""Trains the text-to-image diffusion generator on the codes of a frozen tokenizer.

Demo (no variant), emoji scenes on the shipped tokenizer, some minutes on any CPU:
  python -m instella_jax.main --config=configs/t2i_diffusion.py
Sample with the shipped weights:
  python -m instella_jax.main --config=configs/t2i_diffusion.py --mode=sample \
      --config.sample.prompt="two red hearts on a blue background"
Published sizes, on your own pictures, with a tokenizer and OLMo as model folders:
  python -m instella_jax.main --config=configs/t2i_diffusion.py:instella_512 \
      --config.tokenizer=/models/tokenizer --config.text.encoder=/models/olmo \
      --config.data.folder.path=/my/pictures
The same on codes made by `instella-jax data encode`, two data sets mixed 3 to 1:
  python -m instella_jax.main --config=configs/t2i_diffusion.py:instella_512 \
      --config.tokenizer=/models/tokenizer --config.text.encoder=/models/olmo \
      --config.data.kind=codes --config.data.codes.weights=3:1 \
      --config.data.codes.path=/data/laion-codes,/data/synthetic-codes
"""

from ml_collections import ConfigDict

from instella_jax.config import base, generator


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "" (demo) or one of `config.VARIANTS`."""
    c = base("diffusion", variant)
    c.update(generator(variant))
    # What the network is asked, "epsilon" (is the bit flipped) or "x" (the clean bit); how times
    # are sampled, "logit_normal" or "uniform", and their shift towards noise, if over 1; how many
    # noisy versions of each code, each at its own time, a batch has; how often a caption is dropped
    # for guidance.
    c.loss = dict(
        target="epsilon", times="logit_normal", time_shift=1.0, draws=1, caption_dropout=0.1
    )
    if not variant:
        c.loss.update(target="x", time_shift=3.0, draws=2)
        c.train.update(steps=1_150, eval_every=230, save_every=230, image_every=230)
        # The largest kernels, and AdamW costs less (docs/demo.md).
        c.optimizer.muon.exclude = ("modulation",)
    c.sample.update(steps=20, temperature=1.0, protocol=1)
    c.sample.guidance = 7.5 if variant else 1.0
    c.sample.rho = 1.0 if variant else 0.25
    return c
