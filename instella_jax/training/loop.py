"""The only training loop."""

import collections
import contextlib
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from instella_jax.checkpoints.manager import Checkpoints, Keep
from instella_jax.config import Config
from instella_jax.data import buckets
from instella_jax.data.watch import DataWatch
from instella_jax.errors import UserError, disk_remedy
from instella_jax.evaluation.heldout import evaluate
from instella_jax.reporting.metrics import MetricsWriter
from instella_jax.reporting.pictures import save_grid
from instella_jax.reporting.progress import Progress, Throughput, progress_line
from instella_jax.runtime import sharding
from instella_jax.runtime.distributed import Agreement
from instella_jax.sampling.previews import preview
from instella_jax.stages import make_stage
from instella_jax.stages.base import Stage, without_critics
from instella_jax.stages.parameters import load_frozen, load_trained, save_trained, saved_step
from instella_jax.training import flops
from instella_jax.training.optimizer import learning_rate, make_optimizer
from instella_jax.training.profiling import StepTrace
from instella_jax.training.setup import (
    check_sizes,
    initial_state,
    state_shapes,
)
from instella_jax.training.shutdown import StopRequest
from instella_jax.training.step import TrainState, as_float32, jit_step
from instella_jax.training.workdir import (
    changes,
    claim_workdir,
    only_run,
    read_config,
    record_config,
)


