"""What the demo learns over time, as it is and with choices taken back: held-out loss by minutes.

    python -m benchmarks.learning_curve --out runs/learning

Each row is `python -m instella_jax.main --config=configs/t2i_diffusion.py` from its start to its
end, one after the other, on a machine with nothing else to do; the clock starts with the process.
Writes `learning.json` after each row, and the plot as `learning.png`. Rows that are there already
are not run again. The plot needs matplotlib: pip install 'instella-jax[benchmarks]'.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.plotting import load_pyplot
from instella_jax.errors import UserError, command_line
from instella_jax.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
# What a row is called in the plot, and what differs from the demo.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "now": ("the demo", ()),
    "before": (
        "AdamW, text encoder trained along, plain loss",
        ("optimizer.kind=adamw", "text.trainable=True", "loss.target=epsilon", "loss.draws=1",
         "loss.time_shift=1.0", "pos_emb_std=0.0", "optimizer.warmup_steps=200",
         "train.ema_decay=0.998", "train.batch_size=64", "train.steps=1120",
         "data.scenes.codes="),
    ),
}  # fmt: skip
_HELD_OUT = re.compile(r"held out at step (\d+): bit accuracy (\S+)  loss (\S+)")


def run(keys: tuple[str, ...], workdir: Path) -> list[dict[str, float]]:
    """Train, and return step, minutes since the start and held-out figures of each evaluation.

    Raises:
      UserError: the run fails.
    """
    command = [
        sys.executable, "-m", "instella_jax.main", "--config=configs/t2i_diffusion.py",
        f"--workdir={workdir}", "--config.train.eval_every=160",
        *(f"--config.{key}" for key in keys),
    ]  # fmt: skip
    points, last, start = [], "", time.monotonic()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            if found := _HELD_OUT.search(line):
                minutes = (time.monotonic() - start) / 60
                values = step, accuracy, loss = int(found[1]), float(found[2]), float(found[3])
                names = ("step", "bit_accuracy", "loss")
                points.append({"minutes": minutes, **dict(zip(names, values, strict=True))})
                print(f"step {step}, {minutes:.2f} min: loss {loss}, bit accuracy {accuracy}")
    if process.returncode:
        raise UserError(f"the run in {workdir} failed: {last}")
    return points


def plot(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw the held-out loss of each row over its minutes."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 3.2))
    for name, points in rows.items():
        minutes, losses = ([point[key] for point in points] for key in ("minutes", "loss"))
        axis.plot(minutes, losses, "o-", markersize=3.5, label=ROWS[name][0])
    axis.set(xlabel="minutes from the start of the process", ylabel="held-out loss", xlim=(0, None))
    axis.set_ylim(0.08, 0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run the rows that are not there yet, and draw all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    with command_line():
        args.out.mkdir(parents=True, exist_ok=True)
        kept = args.out / "learning.json"
        rows = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        for name, (title, keys) in ROWS.items():
            if name not in rows:
                print(title)
                rows[name] = run(keys, args.out / name)
                write_json(kept, rows)
        plot(rows, args.out / "learning.png")


if __name__ == "__main__":
    main()
