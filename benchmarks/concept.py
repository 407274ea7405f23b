"""Teaches the demo an object that it has never seen, from a few pictures, and judges it.

    python -m benchmarks.concept --workdir=runs/owl [--concept=owl --pictures=20]

Writes the pictures, `new/`, and scenes of what the demo knows, `old/`, both with captions; trains
the decoder of the tokenizer (the encoder, and so every code, stays) and then adapters of the
generator on a mixture of the two folders; and judges prompts of the new object and held-out prompts
of the old ones, with the shipped weights and with what was learned. Goes on where it was stopped.
"""

import argparse
import collections
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import whole
from configs import t2i_ar, t2i_diffusion, tokenizer
from instella_jax.config import Config
from instella_jax.data.scenes import captions, sprites
from instella_jax.data.scenes.maker import World, training_scene
from instella_jax.data.scenes.scene import Scene, Stream
from instella_jax.data.scenes.source import heldout_prompts, render
from instella_jax.errors import UserError, command_line
from instella_jax.evaluation.judge import judge, summarise
from instella_jax.reporting.pictures import save_grid, save_png
from instella_jax.runtime import devices
from instella_jax.sampling.load import load_sampler
from instella_jax.sampling.options import options_from_config
from instella_jax.sampling.sampler import Sampler
from instella_jax.stages.parameters import with_target_of_weights
from instella_jax.training.loop import train
from instella_jax.weights.model_folder import ASSETS

STYLE, PLACES, MOST = "twemoji", "thirds", 3
GENERATORS = {"diffusion": t2i_diffusion, "ar": t2i_ar}
# So many that a share is known to 0.03.
PROMPTS, OLD_PROMPTS = 128, 128
# The projections of the blocks, and the two that codes go in and out by: an object that was never
# seen has bits that were never together.
TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "proj_cond", "net.0.proj", "net.2", "x_embedder",
    "proj_out",
)  # fmt: skip
REHEARSAL, CAPTIONS = 400, 4
# Of the diffusion sampler, before and after.
RHO = 0.5

Captioned = tuple[str, Scene]


def scenes(concepts: tuple[str, ...], wanted: str | None, name: str, count: int) -> list[Captioned]:
    """Return scenes with captions that say everything, no two alike.

    Args:
      concepts: what they show, the more often the more often it is named.
      wanted: what each of them shows, None for anything.
      name: of the set; those of two names have nothing to do with each other.
      count: how many.
    """
    world = World(concepts, (STYLE,), PLACES, MOST, 64)
    found: dict[str, Scene] = {}
    index = 0
    while len(found) < count:
        scene = training_scene(Stream("concept", name, index), world)
        text = captions.full_caption(Stream("concept", name, "caption", index), scene)
        index += 1
        if text is not None and (wanted is None or wanted in scene.counts):
            found.setdefault(text, scene)
    return list(found.items())


def varied(pictures: list[Captioned], count: int) -> list[Captioned]:
    """Choose pictures as one would by hand: each the one that shows most of what is rare so far."""
    seen: collections.Counter[str] = collections.Counter()
    left, chosen = list(pictures), []
    while len(chosen) < count:
        # Sorted, since sums in another order may differ, and the choice should be the same again.
        best = max(left, key=lambda x: np.mean([1 / (1 + seen[fact]) for fact in sorted(facts(x))]))
        left.remove(best)
        chosen.append(best)
        seen.update(facts(best))
    return chosen


def facts(picture: Captioned) -> set[str]:
    """Return what is to vary: background, number of objects, the words of the caption."""
    text, scene = picture
    return {scene.background, f"{len(scene.objects)} objects", *text.replace(",", "").split()}


