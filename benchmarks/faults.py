"""What a run survives: real processes are killed, real bytes damaged, and a table says what came.

  python -m benchmarks.faults
  python -m benchmarks.faults --kills=100 --damages=30
  python -m benchmarks.faults --only nan full

A fault is survived if the run ends with the same metrics and the same model, bit for bit, as one
that nothing happened to. Exit status 1 if one was not.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import arguments
from instella_jax.checkpoints.integrity import MANIFEST
from instella_jax.errors import UserError, command_line
from instella_jax.reporting.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300

# What was tried, how often, and whether all of it was survived.
Row = tuple[str, int, bool]
_MAIN = ("instella_jax.main",)


class Runs:
    """Runs of the same small config, each a process."""

    def __init__(self, steps: int, cache: str | None = None):
        """Prepare runs.

        Args:
          steps: of a whole run.
          cache: folder of compiled programs; None for that of the environment.
        """
        self.steps = steps
        self._environ = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if cache:
            self._environ["JAX_COMPILATION_CACHE_DIR"] = cache
            self._environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

    def start(
        self,
        workdir: Path,
        *options: str,
        largest_file: int = 0,
        module: Sequence[str] = _MAIN,
    ) -> subprocess.Popen:
        """Start or go on with a run.

        Args:
          workdir: of the run.
          *options: further flags.
          largest_file: KiB that no file can grow over, if given.
          module: what is run, and its arguments before the flags.
        """
        command = [
            sys.executable, "-m", *module, "--config=tests/tiny_tokenizer.py",
            f"--workdir={workdir}", f"--config.train.steps={self.steps}",
            "--config.train.save_every=5", "--config.train.eval_every=10", *options,
        ]  # fmt: skip
        if largest_file:
            command = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "limited", *command]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir: Path, *options: str, **other: Any) -> tuple[int, str, str]:
        """Run to the end; see `start` and `finish`."""
        return finish(self.start(workdir, *options, **other))


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait; return exit status, standard output and standard error."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def lines(workdir: Path) -> list[dict]:
    """Return metrics without what depends on the clock, and without notes of changed settings."""
    rows = [row for row in read_metrics(workdir) if "changed" not in row]
    clock = ("second", "flops", "data_wait")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in rows]


def last_step(workdir: Path) -> int:
    """Return the last step that a run told of; -1 before any."""
    return max((row["step"] for row in lines(workdir)), default=-1)


def wait_for(process: subprocess.Popen, reached: Callable[[], bool]) -> bool:
    """Wait until something is so; False if the process ends before."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        if reached():
            return True
        time.sleep(0.002)
    raise TimeoutError(f"what a run should come to did not come in {LIMIT} s")


def same(workdir: Path, undisturbed: Path) -> bool:
    """Return whether two runs left the same metrics and the same model."""
    names = ("model/tokenizer.safetensors", "model/config.json")
    files = all((workdir / n).read_bytes() == (undisturbed / n).read_bytes() for n in names)
    return files and lines(workdir) == lines(undisturbed)


