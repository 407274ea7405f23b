"""The optimizer and its learning rate over the steps."""

import optax

from instella_jax.config import Config
from instella_jax.errors import UserError


def make_schedule(config: Config, steps: int) -> optax.Schedule:
    """Return linear warm-up, then constant or a cosine down to `final_fraction` of the peak at
    `steps`.

    Raises:
      UserError: the schedule's name is unknown.
    """
    if config.schedule == "constant":
        if not config.warmup_steps:  # for which optax's warm-up stays at 0
            return optax.constant_schedule(config.learning_rate)
        return optax.warmup_constant_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0,
            config.learning_rate,
            config.warmup_steps,
            max(steps, config.warmup_steps + 1),
            end_value=config.learning_rate * config.final_fraction,
        )
    raise UserError(f"optimizer.schedule is {config.schedule!r}: expected 'constant' or 'cosine'")


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Return AdamW after a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
