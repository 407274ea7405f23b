"""Configs that older versions wrote into workdirs, as this version means them.

When a key of `loss` or one that says what is trained is renamed, removed or added, it gets a line
here; `tests/training/test_old_configs.py` has the configs of version 0.1.0 and fails without it.
"""

import functools
import logging
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

logger = logging.getLogger(__name__)

# Keys by their old names; None for what is no more and changes nothing.
RENAMED: dict[str, str | None] = {"loss.code_weight": "loss.code.weight"}

# What runs did before there was a key for it.
_MEANT: dict[str, Any] = {"optimizer.kind": "adamw"}
_TERM = {"weight": 0.0, "start": 0, "warmup": 0}
_TOKENIZER = {
    "loss": {
        "pixel": {"kind": "smooth_l1", "weight": 1.0, "start": 0, "warmup": 0},
        "code": _TERM,
        "entropy": _TERM,
        "balance": _TERM,
        "perceptual": {"weight": 0.0, "start": 0, "warmup": 10_000, "weights": "", "window": 0},
        "adversarial": {
            "weight": 0.0, "start": 20_000, "warmup": 0, "adaptive": True, "lecam": 0.001,
            "augment": True, "width": 64, "halvings": 3, "learning_rate": 1e-4, "b1": 0.5,
            "b2": 0.9,
        },
        "quantizer": "bernoulli",
        "tail_drop": 0.0,
        "freeze_encoder": False,
    }
}  # fmt: skip
_DIFFUSION = {"loss.draws": 1, "loss.time_shift": 1.0, "pos_emb_std": 0.0}
MEANT: dict[str, dict[str, Any]] = {
    "tokenizer": {**_MEANT, **flatten_dict(_TOKENIZER, sep=".")},
    "diffusion": {**_MEANT, **_DIFFUSION},
    "ar": {**_MEANT, "pos_emb_std": 0.0},
}


def migrate(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of a run's config with the keys that this version has for them.

    Args:
      values: of the whole config, as JSON has them.
      path: where they are from, for the line of the log that tells of renamed keys.
    """
    old = flatten_dict(values, keep_empty_nodes=True, sep=".")
    new = {key: value for key, value in old.items() if key not in RENAMED}
    for key, name in RENAMED.items():
        if key in old:
            if name is not None:
                new.setdefault(name, old[key])
            _tell(path, key, name)
    for key, value in MEANT.get(str(values.get("stage")), {}).items():
        new.setdefault(key, value)
    return unflatten_dict(new, sep=".")


@functools.cache
def _tell(path: Path, key: str, name: str | None) -> None:
    """Say once that a key has another name, or none."""
    meaning = "is no more, and nothing needs it" if name is None else f"is {name} now"
    logger.warning("%s is of an older version: %s %s", path, key, meaning)
