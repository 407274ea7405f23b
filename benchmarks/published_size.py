"""Imports random weights of the published size and samples with them: seconds and peak memory.

    python -m benchmarks.published_size SCRATCH

Each step runs in a process of its own, whose peak resident memory includes the pages of files that
it maps. Takes 16 GB of disk and, on two CPU cores, some minutes for each picture.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.arguments import whole
from instella_jax.errors import command_line

PROMPT = "a lighthouse on a rocky coast at sunset, oil painting"


def generate(folder: Path, kind: str, side: int, steps: int) -> None:
    """Sample one image twice, compiling included and not."""
    from instella_jax.models.layers import Execution
    from instella_jax.sampling.options import Options
    from instella_jax.sampling.sampler import Sampler

    start = time.perf_counter()
    run = Execution(param_dtype="bfloat16", dtype="bfloat16")
    sampler = Sampler.from_folder(folder, run=run, kind=kind)
    print(f"  load {time.perf_counter() - start:.1f} s", flush=True)
    for seed, what in enumerate(("with compiling", "again")):
        start = time.perf_counter()
        options = Options(height=side, width=side, steps=steps, seed=seed)
        shape = sampler([PROMPT], options).shape
        print(f"  {what} {time.perf_counter() - start:.1f} s, {shape}", flush=True)


def import_random(source: Path, out: Path) -> None:
    """Import what tools/make_random_published.py wrote."""
    from instella_jax.weights.published import import_model

    start = time.perf_counter()
    import_model(source / "model", source / "olmo", out)
    print(f"  import {time.perf_counter() - start:.1f} s", flush=True)


def run(*arguments: str) -> None:
    """Run Python in another process, and end as it does where it fails: it has told why."""
    status = subprocess.run([sys.executable, *arguments], check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Run all steps, or one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scratch", type=Path, help="folder for the files; they stay")
    parser.add_argument("--step", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=whole(), default=20, help="of the diffusion sampler")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the random files"
    )
    options = parser.parse_args()
    source, folder = options.scratch / "source", options.scratch / "model"
    if options.step:
        with command_line():
            if options.step[0] == "import":
                import_random(source, folder)
            else:
                generate(folder, options.step[0], int(options.step[1]), options.steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"  peak resident memory {peak:.2f} GB", flush=True)
        return
    if not source.exists():
        tool = Path(__file__).parents[1] / "tools/make_random_published.py"
        run(str(tool), str(source), "--scale=published", f"--dtype={options.dtype}")
    steps = [] if folder.exists() else [["import"]]
    steps += [[kind, str(side)] for side in (512, 1024) for kind in ("diffusion", "ar")]
    for step in steps:
        print(*step, flush=True)
        same = ("-m", "benchmarks.published_size", str(options.scratch))
        run(*same, f"--steps={options.steps}", "--step", *step)


if __name__ == "__main__":
    main()
