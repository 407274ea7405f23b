"""Encodes the first training scenes of a generator's config by its tokenizer.

    python -m tools.encode_scenes --config=configs/t2i_diffusion.py --out=my_codes

Training with `--config.data.scenes.codes=my_codes` then neither draws nor encodes them. Those of
the demo, which are shipped, were made so: `--out=instella_jax/assets/demo_codes`.
"""

from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from instella_jax.data.codes import pack_bits
from instella_jax.data.scene_codes import write_codes
from instella_jax.data.sources import scenes_source
from instella_jax.errors import command_line
from instella_jax.runtime import devices, sharding
from instella_jax.stages import make_stage
from instella_jax.stages.known_codes import describe_scenes
from instella_jax.stages.parameters import load_frozen

BATCH = 100


def encode(config: Any, count: int) -> np.ndarray:
    """Return the packed codes of the first training scenes: uint8 [count, ceil(N K / 8)]."""
    mesh = sharding.make_mesh(config.mesh)
    stage: Any = make_stage(config)
    source = scenes_source(config.data, "train")
    packed = []
    with sharding.use(mesh):
        frozen = load_frozen(stage, mesh)
        encoder = jax.jit(lambda frozen, images: pack_bits(stage.encode(frozen, images)))
        for first in range(0, count, BATCH):
            images = np.stack([source[i]["image"] for i in range(first, first + BATCH)])
            packed.append(np.asarray(encoder(frozen, images)))
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