def kill(runs: Runs, workdir: Path, times: int, rng: random.Random) -> tuple[int, int]:
    """Kill a run that is started again and again: at any step, every third time in a save.

    Returns:
      How many kills there were, and how many of them left a half-written checkpoint.
    """
    folder, kills, halves = workdir / "checkpoints", 0, 0
    for number in range(times):
        known, start = unfinished(folder), last_step(workdir)
        process = runs.start(workdir)
        # As runs begin at the last checkpoint, few steps a run let many of them come.
        goal = max(0, start) + rng.randint(1, 3)

        def saving(known: set = known) -> bool:
            return bool(unfinished(folder) - known)

        def further(goal: int = goal) -> bool:
            return last_step(workdir) >= goal

        if wait_for(process, saving if number % 3 == 2 else further):
            time.sleep(rng.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
            kills += 1
        finish(process)
        halves += bool(unfinished(folder) - known)
        if last_step(workdir) >= runs.steps - 1:
            break
    return kills, halves


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """Return half-written checkpoints, by name and inode: the next run writes others of that
    name."""
    found = set()
    for path in folder.glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def one_sentence(err: str) -> bool:
    """Return whether an error was told in a line and no traceback, after warnings perhaps."""
    return err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def newest_step(workdir: Path) -> int:
    """Return the newest checkpoint of a run, 0 if it has none."""
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Flip a bit of a file of a checkpoint, cut it or remove it; say which."""
    files = sorted(p for p in (checkpoint / "state").rglob("*") if p.is_file())
    files = [p for p in files if p.stat().st_size] + sorted((checkpoint / "data").iterdir())
    path, how = rng.choice(files), rng.choice(("flipped", "cut", "removed"))
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
    elif how == "cut":
        path.write_bytes(bytes(data[: rng.randrange(len(data))]))
    else:
        path.unlink()
    return how


@dataclasses.dataclass
class Trial:
    """Where the faults are tried: a folder of small runs, one of which nothing happens to."""

    folder: Path
    runs: Runs
    whole: Path
    counts: Mapping[str, int]
    rng: random.Random


def try_kills(trial: Trial) -> Row:
    """Kill a run at random steps and in saves."""
    workdir = trial.folder / "kill"
    kills, halves = kill(trial.runs, workdir, trial.counts["kills"], trial.rng)
    trial.runs.run(workdir)
    return f"kill -9 at random steps, {halves} of them in a save", kills, same(workdir, trial.whole)


def try_terms(trial: Trial) -> Row:
    """Ask a run to stop."""
    workdir, times, good = trial.folder / "term", trial.counts["terms"], True
    for _ in range(times):
        process = trial.runs.start(workdir)
        goal = max(0, last_step(workdir)) + trial.rng.randint(1, 20)
        wait_for(process, lambda goal=goal: last_step(workdir) >= goal)
        process.terminate()
        good &= finish(process)[0] == 0
    trial.runs.run(workdir)
    return "SIGTERM: saves, exits with 0, goes on", times, good and same(workdir, trial.whole)


def try_damages(trial: Trial) -> Row:
    """Damage the newest checkpoint, again and again."""
    workdir, times, good = trial.folder / "damage", trial.counts["damages"], True
    shutil.copytree(trial.whole, workdir)
    for _ in range(times):
        newest = newest_step(workdir)
        how = damage(workdir / "checkpoints" / str(newest), trial.rng)
        status, _, err = trial.runs.run(workdir)
        good &= f"checkpoint {newest} of" in err and "DAMAGED" in err and status == 0
        print(f"{how}: {err.strip().splitlines()[0] if err.strip() else 'not noticed'}")
    what = "newest checkpoint: bits flipped, a file cut or removed; the one before it is used, and "
    return what + "that is said", times, good and same(workdir, trial.whole)


def try_no_manifest(trial: Trial) -> Row:
    """Remove the hashes of the newest checkpoint."""
    workdir = shutil.copytree(trial.whole, trial.folder / "manifest")
    (workdir / "checkpoints" / str(newest_step(workdir)) / MANIFEST).unlink()
    status, _, err = trial.runs.run(workdir)
    good = status == 0 and "could not be checked" in err
    return "no manifest of hashes: the checkpoint is used, and that is said", 1, good


def try_full(trial: Trial) -> Row:
    """Leave no room for a checkpoint, then none for metrics."""
    workdir, good = trial.folder / "full", True
    trial.runs.run(workdir, "--config.train.steps=10")
    for largest, options in ((100, ()), (8, ("--config.train.save_every=0",))):
        status, _, err = trial.runs.run(workdir, *options, largest_file=largest)
        good &= status == 2 and one_sentence(err) and newest_step(workdir) == 10
    good &= trial.runs.run(workdir)[0] == 0 and same(workdir, trial.whole)
    return "no room to save, or for metrics: one sentence, exit status 2; goes on later", 2, good


def try_second(trial: Trial) -> Row:
    """Start a second run on a workdir."""
    workdir, options = trial.folder / "second", "--config.train.steps=100000"
    process = trial.runs.start(workdir, options)
    wait_for(process, lambda: last_step(workdir) >= 1)
    status, _, err = trial.runs.run(workdir, options)
    process.kill()
    finish(process)
    good = status == 2 and "in use by another run" in err and one_sentence(err)
    return "a second run on the same workdir: refused", 1, good


def try_nan(trial: Trial) -> Row:
    """Train on values that are no numbers, at a few steps and at many."""
    few, idle, many = (trial.folder / name for name in ("few", "idle", "many"))
    module = "tests.poisoned"
    good = trial.runs.run(few, module=(module, "nan", "40", "43"))[0] == 0
    good &= trial.runs.run(idle, module=(module, "idle", "40", "43"))[0] == 0
    name = "model/tokenizer.safetensors"
    good &= (few / name).read_bytes() == (idle / name).read_bytes()
    good &= sum(row.get("train/skipped", 0) for row in lines(few)) == 3
    most = "--config.train.max_skipped=7"
    status, _, err = trial.runs.run(many, most, module=(module, "nan", "40", "99"))
    good &= status == 2 and err.startswith("error: 7 steps in a row") and one_sentence(err)
    what = "NaN in 3 batches: skipped, counted, parameters as if those steps had not been; in "
    return what + "`train.max_skipped` in a row: one sentence, exit status 2", 2, good


def try_no_loss(trial: Trial) -> Row:
    """Make parameters that no longer compute."""
    options = ("optimizer.learning_rate=1e38", "optimizer.warmup_steps=0", "train.max_skipped=7")
    workdir = trial.folder / "diverged"
    status, _, err = trial.runs.run(workdir, *(f"--config.{option}" for option in options))
    good = status == 2 and err.startswith("error: 7 steps in a row") and one_sentence(err)
    return "no finite loss any more: ends after `train.max_skipped` steps", 1, good


FAULTS: dict[str, Callable[[Trial], Row]] = {
    "kills": try_kills,
    "terms": try_terms,
    "damages": try_damages,
    "manifest": try_no_manifest,
    "full": try_full,
    "second": try_second,
    "nan": try_nan,
    "loss": try_no_loss,
}


def main() -> None:
    """Try everything, or what is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--kills", type=arguments.whole(0), default=24, help="kill -9 so many times"
    )
    parser.add_argument(
        "--damages", type=arguments.whole(0), default=6, help="damage so many checkpoints"
    )
    parser.add_argument("--terms", type=arguments.whole(0), default=3, help="SIGTERM so many times")
    parser.add_argument("--seed", type=arguments.whole(0), default=0)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT",
                        help=f"some of {', '.join(FAULTS)}")  # fmt: skip
    args = parser.parse_args()
    with command_line():
        rows = run(args)
    print("\n| tried | times | survived |\n|---|---|---|")
    for what, times, good in rows:
        print(f"| {what} | {times} | {'all' if good else 'NO'} |")
    sys.exit(not all(good for _, _, good in rows))


def run(args: argparse.Namespace) -> list[Row]:
    """Try what the arguments name.

    Raises:
      UserError: the run that nothing happens to fails too.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        runs, whole = Runs(150, str(folder / "xla")), folder / "whole"
        status, _, err = runs.run(whole)
        if status:
            reason = (err.strip().splitlines() or [f"exit status {status}"])[-1]
            raise UserError(f"a run fails without any fault: {reason.removeprefix('error: ')}")
        trial = Trial(folder, runs, whole, vars(args), random.Random(args.seed))
        return [FAULTS[name](trial) for name in args.only]


if __name__ == "__main__":
    main()
