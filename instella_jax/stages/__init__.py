"""What is trained: each stage joins networks, losses and data for the one training loop."""

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.stages.base import Stage


def make_stage(config: Config) -> Stage:
    """Build the stage that `config.stage` names.

    Raises:
      UserError: there is no such stage.
    """
    if config.stage == "tokenizer":
        from instella_jax.stages.tokenizer import TokenizerStage

        return TokenizerStage(config)
    if config.stage == "diffusion":
        from instella_jax.stages.diffusion import DiffusionStage

        return DiffusionStage(config)
    if config.stage == "ar":
        from instella_jax.stages.autoregressive import AutoregressiveStage

        return AutoregressiveStage(config)
    raise UserError(f"stage is {config.stage!r}: expected 'tokenizer', 'diffusion' or 'ar'")
