"""What a run survives: real processes are killed, real bytes damaged, and a table says what came.

  python -m benchmarks.faults
  python -m benchmarks.faults --kills=100 --damages=30

A fault is survived if the run ends with the same metrics and the same model, bit for bit, as one
that nothing happened to. Exit status 1 if one was not.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from instella_jax.manifest import MANIFEST
from instella_jax.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300


class Runs:
    """Runs of the same small config, each a process."""

    def __init__(self, steps: int, cache: str | None = None):
        """Prepares runs.

        Args:
          steps: of a whole run.
          cache: folder of compiled programs; None for that of the environment.
        """
        self.steps = steps
        self._environ = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if cache:
            self._environ["JAX_COMPILATION_CACHE_DIR"] = cache
            self._environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

    def start(self, workdir: Path, *options: str, largest_file: int = 0) -> subprocess.Popen:
        """Starts or goes on with a run; files cannot grow over `largest_file` KiB, if given."""
        command = [
            sys.executable, "-m", "instella_jax.main", "--config=tests/tiny_tokenizer.py",
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

    def run(self, workdir: Path, *options: str, largest_file: int = 0) -> tuple[int, str, str]:
        """Runs to the end; see `finish`."""
        return finish(self.start(workdir, *options, largest_file=largest_file))


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits; returns exit status, standard output and standard error."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def lines(workdir: Path) -> list[dict]:
    """Metrics without what depends on the clock."""
    rows = read_metrics(workdir)
    clock = ("second", "flops", "data_wait")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in rows]


def last_step(workdir: Path) -> int:
    """The last step that a run told of; -1 before any."""
    return max((row["step"] for row in lines(workdir)), default=-1)


def wait_for(process: subprocess.Popen, reached: Callable[[], bool]) -> bool:
    """Waits until something is so; False if the process ends before."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        if reached():
            return True
        time.sleep(0.002)
    raise TimeoutError(f"what a run should come to did not come in {LIMIT} s")


def same(workdir: Path, undisturbed: Path) -> bool:
    """Whether two runs left the same metrics and the same model."""
    names = ("model/tokenizer.safetensors", "model/config.json")
    files = all((workdir / n).read_bytes() == (undisturbed / n).read_bytes() for n in names)
    return files and lines(workdir) == lines(undisturbed)


def kill(runs: Runs, workdir: Path, times: int, rng: random.Random) -> tuple[int, int]:
    """Kills a run that is started again and again: at any step, every third time in a save.

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
    """Half-written checkpoints, by name and inode: the next run writes others of that name."""
    found = set()
    for path in folder.glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def one_sentence(err: str) -> bool:
    """Whether an error was told in a line and no traceback, after warnings perhaps."""
    return err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def newest_step(workdir: Path) -> int:
    """The newest checkpoint of a run."""
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return max(int(name) for name in names if name.isdigit())


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Flips a bit of a file of a checkpoint, cuts it or removes it; says which."""
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


def main() -> None:
    """Tries everything and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=24, help="kill -9 so many times")
    parser.add_argument("--damages", type=int, default=6, help="damage so many checkpoints")
    parser.add_argument("--terms", type=int, default=3, help="SIGTERM so many times")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        runs, whole, disturbed = Runs(150, str(folder / "xla")), folder / "whole", folder / "run"
        assert runs.run(whole)[0] == 0
        rows: list[tuple[str, int, bool]] = []

        kills, halves = kill(runs, disturbed, args.kills, rng)
        runs.run(disturbed)
        rows.append((f"kill -9, {halves} of them in a save", kills, same(disturbed, whole)))

        for _ in range(args.terms):
            process = runs.start(folder / "term")
            goal = max(0, last_step(folder / "term")) + rng.randint(1, 20)
            wait_for(process, lambda goal=goal: last_step(folder / "term") >= goal)
            process.terminate()
            assert finish(process)[0] == 0
        runs.run(folder / "term")
        rows.append(("SIGTERM, exit status 0", args.terms, same(folder / "term", whole)))

        found = 0
        for _ in range(args.damages):
            newest = newest_step(disturbed)
            how = damage(disturbed / "checkpoints" / str(newest), rng)
            status, _, err = runs.run(disturbed)
            told = f"checkpoint {newest} of" in err and "DAMAGED" in err and status == 0
            found += told
            print(f"{how}: {err.strip().splitlines()[0] if err.strip() else 'not noticed'}")
        good = found == args.damages and same(disturbed, whole)
        rows.append(("newest checkpoint flipped, cut or a file of it removed", args.damages, good))

        newest = newest_step(disturbed)
        (disturbed / "checkpoints" / str(newest) / MANIFEST).unlink()
        status, _, err = runs.run(disturbed)
        good = status == 0 and "could not be checked" in err
        rows.append(("manifest removed: used, and that is said", 1, good))

        full = folder / "full"
        runs.run(full, "--config.train.steps=10")
        status, _, err = runs.run(full, largest_file=100)
        good = status == 2 and one_sentence(err) and newest_step(full) == 10
        good = good and runs.run(full)[0] == 0 and same(full, whole)
        rows.append(("no room to save: one sentence, exit 2, goes on", 1, good))

        process = runs.start(folder / "two", "--config.train.steps=100000")
        wait_for(process, lambda: last_step(folder / "two") >= 1)
        status, _, err = runs.run(folder / "two", "--config.train.steps=100000")
        process.kill()
        finish(process)
        good = status == 2 and "in use by another run" in err and one_sentence(err)
        rows.append(("second run on a workdir: refuses, exit 2", 1, good))

        status, _, err = runs.run(
            folder / "nan", "--config.optimizer.learning_rate=1e38",
            "--config.optimizer.warmup_steps=0", "--config.train.max_skipped=7",
        )  # fmt: skip
        good = status == 2 and "error: 7 steps in a row" in err.splitlines()[-1]
        rows.append(("parameters that no longer compute: ends after max_skipped", 1, good))
    print("\n| tried | times | survived |\n|---|---|---|")
    for what, times, good in rows:
        print(f"| {what} | {times} | {'all' if good else 'NO'} |")
    sys.exit(not all(good for _, _, good in rows))


if __name__ == "__main__":
    main()
