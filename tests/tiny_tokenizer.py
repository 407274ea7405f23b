"""The tokenizer stage in a size that compiles in seconds: 32x32 scenes, 4 tokens of 8 bits."""

from configs import tokenizer


def shrink(config):
    """Makes any stage small: eight steps of eight pictures, nothing drawn."""
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.data.image_size = 32
    config.data.scenes.max_objects = 1
    config.run.unroll = False
    config.optimizer.update(kind="adamw", warmup_steps=2, schedule="constant", eps=1e-4)
    config.train.update(
        steps=8, batch_size=8, steps_per_call=1, log_every=1, eval_every=0, save_every=4,
        image_every=0, keep=2, ema_decay=0.9,
    )  # fmt: skip
    config.eval.update(batch_size=8, batches=1, pictures=0)
    return config


def get_config(variant=""):
    """Returns the demo's config, made small."""
    config = shrink(tokenizer.get_config(variant))
    config.model.update(
        num_tokens=4, bits=8, encoder_layers=1, encoder_heads=2, encoder_head_dim=8,
        decoder_layers=1, decoder_heads=2, decoder_head_dim=8, rope_axes=(4, 2, 2), scale=32,
    )  # fmt: skip
    return config