def write_folder(folder: Path, pictures: list[Captioned]) -> None:
    """Write pictures, each with a text file of different captions, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (text, scene) in enumerate(pictures):
        path = folder / f"{number:04d}.png"
        if not path.exists():
            texts = [captions.caption(Stream(text, n), scene) for n in range(CAPTIONS - 1)]
            lines = "\n".join(dict.fromkeys([text, *texts]))
            path.with_suffix(".txt").write_text(lines + "\n", encoding="utf-8")
            save_png(path, render(scene, 64))


def on_folders(config: Config, workdir: Path, steps: int, weights: str) -> Config:
    """Let a config learn from the two folders."""
    config.data.kind, config.data.workers = "folder", 0
    config.data.folder.update(
        path=f"{workdir / 'new'},{workdir / 'old'}", weights=weights, heldout=0.05, min_keep=1.0,
        flip=0.0,
    )  # fmt: skip
    config.optimizer.update(kind="adamw", warmup_steps=20, schedule="cosine", final_fraction=0.05)
    config.train.update(
        steps=steps, batch_size=16, steps_per_call=10, log_every=50, eval_every=0, image_every=0,
        save_every=100, ema_decay=0.99, keep=1,
    )  # fmt: skip
    config.eval.update(batch_size=16, pictures=0)
    return config


def decoder_config(workdir: Path, steps: int) -> Config:
    """Return the config by which the decoder learns to draw the object."""
    config = on_folders(tokenizer.get_config(), workdir, steps, "1:1")
    config.init_from = str(ASSETS / "demo_tokenizer")
    config.loss.freeze_encoder = True
    config.optimizer.learning_rate = 5e-4
    return config


def adapter_config(kind: str, workdir: Path, steps: int, rank: int) -> Config:
    """Return the config by which adapters of the shipped generator learn its name."""
    config = with_target_of_weights(GENERATORS[kind].get_config())
    config = on_folders(config, workdir, steps, "1:2")
    config.tokenizer = str(workdir / "tokenizer" / "model")
    config.lora.update(rank=rank, alpha=2.0 * rank, targets=TARGETS)
    config.optimizer.learning_rate = 1.5e-3
    return config


def sample_and_judge(
    sampler: Sampler, config: Config, prompts: list[Captioned], concept: str
) -> tuple[np.ndarray, dict[str, float]]:
    """Return pictures of prompts, and the shares that are right."""
    options = options_from_config(config.sample)
    if config.stage == "diffusion":
        options = dataclasses.replace(options, rho=RHO)
    pictures = sampler([text for text, _ in prompts], options)
    known = (*sprites.CORE, concept)
    return pictures, summarise(judge(pictures, [scene for _, scene in prompts], known))


def timed(what: str, work: Callable[[], Any]) -> Any:
    """Do something, and say how long it took."""
    begin = time.perf_counter()
    result = work()
    print(f"{what}: {time.perf_counter() - begin:.0f} s", flush=True)
    return result


def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Teach and judge; return the shares that are right, by what was judged, {} when stopped."""
    concept, workdir = options.concept, options.workdir
    if concept not in sprites.catalogue() or concept in sprites.CORE:
        raise UserError(f"{concept!r} is none of the shipped drawings that the demo does not know")
    devices.start(t2i_diffusion.get_config(), 1, training=True)
    often = (concept,) * 12 + sprites.CORE
    new = varied(scenes(often, concept, "new", 10 * options.pictures), options.pictures)
    write_folder(workdir / "new", new)
    write_folder(workdir / "old", scenes(sprites.CORE, None, "old", REHEARSAL))
    taught = {text for text, _ in new}
    asked = scenes(often, concept, "asked", PROMPTS + len(taught))
    prompts = {
        "new": [(text, scene) for text, scene in asked if text not in taught][:PROMPTS],
        "old": heldout_prompts(OLD_PROMPTS, places=PLACES, max_objects=MOST),
    }
    decoder = decoder_config(workdir, options.decoder_steps)
    if not timed("decoder", lambda: train(decoder, workdir / "tokenizer")):
        return {}  # stopped
    config = adapter_config(options.kind, workdir, options.steps, options.rank)
    if not timed("adapters", lambda: train(config, workdir / "run")):
        return {}
    results, shown = {}, []
    for when, (settings, folder) in {
        "before": (GENERATORS[options.kind].get_config(), None),
        "after": (config, workdir / "run"),
    }.items():
        sampler, _ = load_sampler(settings, folder)
        for name, asked in prompts.items():
            pictures, right = sample_and_judge(sampler, settings, asked, concept)
            results[f"{name}, {when}"] = right
            if name == "new":
                shown.append(pictures[:16])
    pairs = np.stack(shown, axis=1).reshape(-1, *shown[0].shape[1:])
    texts = [text for text, _ in prompts["new"][:16]]
    save_grid(workdir / "concept.png", pairs, [t for x in texts for t in ("before", x)], together=2)
    print(f"share right of {PROMPTS} prompts of the new object, {OLD_PROMPTS} of the old ones:")
    for name, right in results.items():
        figures = "  ".join(f"{respect} {value:.2f}" for respect, value in right.items())
        print(f"  {name}: {figures}")
    return results


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where everything goes")
    parser.add_argument("--concept", default="owl", help="one of the shipped drawings")
    parser.add_argument("--kind", default="diffusion", choices=list(GENERATORS))
    parser.add_argument("--pictures", type=whole(2), default=20, help="of the new object")
    parser.add_argument("--decoder-steps", type=whole(10), default=200, help="multiple of 10")
    parser.add_argument("--steps", type=whole(10), default=500, help="of the adapters, likewise")
    parser.add_argument("--rank", type=whole(1), default=16, help="of the adapters")
    options = parser.parse_args()
    with command_line():
        run(options)


if __name__ == "__main__":
    main()
