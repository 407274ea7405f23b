"""The only training loop."""

import contextlib
import errno
import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instella_jax import flops, model_folder, model_parts, sharding
from instella_jax.checkpoint import Checkpoints, claim_workdir, note_config
from instella_jax.config import Config
from instella_jax.data.sources import part_names
from instella_jax.data.watch import DataWatch
from instella_jax.distributed import Agreement
from instella_jax.errors import UserError
from instella_jax.grids import save_grid
from instella_jax.metrics import MetricsWriter, Progress, Throughput, progress_line
from instella_jax.profiling import StepTrace
from instella_jax.stages import Stage, init_stage, make_stage
from instella_jax.train_state import TrainState, init_state, make_optimizer, make_step
from instella_jax.workdir_lock import only_run

logger = logging.getLogger(__name__)

Params = Any


def arrays(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """What of a batch goes to the device."""
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}


def check_sizes(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Checks ranges, and what must divide what.

    Raises:
      UserError: naming the numbers.
    """
    train = config.train
    least = [(train, "train", n, 1) for n in ("batch_size", "accumulate", "steps_per_call")]
    least += [(train, "train", n, 1) for n in ("log_every", "keep", "max_skipped")]
    least += [(train, "train", n, 0) for n in ("steps", "eval_every", "save_every", "image_every")]
    least += [(config.eval, "eval", n, 1) for n in ("batch_size", "batches")]
    for section, of, name, low in least:
        if section[name] < low:
            raise UserError(f"{of}.{name} is {section[name]}: expected at least {low}")
    parts = sharding.batch_parts(mesh) * train.accumulate
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size={train.batch_size} does not split into {parts} parts "
            f"(data x fsdp devices x train.accumulate): use a multiple of {parts}"
        )
    if sharding.batch_parts(mesh) % jax.process_count():
        raise UserError(
            f"mesh data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']} does not split the batch "
            f"over {jax.process_count()} processes: mesh.tensor must not span several of them"
        )
    every = ("steps", "log_every", "eval_every", "save_every", "image_every")
    for name in every:
        if train[name] % train.steps_per_call:
            raise UserError(
                f"train.{name}={train[name]} is not a multiple of "
                f"train.steps_per_call={train.steps_per_call}"
            )


def load_frozen(stage: Stage, mesh: jax.sharding.Mesh) -> Params:
    """Puts the stage's frozen parameters on the mesh."""
    boxed = stage.frozen()
    return jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))


def load_params(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> Params:
    """Puts the trainable parameters of `init_from`, or else the shipped ones, on the mesh."""
    folder = model_folder.find_weights(config)
    sizes, boxed = stage.describe(), {}
    for part, network in stage.networks.items():
        key = "text.model" if part == "text" else "model"
        name = model_parts.matching_part(folder, part, sizes[part], key)
        boxed[part] = model_folder.load_boxed(folder, name, network, config.run.param_dtype)
    return jax.device_put(sharding.values(boxed), sharding.tree_shardings(boxed, mesh))


def initial_state(stage: Stage, config: Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, Any]:
    """Returns the state before step 0, sharded, and the optimizer."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def init(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        return init_state(init_stage(stage, init_key), optimizer, run_key)

    return sharding.sharded_init(init, jax.random.key(config.seed), mesh), optimizer


@functools.lru_cache(maxsize=2)
def evaluator(stage: Stage) -> Callable[..., dict[str, jax.Array]]:
    """Compiles a stage's evaluation, once per stage."""
    return jax.jit(stage.evaluate)


def evaluate(stage: Stage, params: Params, frozen: Params, config: Config, mesh) -> dict:
    """Means of the stage's held-out metrics over at most `eval.batches` batches.

    Where the held-out data end before, the last batch may be short; each row counts alike.
    """
    function = evaluator(stage)
    loader = stage.loader("heldout", batch_size=config.eval.batch_size)
    totals: list[dict[str, jax.Array]] = []
    counts: list[int] = []
    with contextlib.closing(loader):
        for index, batch in zip(range(config.eval.batches), loader, strict=False):
            rows = arrays(batch)
            counts.append(len(next(iter(rows.values()))))
            key = jax.random.fold_in(jax.random.key(config.seed), index)
            totals.append(function(params, frozen, sharding.place_copy(rows, mesh), key))
    if not totals:
        raise UserError("there are no held-out data to evaluate on")
    fetched = jax.device_get(totals)
    return {
        name: float(np.average([t[name] for t in fetched], weights=counts)) for name in fetched[0]
    }


class _Stop:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop reads between steps."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        def ask(signum: int, _: Any) -> None:
            if self.requested and signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = True

        old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                # None is a handler that Python did not set, such as that of jax.distributed.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def train(config: Config, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Trains a stage, from the newest checkpoint of the workdir where there is one.

    Leaves checkpoints, `metrics.jsonl`, TensorBoard files, pictures in `samples/` and, at the
    end, the averaged parameters as a model folder `model/`. SIGTERM saves a checkpoint and
    returns.

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
    claim_workdir(workdir, config)
    stage = make_stage(config)
    try:
        with only_run(workdir), sharding.use(mesh):
            return _Run(config, Path(workdir), stage, mesh).go()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"workdir {workdir} cannot be written ({error.strerror}): make room there and run "
            "the same command again, which goes on from the newest checkpoint"
        ) from error


