"""Configs that runs wrote into their workdirs, those of older versions as this one means them.

When a key of `loss` or one that says what is trained is renamed, removed or added, it gets a line
here; `tests/test_stored_config.py` has the configs of version 0.1.0 and fails without it.
"""

import functools
import logging
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from instella_jax.config import Config, base, generator

logger = logging.getLogger(__name__)

# Keys by their old names; None for what is no more and changes nothing.
RENAMED: dict[str, str | None] = {"loss.code_weight": "loss.code.weight"}

# What runs did before there was a key for it.
_MEANT: dict[str, Any] = {
    "optimizer.kind": "adamw", "optimizer.muon.ns_steps": 5, "optimizer.muon.exclude": (),
}  # fmt: skip
_TERM = {"weight": 0.0, "start": 0, "warmup": 0}
_TOKENIZER = {
    "loss": {
        "pixel": {"kind": "smooth_l1", "weight": 1.0, "start": 0, "warmup": 0},
        "code": _TERM,
        "entropy": _TERM,
        "balance": _TERM,
        "perceptual": {"weight": 0.0, "start": 0, "warmup": 10_000, "weights": "", "window": 0},
        "adversarial": {
            "kind": "patches", "weight": 0.0, "start": 20_000, "warmup": 0, "adaptive": True,
            "lecam": 0.001, "augment": True, "width": 64, "halvings": 3, "heads": 4,
            "learning_rate": 1e-4, "b1": 0.5, "b2": 0.9,
        },
        "features": {"weight": 0.0, "start": 0, "warmup": 10_000},
        "alignment": {
            "weight": 0.0, "start": 0, "warmup": 0, "block": 0, "learning_rate": 1e-4,
        },
        "vision": "",
        "quantizer": "bernoulli",
        "tail_drop": 0.0,
        "freeze_encoder": False,
    }
}  # fmt: skip
_GENERATOR = {**_MEANT, "pos_emb_std": 0.0, "data.scenes.codes": ""}
_DIFFUSION = {"loss.draws": 1, "loss.time_shift": 1.0}
MEANT: dict[str, dict[str, Any]] = {
    "tokenizer": {**_MEANT, **flatten_dict(_TOKENIZER, sep=".")},
    "diffusion": {**_GENERATOR, **_DIFFUSION},
    "ar": {**_GENERATOR, "loss.bit_noise": 0.0},
}


# The sizes of a network are those of the run alone.
_COMPLETE = ("model",)


def from_json(values: dict[str, Any], path: Path) -> Config:
    """Return the config of a run with the keys that this version has for it.

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
    return ConfigDict(_with_tuples(unflatten_dict(new, sep=".")))


def complete(own: Config, newer: Config | None = None) -> None:
    """Add the keys that a config lacks, as another one has them; by default those of `config.base`.

    That is all keys but those of one stage alone, which `from_json` adds to older configs.
    """
    whole: Config = _defaults(own.stage) if newer is None else newer
    for key, value in whole.items():
        if key not in own:
            own[key] = value
        elif key not in _COMPLETE and hasattr(value, "items"):
            complete(own[key], value)


def _defaults(stage: str) -> Config:
    """Return the keys that all stages, or all generators, have."""
    config: Config = base(stage, "")
    if stage != "tokenizer":
        config.update(generator(""))
    return config


def _with_tuples(value: Any) -> Any:
    """Return JSON with tuples for its lists, as config files have them."""
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


@functools.cache
def _tell(path: Path, key: str, name: str | None) -> None:
    """Say once that a key has another name, or none."""
    meaning = "is no more, and nothing needs it" if name is None else f"is {name} now"
    logger.warning("%s is of an older version: %s %s", path, key, meaning)
