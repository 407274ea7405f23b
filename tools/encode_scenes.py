"""Encodes the first training scenes of a generator's config by its tokenizer.

    python -m tools.encode_scenes --config=configs/t2i_diffusion.py --out=my_codes

Training with `--config.data.scenes.codes=my_codes` then neither renders nor encodes them. The
shipped ones of the demo were made so: `--out=instella_jax/assets/demo_codes`.
"""

from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from instella_jax import BinaryTokenizer
from instella_jax.data.scene_codes import write_codes
from instella_jax.data.sources import scenes_source
from instella_jax.errors import command_line
from instella_jax.runtime import devices
from instella_jax.stages.precomputed_codes import describe_scenes

BATCH = 100


def encode(config: Any, count: int) -> np.ndarray:
    """Return the packed codes of the first training scenes: uint8 [count, ceil(N K / 8)]."""
    source = scenes_source(config.data, "train")
    tokenizer = BinaryTokenizer.from_pretrained(config.tokenizer)
    packed = []
    for first in range(0, count, BATCH):
        images = np.stack([source[i]["image"] for i in range(first, first + BATCH)])
        packed.append(np.asarray(tokenizer.dispatch_encode(images))[:BATCH])
        print(f"{first + BATCH}/{count} scenes", end="\r", flush=True)
    print()
    return np.concatenate(packed)


def main() -> None:
    """Encode and write, as the command line says."""
    given = config_flags.DEFINE_config_file("config", None, "Of a generator that trains on scenes.")
    count = flags.DEFINE_integer(
        "count", 30_000, f"Scenes, a multiple of {BATCH}.", lower_bound=BATCH
    )
    out = flags.DEFINE_string("out", None, "Folder of the codes.", required=True)
    flags.mark_flag_as_required("config")

    def run(_: list[str]) -> None:
        with command_line():
            devices.start(given.value)
            packed = encode(given.value, count.value // BATCH * BATCH)
            write_codes(out.value, packed, describe_scenes(given.value))

    app.run(run)


if __name__ == "__main__":
    main()