class _Run:
    """One run of the loop: what its parts share."""

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
        self.checkpoints = Checkpoints(workdir, config.train.keep)
        self.state, optimizer = initial_state(stage, config, mesh)
        self.step_function = jax.jit(make_step(stage, optimizer, config), donate_argnums=0)
        self.rate = Throughput()
        self.watch = DataWatch(part_names(config.data))
        self.operations = sum(flops.training(config).values())
        self.agreed = Agreement(mesh)
        calls = config.profile, config.train.steps_per_call, self.progress.message
        self.trace = StepTrace(workdir / "profile", *calls)

    def go(self) -> dict[str, float]:
        """Restores, trains, evaluates."""
        if self.first:
            print_overview(self.state.params)
        restored = self.checkpoints.restore(self.state, self.loader)
        # Own checkpoint > init_from > random weights.
        if restored is not None:
            self.state = restored
        elif self.config.init_from:
            params = load_params(self.stage, self.config, self.mesh)
            self.state = self.state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
            self.progress.message(f"weights of {self.config.init_from}")
        if self.first:
            note_config(self.workdir, self.config)
        start = int(self.state.step)
        stop = _Stop()
        with (
            # A run from the beginning keeps no line of one before it.
            MetricsWriter(self.workdir, start_step=start or -1, enabled=self.first) as self.writer,
            contextlib.closing(self.loader),
            stop.listening(),
        ):
            try:
                if start:
                    self.progress.message(f"continuing from step {start}")
                elif self.config.train.steps:
                    self.report(0)
                finished = self.loop(start, stop)
                step = int(self.state.step)
                self.checkpoints.save(self.state, self.loader, step)
                if not finished:
                    self.progress.message(f"stopped at step {step}; run again to continue")
                    return {}
                result = self.report(step)
                self.draw(step)
                self.write_model(step)
                return result
            finally:
                self.progress.close()
                self.checkpoints.close()

    def loop(self, start: int, stop: _Stop) -> bool:
        """Runs steps until the end (True) or a request to stop (False)."""
        train = self.config.train
        rows = sharding.batch_sharding(self.mesh, leading=1)
        done, pending = start, None
        for step in range(start, train.steps, train.steps_per_call):
            if self.agreed(stop.requested):
                break
            with self.trace.call(step, self.state):
                batch = sharding.place(arrays(self.watch.take(self.loader)), rows)
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
        """What of "eval", "image" and "save" is to be done after a step."""
        every = {name: self.config.train[f"{name}_every"] for name in ("eval", "image", "save")}
        return {name for name, n in every.items() if n > 0 and step % n == 0}

    def occasionally(self, step: int, due: set[str]) -> None:
        """Evaluates, draws and then saves, so that what is saved has been reported."""
        if "eval" in due:
            self.report(step)
        if "image" in due:
            self.draw(step)
        if "save" in due:
            self.checkpoints.save(self.state, self.loader, step)

    def log(self, step: int, metrics: Any) -> None:
        """Fetches the metrics of a finished step, checks and shows them."""
        fetched = {k: float(v) for k, v in jax.device_get(metrics).items()}
        self.rate.update(step)
        in_a_row = int(fetched.pop("skipped_in_a_row"))
        if in_a_row >= self.config.train.max_skipped:
            raise UserError(
                f"{in_a_row} steps in a row up to step {step} had no finite loss and gradient; "
                "check the data, or start again with a lower optimizer.learning_rate and "
                "another --workdir"
            )
        if step % self.config.train.log_every == 0:
            speed = self.rate.steps_per_second
            size = self.config.train.batch_size
            fetched |= self.watch.report()
            if speed:
                kind, devices = self.mesh.devices.flat[0].device_kind, self.mesh.size
                fetched |= flops.speed(speed * size, self.operations, kind, devices)
            self.writer.scalars(step, fetched, prefix="train")
            total = self.config.train.steps
            self.progress.update(progress_line(step, total, fetched, speed, size))

    def report(self, step: int) -> dict[str, float]:
        """Evaluates the average on held-out data, prints and writes the result."""
        self.rate.pause()
        metrics = evaluate(self.stage, self.state.ema, self.frozen, self.config, self.mesh)
        self.writer.scalars(step, metrics, prefix="heldout")
        text = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in metrics.items())
        self.progress.message(f"held out at step {step}: {text}")
        self.rate.resume()
        return metrics

    def draw(self, step: int) -> None:
        """Draws a captioned grid with the average."""
        count = self.config.eval.pictures
        if not count:
            return
        self.rate.pause()
        pictures, captions = self.stage.pictures(self.state.ema, self.frozen, count)
        if self.first:
            path = self.workdir / "samples" / f"{step:08d}.png"
            grid = save_grid(path, np.stack(pictures), captions)
            self.writer.image(step, "samples", grid)
            self.progress.message(f"pictures at step {step}: {path}")
        self.rate.resume()

    def write_model(self, step: int) -> None:
        """Writes the average as a model folder."""
        average = sharding.fetch(self.state.ema)
        if not self.first:
            return
        folder = self.workdir / "model"
        description = {**self.stage.describe(), "step": step}
        text = getattr(self.stage, "text_tokenizer_file", None)
        model_folder.save(folder, description, average, dtype="bfloat16", text_tokenizer=text)
        self.progress.message(f"model: {folder}")


def print_overview(params: Params) -> None:
    """Prints name, shape and size of every parameter."""
    from clu import parameter_overview

    print(parameter_overview.get_parameter_overview(params, include_stats=False), flush=True)
