"""matplotlib where it is installed."""

from typing import Any

from instella_jax.errors import UserError


def load_pyplot() -> Any:
    """Return matplotlib.pyplot, drawing to files alone.

    Raises:
      UserError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "the plot needs matplotlib: pip install 'instella-jax[benchmarks]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