def train(config: Config, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Train a stage, from the newest checkpoint of the workdir where there is one.

    Leaves checkpoints, `metrics.jsonl`, TensorBoard files, pictures in `samples/` and, at the
    end, the averaged parameters as a model folder `model/`, or adapters as `lora/`. SIGTERM saves
    a checkpoint and returns.

    Args:
      config: see `configs/`.
      workdir: where the run lives.

    Returns:
      Held-out metrics at the end; {} when stopped before it.

    Raises:
      UserError: something in config, workdir or data does not fit.
    """
    mesh = sharding.make_mesh(config.mesh)
    check_sizes(config, mesh)
    stage = make_stage(config)
    claim_workdir(workdir, config)
    try:
        with only_run(workdir), sharding.use(mesh):
            return _Run(config, Path(workdir), stage, mesh).run()
    except OSError as error:
        if (remedy := disk_remedy(error)) is None:
            raise
        raise UserError(
            f"workdir {workdir} cannot be written ({error.strerror}): {remedy} and run the same "
            "command again, which goes on from the newest checkpoint"
        ) from error


class _Run:
    """The state that the parts of one run share."""

    def __init__(self, config: Config, workdir: Path, stage: Stage, mesh: jax.sharding.Mesh):
        self.config, self.workdir, self.stage, self.mesh = config, workdir, stage, mesh
        self.first = jax.process_index() == 0
        self.progress = Progress(enabled=self.first)
        # Data and weights that cannot be read should be told of before anything is compiled.
        self.loader = stage.loader(
            "train",
            batch_size=config.train.batch_size // jax.process_count(),
            steps_per_call=config.train.steps_per_call,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.frozen = load_frozen(stage, mesh)
        t = config.train
        keep = Keep(t.keep, t.keep_every, t.keep_minutes, t.keep_best)
        self.checkpoints = Checkpoints(workdir, keep)
        self.shapes = state_shapes(stage, config, mesh)
        optimizer = make_optimizer(config.optimizer, config.train.steps, stage.critics)
        self.step_function = jit_step(stage, optimizer, config, self.shapes)
        self.compiled: Future[None] | None = None
        self.rate = Throughput()
        shapes = buckets.shapes(config)
        self.watch = DataWatch(shapes)
        self.counts: collections.Counter[str] = collections.Counter()
        self.operations = {s: sum(flops.training(config, s).values()) for s in shapes}
        self.agreed = Agreement(mesh)
        calls = config.profile, config.train.steps_per_call, self.progress.message
        self.trace = StepTrace(workdir / "profile", *calls)

    def first_state(self) -> TrainState:
        """Own checkpoint > init_from > random weights."""
        if self.first:
            print_overview(self.shapes.params)
        restored = self.checkpoints.restore(self.shapes, self.loader)
        if restored is not None:
            return restored
        if self.config.train.steps:
            self.compile_ahead()
        state, _ = initial_state(self.stage, self.config, self.mesh)
        if self.config.init_from:
            # Critics begin anew.
            params = {**state.params, **load_trained(self.stage, self.config, self.mesh)}
            state = state.replace(params=params, ema=as_float32(params))
            self.progress.message(f"weights of {self.config.init_from}")
        return state

    def compile_ahead(self) -> None:
        """Start compiling the step in a thread, while parameters are initialised and evaluated.

        XLA compiles on one core for part of the time. On a GPU it also autotunes, which other work
        on the device would disturb.
        """
        if jax.default_backend() == "gpu":
            return
        rows = sharding.batch_sharding(self.mesh, leading=1)

        def shape(x: np.ndarray) -> jax.ShapeDtypeStruct:
            steps, own, *rest = x.shape
            whole = (steps, own * jax.process_count(), *rest)
            return jax.ShapeDtypeStruct(whole, x.dtype, sharding=rows)

        batch = jax.tree.map(shape, sharding.arrays(self.watch.peek(self.loader)))

        def compile_step() -> None:
            with sharding.use(self.mesh):
                self.step_function.lower(self.shapes, self.frozen, batch).compile()

        pool = ThreadPoolExecutor(1, "compile")
        self.compiled = pool.submit(compile_step)
        pool.shutdown(wait=False)

    def run(self) -> dict[str, float]:
        """Restore, train, evaluate."""
        self.state = self.first_state()
        start, train = int(self.state.step), self.config.train
        if start % train.steps_per_call:
            raise UserError(
                f"{self.workdir} goes on from step {start}, which is no multiple of "
                f"train.steps_per_call={train.steps_per_call}: set that to a number that divides it"
            )
        changed = self.changes() if start and self.first else {}
        if self.first:
            record_config(self.workdir, self.config)
        ended_before = 0 < start >= train.steps
        stop = StopRequest()
        with (
            # A run from the beginning keeps no line of one before it.
            MetricsWriter(self.workdir, start_step=start or -1, enabled=self.first) as self.writer,
            contextlib.closing(self.loader),
            stop.listening(),
        ):
            try:
                if start:
                    self.tell_changes(start, changed)
                elif train.steps:
                    self.report(0)
                finished = self.loop(start, stop)
                step = int(self.state.step)
                # Saved before it is evaluated, but where it is kept or not by its metrics.
                ranked = finished and train.keep_best
                result = self.report(step) if ranked else {}
                self.watch.put_back(self.loader)
                self.checkpoints.save(self.state, self.loader, step, result)
                if not finished:
                    self.progress.message(f"stopped at step {step}; run again to continue")
                    return {}
                result = result or self.report(step)
                # What a finished run has made stays as it is.
                if not (ended_before and self.found(self.samples_path(step).exists())):
                    self.save_samples(step)
                if not (ended_before and self.found(saved_step(self.workdir) == step)):
                    self.write_model(step)
                return result
            finally:
                self.progress.close()
                self.checkpoints.close()

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings that changed since the last start, and the learning rates then."""
        changed = changes(self.workdir, self.config)
        if any(key.partition(".")[0] in ("optimizer", "train") for key in changed):
            rates = [
                float(learning_rate(c.optimizer, c.train.steps, self.state.opt_state))
                for c in (read_config(self.workdir), self.config)
            ]
            if not math.isclose(*rates, rel_tol=1e-6):
                changed["learning rate"] = (rates[0], rates[1])
        return changed

    def tell_changes(self, start: int, changed: dict[str, tuple[Any, Any]]) -> None:
        """Report where a run resumes, and which settings changed."""
        self.progress.message(f"continuing from step {start}")
        for name, (old, new) in changed.items():
            if name == "learning rate":
                self.progress.message(
                    f"CHANGED at step {start}: learning rate {old:.6g} -> {new:.6g}, that of the "
                    "new schedule as if it had been so from step 0"
                )
            else:
                self.progress.message(f"CHANGED {name}: {old!r} -> {new!r}")
        self.writer.changes(start, changed)

    def loop(self, start: int, stop: StopRequest) -> bool:
        """Run steps until the end (True) or a request to stop (False)."""
        train = self.config.train
        rows = sharding.batch_sharding(self.mesh, leading=1)
        done, pending = start, None
        if self.compiled is not None:
            self.compiled.result()
        for step in range(start, train.steps, train.steps_per_call):
            if self.agreed(stop.requested):
                break
            with self.trace.call(step, self.state):
                batch = sharding.place(sharding.arrays(self.watch.take(self.loader)), rows)
                self.state, metrics = self.step_function(self.state, self.frozen, batch)
            # The device works on this step while the host reads the one before it.
            if pending is not None:
                self.log(*pending)
            self.checkpoints.check()
            done = step + train.steps_per_call
            pending = (done, metrics)
            if done < train.steps and (due := self.due(done)):
                # A run that goes on from the checkpoint does not log this step again.
                self.log(*pending)
                pending = None
                self.occasionally(done, due)
        self.trace.close(self.state)
        if pending is not None:
            self.log(*pending)
        return done >= train.steps

    def due(self, step: int) -> set[str]:
        """Return which of "eval", "image" and "save" are due after a step."""
        every = {name: self.config.train[f"{name}_every"] for name in ("eval", "image", "save")}
        return {name for name, n in every.items() if n > 0 and step % n == 0}

    def occasionally(self, step: int, due: set[str]) -> None:
        """Evaluate, sample and then save, so that what is saved has been reported."""
        metrics = self.report(step) if "eval" in due else {}
        if "image" in due:
            self.save_samples(step)
        if "save" in due:
            self.checkpoints.save(self.state, self.loader, step, metrics)

    def log(self, step: int, metrics: Any) -> None:
        """Fetch the metrics of a finished step, check and show them."""
        fetched = jax.device_get(metrics)
        self.counts.update(fetched.pop("counts"))
        fetched = {k: float(v) for k, v in fetched.items()}
        self.rate.update(step)
        self.check_skipped(step, int(fetched.pop("skipped_in_a_row")), fetched)
        if step % self.config.train.log_every == 0:
            if skipped := int(self.counts["skipped"]):
                self.progress.message(f"skipped {skipped} of the last steps up to step {step}")
            speed = self.rate.steps_per_second
            size = self.config.train.batch_size
            operations = self.watch.mean(self.operations)
            fetched |= {name: float(count) for name, count in self.counts.items()}
            fetched["data_wait"] = self.watch.waited()
            self.counts.clear()
            if speed:
                kind, devices = self.mesh.devices.flat[0].device_kind, self.mesh.size
                fetched |= flops.speed(speed * size, operations, kind, devices)
            self.writer.scalars(step, fetched, prefix="train")
            total = self.config.train.steps
            self.progress.update(progress_line(step, total, fetched, speed, size))

    def check_skipped(self, step: int, in_a_row: int, metrics: dict[str, float]) -> None:
        """End a run in which too many steps in a row were skipped."""
        train = self.config.train
        if in_a_row < train.max_skipped:
            return
        fault = "had no finite loss and gradient"
        if all(map(math.isfinite, metrics.values())):
            fault = f"had a gradient norm over train.spike_norm={train.spike_norm:g}"
        raise UserError(
            f"{in_a_row} steps in a row up to step {step} {fault}; check the data, or start "
            "again with a lower optimizer.learning_rate and another --workdir"
        )

    def report(self, step: int) -> dict[str, float]:
        """Evaluate the average on held-out data, print and write the result."""
        self.rate.pause()
        metrics = evaluate(self.stage, self.state.ema, self.frozen, self.config, self.mesh)
        if (best := self.config.train.keep_best) and best not in metrics:
            raise UserError(
                f"train.keep_best is {best!r}: expected a held-out metric, one of "
                f"{', '.join(metrics)}, or nothing"
            )
        if not self.writer.has(step, "heldout/loss"):
            self.writer.scalars(step, metrics, prefix="heldout")
        text = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in metrics.items())
        self.progress.message(f"held out at step {step}: {text}")
        self.rate.resume()
        return metrics

    def save_samples(self, step: int) -> None:
        """Write a captioned grid of samples of the averaged weights."""
        count = self.config.eval.pictures
        if not count:
            return
        self.rate.pause()
        shown = preview(self.stage, self.state.ema, self.frozen, count)
        if self.first:
            path = self.samples_path(step)
            grid = save_grid(path, *shown)
            self.writer.image(step, "samples", grid)
            self.progress.message(f"pictures at step {step}: {path}")
        self.rate.resume()

    def samples_path(self, step: int) -> Path:
        """Return the path of the grid of a step."""
        return self.workdir / "samples" / f"{step:08d}.png"

    def found(self, here: bool) -> bool:
        """Return what the first process found, in every process."""
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(here)))

    def write_model(self, step: int) -> None:
        """Write the average as a model folder, or as adapters."""
        average = sharding.fetch(without_critics(self.stage, self.state.ema))
        if self.first:
            folder = save_trained(self.stage, average, step, self.workdir)
            self.progress.message(f"{folder.name}: {folder}")


def print_overview(params: Any) -> None:
    """Print name, shape and size of every parameter."""
    from clu import parameter_overview

    print(parameter_overview.get_parameter_overview(params, include_stats=False), flush=True)
