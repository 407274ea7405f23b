"""What each choice in training a tokenizer gives, at one budget: a row a choice.

    python -m benchmarks.tokenizer_ablation --out runs/ablation
    python -m benchmarks.tokenizer_ablation --out runs/ablation --rows smooth_l1,lpips --seeds 0,1

Each row is a run of `python -m instella_jax.main` on 32x32 scenes with a small network, measured on
held-out ones by `instella-jax eval reconstruction`; all that differs from the first row is in
`ROWS`. What trains nested codes is also decoded from its first tokens alone. Goes on where it was
stopped, and adds rows and seeds to what is there. Other keys of the config (`--config.KEY=VALUE`)
are those of all rows. Writes `ablation.json`, and its tables as `ablation.md`. LPIPS needs the
extra [perceptual].
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import whole, whole_list
from instella_jax.errors import UserError, command_line
from instella_jax.evaluation.reports import markdown_table
from instella_jax.runtime.files import write_bytes, write_json

ROOT = Path(__file__).resolve().parents[1]
# Of every row: 32 tokens of 16 bits, 1.0 million parameters, bits colder over half of the steps.
SMALL = (
    "data.image_size=32", "model.patch_size=8", "model.num_tokens=32", "model.bits=16",
    "model.encoder_heads=2", "model.decoder_heads=2", "model.decoder_layers=3", "model.scale=32",
    "run.unroll=False", "run.cpu_devices=1", "train.batch_size=16", "train.log_every=50",
    "train.eval_every=0", "train.image_every=0", "train.save_every=100", "train.ema_decay=0.98",
    "optimizer.warmup_steps=50", "loss.perceptual.window=0", "loss.perceptual.warmup=50",
    "loss.adversarial.width=16", "loss.adversarial.halvings=2", "loss.adversarial.warmup=50",
)  # fmt: skip
LPIPS = ("loss.perceptual.weight=1.0",)
# What a row is called, and what differs in it.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "smooth_l1": ("smooth-L1 alone", ()),
    "lpips": ("+ LPIPS", LPIPS),
    "lpips_tenth": ("+ 0.1 LPIPS", ("loss.perceptual.weight=0.1",)),
    "adversarial": ("+ LPIPS + adversarial", (*LPIPS, "loss.adversarial.weight=0.5")),
    "hot": ("temperature 1 throughout", ("loss.temperature.start=1.0", "loss.temperature.end=1.0")),
    "cold": (
        "temperature 0.1 throughout",
        ("loss.temperature.start=0.1", "loss.temperature.end=0.1"),
    ),
    "tokens_16": ("16 tokens", ("model.num_tokens=16",)),
    "tokens_64": ("64 tokens", ("model.num_tokens=64",)),
    "bits_8": ("8 bits a token", ("model.bits=8",)),
    "bits_32": ("32 bits a token", ("model.bits=32",)),
    "tail_drop": ("tail drop 0.5", ("loss.tail_drop=0.5",)),
    "bsq": ("quantizer BSQ", ("loss.quantizer=bsq",)),
    "lfq": ("quantizer LFQ", ("loss.quantizer=lfq",)),
    "fsq": ("quantizer FSQ", ("loss.quantizer=fsq",)),
}
FIGURES = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3)}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What all rows have in common.

    Attributes:
      config: file of the config.
      steps: of training.
      pictures: how many held-out ones are measured.
      keys: of the config, KEY=VALUE.
    """

    config: str
    steps: int
    pictures: int
    keys: tuple[str, ...]

    def training(self, row: str, seed: int, workdir: Path) -> list[str]:
        """Return the command that trains a row."""
        halves = (
            f"loss.temperature.steps={self.steps // 2}",
            f"loss.adversarial.start={self.steps // 2}",
        )
        keys = (*halves, f"train.steps={self.steps}", *self.keys, *ROWS[row][1])
        command = ["-m", "instella_jax.main", f"--config={self.config}", f"--workdir={workdir}"]
        return [*command, f"--config.seed={seed}", *(f"--config.{key}" for key in keys)]

    def measuring(self, workdir: Path, tokens: int = 0) -> list[str]:
        """Return the command that measures a row, or its first tokens alone."""
        command = ["-m", "instella_jax", "eval", "reconstruction", str(workdir / "model")]
        fewer = [f"--tokens={tokens}"] if tokens else []
        return [*command, f"--count={self.pictures}", *fewer, f"--out={place(workdir, tokens)}"]


def place(workdir: Path, tokens: int = 0) -> Path:
    """Return where the report of a run is."""
    return workdir / (f"first_{tokens}" if tokens else "measured")


