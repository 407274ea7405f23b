"""`instella-jax eval ...`: a number about a model, or pictures for a benchmark, by one command."""

import argparse
import contextlib
import dataclasses
from typing import Any

from instella_jax.commands import measure_pictures, measure_reconstruction
from instella_jax.commands.json_report import add_json
from instella_jax.commands.sampled_model import add_model_arguments, find_config, joined
from instella_jax.errors import UserError
from instella_jax.user_paths import path_argument


def add_parser(commands: Any) -> Any:
    """Add `eval` to the parser of the console command; return where its actions are added."""
    measure = commands.add_parser("eval", help="a number about a model", description=__doc__)
    kinds = measure.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_scenes(kinds)
    _add_export(kinds)
    measure_reconstruction.add_reconstruction(kinds)
    measure_pictures.add_fid(kinds)
    measure_pictures.add_rfid(kinds)
    measure_pictures.add_clip(kinds)
    measure_pictures.add_inception(kinds)
    return kinds


def _add_scenes(kinds: Any) -> None:
    scenes = kinds.add_parser(
        "scenes",
        help="SceneEval: six tasks in the manner of GenEval on the embedded scenes",
        description="Samples held-out prompts of the embedded scenes and judges the pictures, "
        "after measuring the judge itself. Writes report.json, report.md and pictures.png.",
    )
    add_model_arguments(scenes)
    scenes.add_argument(
        "--tasks",
        default="",
        metavar="A,B",
        help="of single_object, two_objects, counting, colours, position, attribution "
        "(default: all)",
    )
    scenes.add_argument(
        "--prompts", type=int, default=100, metavar="N",
        help="of each task, at most (default: %(default)s)",
    )  # fmt: skip
    scenes.add_argument(
        "--images-per-prompt", type=int, default=4, metavar="N", help="(default: %(default)s)"
    )
    scenes.add_argument(
        "--prompts-seed", type=int, default=0, metavar="N", help="of the choice of prompts"
    )
    scenes.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder of the report"
    )
    add_json(scenes)
    scenes.set_defaults(run=_scenes)


def _scenes(options: argparse.Namespace) -> dict[str, Any] | None:
    from instella_jax.evaluation.scene_eval import TASKS

    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()] or list(TASKS)
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise UserError(f"--tasks names {', '.join(unknown)}: expected some of {', '.join(TASKS)}")
    if options.prompts < 1 or options.images_per_prompt < 1:
        raise UserError("--prompts and --images-per-prompt must be at least 1")
    if options.out.exists():
        raise UserError(f"{options.out} is there already: give another --out or move it away")
    with joined(options):
        return _scenes_report(options, tasks)


def _scenes_report(options: argparse.Namespace, tasks: list[str]) -> dict[str, Any] | None:
    import jax

    from instella_jax.data.scenes import sprites
    from instella_jax.evaluation import reports, scene_eval
    from instella_jax.reporting.pictures import save_grid
    from instella_jax.reporting.progress import Progress
    from instella_jax.runtime.files import fresh_folder
    from instella_jax.sampling.load import load_sampler
    from instella_jax.sampling.options import options_from_config

    config, workdir = find_config(options)
    sampler, weights = load_sampler(config, workdir)
    sampling = dataclasses.replace(
        options_from_config(config.sample), images_per_prompt=options.images_per_prompt
    )
    scenes = config.data.scenes
    world = {
        "concepts": sprites.select(scenes.concepts),
        "styles": tuple(scenes.styles),
        "places": scenes.places,
        "max_objects": scenes.max_objects,
    }
    first = jax.process_index() == 0
    with contextlib.closing(Progress(enabled=first, interval=10.0)) as progress:
        found = scene_eval.scene_eval(
            sampler,
            sampling,
            tasks=tasks,
            prompts_per_task=options.prompts,
            seed=options.prompts_seed,
            show=progress.update,
            **world,
        )
    if not first:
        return None
    scores = found.scores()
    table = reports.markdown_table(
        ("task", "correct", "standard error", "true pictures", "ceiling", "chance"),
        [(name, *score.values()) for name, score in scores.items()],
    )
    report = {
        "evaluation": "SceneEval",
        "scores": scores,
        "meaning": {task: scene_eval.TASKS[task].meaning for task in tasks},
        "weights": weights.record(),
        "sampling": dataclasses.asdict(sampling),
        "prompts_seed": options.prompts_seed,
        "world": {**world, "size": sampler.image_size},
        "images": found.images(),
    }
    with fresh_folder(options.out) as folder:
        reports.save_report(folder, report, table)
        save_grid(folder / "pictures.png", *found.examples())
    print(table, end="")
    print(options.out)
    return report


def _add_export(kinds: Any) -> None:
    give = kinds.add_parser(
        "export",
        help="pictures in the layout of a benchmark: GenEval, DPG-Bench and others",
        description="Samples a benchmark's prompts and writes the pictures as its own programs "
        "read them. Run again after any interruption, it goes on. The prompts are the benchmark's "
        "own files: nothing is fetched.",
    )
    give.add_argument(
        "benchmark",
        metavar="BENCHMARK",
        choices=BENCHMARKS,
        help=f"one of {', '.join(BENCHMARKS)}",
    )
    add_model_arguments(give)
    give.add_argument(
        "--prompts", type=path_argument, required=True, nargs="+", metavar="FILE",
        help="the benchmark's own files of prompts, see docs/evaluation.md",
    )  # fmt: skip
    give.add_argument(
        "--images-per-prompt", type=int, metavar="N", help="(default: the benchmark's)"
    )
    give.add_argument(
        "--name", default="instella-jax",
        help="of the model, where the layout has a folder for it (default: %(default)s)",
    )  # fmt: skip
    give.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR",
        help="the folder to make, for adm the .npz file",
    )  # fmt: skip
    add_json(give)
    give.set_defaults(run=_export)


# Those of `evaluation.layouts`, which the parser does not import.
BENCHMARKS = (
    "geneval", "geneval2", "dpg-bench", "t2i-compbench", "oneig", "wise", "unigenbench", "hpsv3",
    "adm",
)  # fmt: skip


def _export(options: argparse.Namespace) -> dict[str, Any] | None:
    from instella_jax.evaluation.layouts import LAYOUTS, read_pieces

    if options.benchmark == "adm" and options.out.suffix != ".npz":
        raise UserError(f"--out={options.out}: adm makes one file, expected a name with .npz")
    count = options.images_per_prompt or LAYOUTS[options.benchmark].count
    pieces = read_pieces(options.benchmark, options.prompts, count, options.name)
    with joined(options):
        return _export_pieces(options, pieces)


def _export_pieces(options: argparse.Namespace, pieces: list[Any]) -> dict[str, Any] | None:
    import jax

    from instella_jax.evaluation.exports import export
    from instella_jax.reporting.progress import Progress, Throughput, progress_line
    from instella_jax.sampling.load import load_sampler
    from instella_jax.sampling.options import options_from_config

    config, workdir = find_config(options)
    sampler, weights = load_sampler(config, workdir)
    rate = Throughput()
    first = jax.process_index() == 0
    with contextlib.closing(Progress(enabled=first, interval=10.0)) as progress:

        def show(done: int, total: int) -> None:
            rate.update(done)
            line = progress_line(done, total, {}, rate.steps_per_second, noun="picture")
            progress.update(line)

        export(
            options.benchmark,
            pieces,
            sampler,
            options_from_config(config.sample),
            options.out,
            {"weights": weights.record()["digests"]},
            show,
        )
    if not first:
        return None
    print(options.out)
    return {"benchmark": options.benchmark, "out": str(options.out)}
