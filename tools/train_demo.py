"""Trains the demo's four sets of weights one after the other, each within a time of its own.

  python -m tools.train_demo runs/demo --minutes tokenizer=90,text=120,diffusion=40,ar=15

Each part first takes a few hundred steps, from whose speed follows how many fit into its minutes;
its learning rate then falls as if that number had been set from the start. Stopped and started
again, it goes on with the part it was at. The weights are in OUT/PART/model; docs/demo.md says how
those that are shipped were made, by the same parts with numbers of steps of their own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

PARTS = {
    "tokenizer": ["--config=configs/tokenizer.py", "--config.data.scenes.places=thirds"],
    # The text encoder learns together with a diffusion generator.
    "text": ["--config=configs/t2i_diffusion.py", "--config.text.trainable=True"],
    "diffusion": ["--config=configs/t2i_diffusion.py"],
    "ar": ["--config=configs/t2i_ar.py"],
}
# For runs longer than those of the configs, which are made for five minutes.
LONGER = ["--config.train.ema_decay=0.998", "--config.optimizer.muon.ns_steps=5"]
MINUTES = {"tokenizer": 90.0, "text": 120.0, "diffusion": 40.0, "ar": 15.0}
PROBE, MULTIPLE = 400, 200  # steps


def arguments(part: str, out: Path, steps: int) -> list[str]:
    """Return the command line of a part that takes so many steps."""
    command = [
        sys.executable, "-m", "instella_jax.main", *PARTS[part], f"--workdir={out / part}",
        f"--config.train.steps={steps}",
        *(f"--config.train.{name}_every={MULTIPLE}" for name in ("eval", "save", "image")),
    ]  # fmt: skip
    if part != "tokenizer":
        command += LONGER
        # The shipped codes are of another tokenizer.
        command += [f"--config.tokenizer={out / 'tokenizer/model'}", "--config.data.scenes.codes="]
    if part in ("diffusion", "ar"):
        command.append(f"--config.text.encoder={out / 'text/model'}")
    return command


def seconds_per_step(workdir: Path, batch_size: int) -> float:
    """Return the time of a step in the last lines of a run's metrics."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [json.loads(line).get("train/images_per_second") for line in lines]
    last = [speed for speed in speeds if speed][-3:]
    return batch_size * len(last) / sum(last)


def planned_steps(seconds: float, minutes: float) -> int:
    """Return how many steps of so many seconds fit into the minutes, PROBE at least."""
    return max(PROBE, int(60 * minutes / seconds) // MULTIPLE * MULTIPLE)


def run(command: list[str]) -> None:
    """Run a command; end with its exit status where it fails, which it has told of."""
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)


def train_part(part: str, out: Path, minutes: float) -> None:
    """Train one part; a part that has its model stays as it is."""
    planned = out / part / "planned_steps"
    if not planned.exists():
        run(arguments(part, out, PROBE))
        config = json.loads((out / part / "config.json").read_text(encoding="utf-8"))
        seconds = seconds_per_step(out / part, config["train"]["batch_size"])
        planned.write_text(f"{planned_steps(seconds, minutes)}\n", encoding="utf-8")
    run(arguments(part, out, int(planned.read_text(encoding="utf-8"))))


def main() -> None:
    """Train all parts, or those after which it was stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the four runs")
    parser.add_argument("--minutes", default="", help="PART=MINUTES with commas between them")
    given = parser.parse_args()
    minutes = dict(MINUTES)
    for item in filter(None, given.minutes.split(",")):
        part, _, number = item.partition("=")
        if part not in PARTS or not number.replace(".", "", 1).isdigit():
            parser.error(f"--minutes has {item!r}: expected one of {', '.join(PARTS)}=NUMBER")
        minutes[part] = float(number)
    for part in PARTS:
        train_part(part, given.out, minutes[part])


if __name__ == "__main__":
    main()
