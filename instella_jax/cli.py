"""The console command `instella-jax`."""

from instella_jax.main import main as run_config


def main() -> None:
    """Runs a config: `instella-jax --config=...` is `python -m instella_jax.main --config=...`."""
    run_config()
