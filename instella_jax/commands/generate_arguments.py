"""Arguments of `instella-jax generate`."""

import argparse
import math

from instella_jax.user_paths import expand, path_argument

EXAMPLES = """\
examples:
  instella-jax generate "a cat above a blue square"
  instella-jax generate "two dogs" --count 4 --seed 7 --out dogs
  instella-jax generate "a red heart" --model demo_ar --out heart.png
  instella-jax generate --prompts prompts.txt --model runs/t2i_diffusion --json
  instella-jax generate --from heart.png --out again.png
  instella-jax generate "an owl" --lora runs/owl/run/lora --tokenizer runs/owl/tokenizer/model
A line of a prompt file is a text, or JSON such as
  {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "height": 64, "width": 96}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add prompts, model, settings, and where the pictures go."""
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="a text in quotes, or several")
    parser.add_argument(
        "--prompts", type=expand, metavar="FILE", help="a prompt a line; - is standard input"
    )
    parser.add_argument(
        "--from", dest="source", type=path_argument, metavar="PNG",
        help="make this picture again, with other settings where some are given",
    )  # fmt: skip
    _add_model(parser)
    _add_settings(parser)
    parser.add_argument(
        "--out", type=path_argument, metavar="PATH",
        help="a folder, whose numbers go on from what is there (default: drawn), or a .png file "
        "for one picture",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite a .png file that is there")
    parser.add_argument(
        "--json", action="store_true",
        help="a line of JSON for each picture on standard output; all else goes to standard error",
    )  # fmt: skip


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=expand,
        help="demo, demo_ar, a folder (a model, a run, a published model), or the id of a "
        "repository of the Hugging Face hub (default: demo)",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=expand, help="of images, where the model has none")
    parser.add_argument("--text-encoder", type=expand, help="where the model has none")
    parser.add_argument("--kind", choices=("diffusion", "ar"), help="where the model has both")
    parser.add_argument(
        "--lora", type=_adapters, action="append", metavar="FOLDER[:SCALE]",
        help="adapters beside the generator, as training leaves them in RUN/lora; several add up",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32")


def _adapters(text: str) -> tuple[str, float]:
    """Return the folder and the scale of an argument, 1 where it has none."""
    folder, _, scale = text.rpartition(":")
    try:
        value = float(scale) if folder else math.nan
    except ValueError:
        value = math.nan
    return (expand(folder), value) if math.isfinite(value) else (expand(text), 1.0)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--seed", type=int, help="of the first picture of a prompt (default: 0)")
    parser.add_argument("--count", type=int, metavar="N", help="pictures of each prompt (1)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the diffusion sampler (20)")
    guidance = parser.add_mutually_exclusive_group()
    guidance.add_argument(
        "--guidance-scale", type=float, metavar="W",
        help="as in diffusers; 1 is no guidance (default: the model's own)",
    )  # fmt: skip
    guidance.add_argument("--guidance", type=float, metavar="G", help="the published g = W - 1")
    parser.add_argument(
        "--temperature", type=float, help="0 takes the likelier bit (default: the model's own)"
    )
    parser.add_argument(
        "--rho", type=float, help="exponent of the sampler's times (default: the model's own)"
    )
    parser.add_argument("--protocol", type=int, choices=(1, 2), help="how bits are sampled (1)")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="default: as it was trained")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="likewise")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures at a time (16)")