def call(command: Sequence[str], log: Path) -> None:
    """Run Python; what it says goes to a file.

    Raises:
      UserError: it fails, or was stopped.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with log.open("ab") as file:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, env=environ, check=False
        )
    if done.returncode:
        raise UserError(f"a run ended with status {done.returncode}: {log} says why")


def measured(budget: Budget, workdir: Path, tokens: int = 0) -> dict[str, Any]:
    """Return the report of a run, which is made where it is not there yet."""
    report = place(workdir, tokens) / "report.json"
    if not report.exists():
        call(budget.measuring(workdir, tokens), workdir.with_suffix(".log"))
    return json.loads(report.read_text(encoding="utf-8"))


def run_row(budget: Budget, row: str, seed: int, out: Path) -> dict[str, Any]:
    """Train and measure a row where that was not done, and return what was found."""
    workdir = out / f"{row}-seed{seed}"
    if not place(workdir).exists():
        print(f"{row}, seed {seed}", flush=True)
        call(budget.training(row, seed, workdir), workdir.with_suffix(".log"))
    whole_code = measured(budget, workdir)
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    found = {
        "row": row,
        "seed": seed,
        "bits": whole_code["bits"],
        "constant_bits": whole_code["constant_bits"],
        "scores": whole_code["scores"],
        "command": ["python", *budget.training(row, seed, workdir)],
    }
    if config["loss"]["tail_drop"]:
        halves = [whole_code["tokens"] >> n for n in range(1, 4) if whole_code["tokens"] >> n]
        parts = [whole_code, *(measured(budget, workdir, tokens) for tokens in halves)]
        found["first_tokens"] = [
            {"tokens": part["tokens"], "bits": part["bits"], "scores": part["scores"]}
            for part in parts
        ]
    return found


def cell(values: Sequence[float], digits: int) -> str:
    """Return the mean of the seeds, and half of what lies between the least and the most."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.ptp(values) / 2:.{digits}f}"


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Return the tables in Markdown: of the rows, and of nested codes by their first tokens."""
    figures = [name for name in FIGURES if all(name in run["scores"] for run in found)]
    names = [FIGURES[name][0] for name in figures]
    lines = []
    for row, (name, _) in ROWS.items():
        runs = [run for run in found if run["row"] == row]
        if runs:
            scores = [
                cell([run["scores"][figure] for run in runs], FIGURES[figure][1])
                for figure in figures
            ]
            dead = cell([run["constant_bits"] for run in runs], 0)
            lines.append([name, len(runs), runs[0]["bits"], *scores, dead])
    text = markdown_table(["run", "seeds", "bits", *names, "bits that never change"], lines)
    for run in found:
        if "first_tokens" in run:
            parts = [
                [part["tokens"], part["bits"], *(part["scores"][figure] for figure in figures)]
                for part in run["first_tokens"]
            ]
            head = [f"{ROWS[run['row']][0]}, seed {run['seed']}: first tokens", "bits", *names]
            text += "\n" + markdown_table(head, parts)
    return text


def check_budget(out: Path, budget: Budget) -> None:
    """Write what the rows have in common, or check that it is what was written.

    Raises:
      UserError: the rows that are there had another budget.
    """
    path = out / "budget.json"
    own = json.loads(json.dumps(dataclasses.asdict(budget)))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != own:
        raise UserError(f"{path}: the rows there had other settings, so give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, own)


def run(options: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """Make the rows that were asked for, and write the tables of all that are there.

    Raises:
      UserError: a row is unknown, a run fails, or what is there had another budget.
    """
    for name in options.rows:
        if name not in ROWS:
            raise UserError(f"--rows has {name!r}: expected some of {', '.join(ROWS)}")
    budget = Budget(options.config, options.steps, options.pictures, (*SMALL, *keys))
    check_budget(options.out, budget)
    path = options.out / "ablation.json"
    found = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    done = {(one["row"], one["seed"]) for one in found}
    for seed in options.seeds:
        for row in options.rows:
            if (row, seed) not in done:
                found.append(run_row(budget, row, seed, options.out))
                write_json(path, {"budget": dataclasses.asdict(budget), "runs": found})
                write_bytes(options.out / "ablation.md", tables(found).encode())
    print(tables(found), end="")
    print(f"{len(found)} runs of {budget.steps} steps: {options.out}")


def main() -> None:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--rows", type=lambda text: text.split(","), default=list(ROWS),
        help=f"some of {', '.join(ROWS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=whole_list, default=[0], help="(default: 0)")
    parser.add_argument("--steps", type=whole(), default=400, help="(default: %(default)s)")
    parser.add_argument("--pictures", type=whole(), default=256, help="(default: %(default)s)")
    parser.add_argument("--config", default="configs/tokenizer.py", help="(default: %(default)s)")
    options, further = parser.parse_known_args()
    if wrong := [text for text in further if not text.startswith("--config.")]:
        parser.error(f"unknown: {' '.join(wrong)}")
    options.out = options.out.absolute()
    with command_line():
        run(options, tuple(text.removeprefix("--config.") for text in further))


if __name__ == "__main__":
    main()
