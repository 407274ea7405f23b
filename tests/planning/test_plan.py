"""Plans against hand counts, against real training states, and their warnings."""

import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import t2i_diffusion
from instella_jax.errors import UserError
from instella_jax.planning import plan, report
from instella_jax.runtime import sharding
from instella_jax.stages import make_stage
from instella_jax.stages.parameters import load_frozen
from instella_jax.training import flops
from instella_jax.training import step as step_module
from instella_jax.training.setup import initial_state
from instella_jax.training.step import gradients
from tests.uncompiled import compile_nothing


def edit(config, **keys):
    return plan.changed(config, {key.replace("__", "."): value for key, value in keys.items()})


@pytest.fixture(scope="module")
def measured():
    """What has been measured here, by config and mesh."""
    return {}


@pytest.fixture
def once(measured, monkeypatch):
    """The same step on the same mesh is compiled for one of the tests of this file alone."""
    measure = plan.measure

    def known(config, mesh):
        values = config.to_dict()
        # For whom the plan is, is no matter of the step.
        del values["plan"]
        key = repr((values, tuple(mesh.shape.items())))
        if key not in measured:
            measured[key] = measure(config, mesh)
        return measured[key]

    monkeypatch.setattr(plan, "measure", known)


def part_size(x, where):
    """Bytes of a device's part of an array."""
    return math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize


@pytest.mark.slow
def test_counts_are_those_of_a_real_training_state(tiny_diffusion_config, monkeypatch):
    compile_nothing(monkeypatch)
    config = edit(
        tiny_diffusion_config, mesh__data=2, mesh__fsdp=4, plan__devices=8, text__trainable=False
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    memory, state, _ = plan.measure(config, mesh)
    stage = make_stage(config)
    with sharding.use(mesh):
        real, _ = initial_state(stage, config, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(real)

    def on_first_device(tree):
        arrays = [
            x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ]
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)

    assert memory.params == on_first_device(real.params)
    assert memory.average == on_first_device(real.ema)
    assert memory.optimizer == on_first_device(real.opt_state)
    whole = sum(x.nbytes for x in jax.tree.leaves(real.params))
    assert whole / 4 <= memory.params < whole
    # 8 pictures of 32 x 32 x 3 bytes, with ids of 4 bytes and a mask of 1, in 8 parts.
    assert memory.batch == 32 * 32 * 3 + 5 * config.text.max_length


def test_frozen_parameters_are_those_that_training_loads(tiny_diffusion_config):
    config = edit(tiny_diffusion_config, run__param_dtype="bfloat16")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    stage = make_stage(config)
    shapes = plan.frozen_shapes(stage, config, mesh)
    loaded = load_frozen(stage, mesh)
    assert plan.local_size(shapes) == sum(x.nbytes for x in jax.tree.leaves(loaded))
    assert plan.parameter_count(shapes) == sum(x.size for x in jax.tree.leaves(loaded))


@pytest.mark.thorough
def test_gradients_are_divided_like_the_parameters(tiny_tokenizer_config, monkeypatch):
    held, said = {}, []

    def watched(*arguments):
        grads, metrics = gradients(*arguments)
        for path, x in jax.tree.leaves_with_path(grads):
            jax.debug.inspect_array_sharding(
                x, callback=lambda s, p=path, x=x: held.update({p: part_size(x, s)})
            )
        return grads, metrics

    analyse = jax.stages.Compiled.memory_analysis
    monkeypatch.setattr(step_module, "gradients", watched)
    monkeypatch.setattr(
        jax.stages.Compiled, "memory_analysis", lambda c: said.append(analyse(c)) or said[0]
    )
    monkeypatch.setattr(plan, "working_bytes", lambda config, mesh, of_cpu: of_cpu)
    config = edit(tiny_tokenizer_config, mesh__fsdp=4, train__accumulate=2)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
    memory, *_ = plan.measure(config, mesh)
    # With several parts there are the sum and what is added to it.
    assert memory.gradients == 2 * sum(held.values())
    assert memory.gradients + memory.working == said[0].temp_size_in_bytes
    assert memory.total == memory.kept + memory.batch + said[0].temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "attention", "rows", "gigabytes"),
    # On one H200: 42.9 GB of which state, frozen OLMo and gradients are 30.7, and 131 of which
    # parameters, averages, moments and gradients are 26.
    [("full", "xla", 256, 12.2), ("none", "blocks", 256, 105.0)],
)
def test_temporaries_are_near_what_a_gpu_needed(remat, attention, rows, gigabytes):
    config = t2i_diffusion.get_config("instella_512")
    config.data.kind = "codes"
    config = edit(config, run__remat=remat, run__attention=attention)
    found = plan.MEASURED_SHARE * plan.backward_bytes(config, rows) / 1e9
    assert found == pytest.approx(gigabytes, rel=1 / 3)


@pytest.mark.thorough
def test_accumulation_takes_less(tiny_tokenizer_config):
    base = edit(tiny_tokenizer_config, train__batch_size=32, data__image_size=64)
    mesh = sharding.make_mesh(base.mesh, jax.devices()[:1])
    plain = plan.measure(base, mesh)[0].working
    parts = plan.measure(edit(base, train__accumulate=4), mesh)[0].working
    assert parts < plain / 2
    # The pictures of a batch, three floats of each pixel, are among the activations.
    assert plain > 32 * 64 * 64 * 3 * 4


def test_a_step_that_fits_is_planned_without_warning(tiny_tokenizer_config, once):
    config = edit(tiny_tokenizer_config, plan__devices=1, plan__utilisation=0.5)
    made = plan.make_plan(config)
    text = report.report(made, config)
    assert made.limit == pytest.approx(0.9 * 192e9)  # of an MI300X
    assert made.fits and not made.remedies and "WARNING" not in text
    # 8 steps of 8 images at half of the chip's peak.
    rate = 0.5 * 989e12 / sum(flops.training(config).values())
    line = next(line for line in text.splitlines() if "H100" in line)
    assert int(re.search(r"([\d,]+) images/s", line)[1].replace(",", "")) == round(rate)
    assert made.checkpoint == pytest.approx(16 * made.trained, rel=0.01)
    # XLA counts element-wise work too, much beside matrices of width 16, and of the last blocks,
    # which it is given unrolled, only the rows that are read.
    assert sum(made.flops.values()) * 0.8 < made.xla_flops < 3 * sum(made.flops.values())
    assert "(e) is estimated" in text


@pytest.mark.thorough
def test_a_step_that_does_not_fit_names_what_would(tiny_tokenizer_config, once):
    # A plan measures "auto" as "blocks".
    config = edit(
        tiny_tokenizer_config, train__batch_size=64, plan__devices=1, run__attention="blocks"
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    memory = plan.measure(config, mesh)[0]
    room = memory.kept + memory.batch + memory.gradients + memory.working / 3
    config = edit(config, plan__memory_gb=room / plan.USABLE / 1e9)
    made = plan.make_plan(config)
    changes, fitting = made.remedies[-1]
    assert not made.fits and fitting.total <= made.limit
    assert {"train.accumulate", "run.remat"} & set(changes)
    # What is named does what it says.
    again = plan.measure(plan.changed(config, changes), mesh)[0]
    assert again == fitting
    text = report.report(made, config)
    assert "does NOT fit" in text and f"--config.{next(iter(changes))}=" in text


def pretend_to_measure(gigabytes, kept=28.0, gradients=5.0, slack=0.0):
    """Stands in for `plan.measure`: activations in GB by remat, divided by the parts of a batch."""

    def measure(config, mesh):
        parts, spread = config.train.accumulate, mesh.shape["fsdp"]
        working = gigabytes[config.run.remat] / parts + slack * (parts > 1)
        sizes = [gradients / spread, 0.0, kept / spread, 0.0, 0.0]
        return plan.Memory(*sizes, gradients * (1 + (parts > 1)) / spread, working), None, None

    return measure


@pytest.mark.parametrize(
    ("devices", "room", "how", "tried"),
    [
        # 77 with remat alone, and then half of the activations: 28 + 5 + 10 + 20.
        (1, 72, dict(gigabytes={"none": 300, "full": 39}), [{}, {"train.accumulate": 2}]),
        # The first number of parts turns out to take more than it should.
        (1, 60, dict(gigabytes={"none": 300, "full": 33}, slack=1),
         [{}, {"train.accumulate": 2}, {"train.accumulate": 4}]),
        (4, 26, dict(gigabytes={"none": 300, "full": 39}),
         [{}, {"mesh.data": 1, "mesh.fsdp": -1},
          {"mesh.data": 1, "mesh.fsdp": -1, "train.accumulate": 4}]),
    ],
)  # fmt: skip
def test_parts_are_sized_by_the_last_try(
    tiny_tokenizer_config, monkeypatch, devices, room, how, tried
):
    config = edit(tiny_tokenizer_config, train__batch_size=256, mesh__data=devices)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    measure = pretend_to_measure(**how)
    monkeypatch.setattr(plan, "measure", measure)
    found = plan.find_remedies(config, mesh, measure(config, mesh)[0], room)
    assert [changes for changes, _ in found] == [{"run.remat": "full", **more} for more in tried]
    assert [memory.total <= room for _, memory in found] == [False] * (len(tried) - 1) + [True]


def test_nothing_fits_in_no_memory(tiny_tokenizer_config, monkeypatch):
    memory_of = pretend_to_measure(dict(none=300, full=39))

    def measure(config, mesh):
        _, (state, frozen, _) = plan.abstract_step(config, mesh)
        return memory_of(config, mesh)[0], state, frozen

    monkeypatch.setattr(plan, "measure", measure)
    config = edit(tiny_tokenizer_config, mesh__data=2, plan__devices=2, plan__memory_gb=1e-9)
    made = plan.make_plan(config)
    assert any("mesh.fsdp" in changes for changes, _ in made.remedies)
    assert "nothing tried fits" in report.report(made, config)


def test_numbers_are_written_to_be_read(tiny_tokenizer_config):
    memory = plan.Memory(*[40_000] * 7)
    made = plan.Plan(
        memory, 172.8e9, 1.0, dict(dcn_data=1, data=1, fsdp=1, tensor=1), 34_600, 0, 560_000,
        {"tokenizer": 1_030_000}, 865_000.0, (),
    )  # fmt: skip
    config = edit(tiny_tokenizer_config, plan__devices=1, train__batch_size=1)
    text = report.report(made, config)
    assert "GFLOP per image: 0.00103 (tokenizer 0.00103); XLA counts 0.000865." in text
    assert "Speed of 1 device at" in text and "8 steps of 1 image:" in text
    assert re.search(r"192 GB +279,165,049 images/s \(279,165,049 a device\) +under a minute", text)
    assert re.search(r"gradients +0.04 MB", text) and "0.00 " not in text
    assert [report.duration(s) for s in (90, 10_800, 90_000, 200_000, 1e9)] == [
        "1.5 minutes", "3 hours", "25 hours", "2.31 days", "11,574 days",
    ]  # fmt: skip
    assert report.several(2, "part") == "2 parts"


@pytest.mark.parametrize(
    "keys",
    [
        {"plan.chip": "M1"},
        {"plan.utilisation": 0.0},
        {"plan.utilisation": 1.5},
        {"plan.memory_gb": -5.0},
        {"plan.memory_gb": float("nan")},
        {"run.attention": "fast", "plan.devices": 1},
    ],
)
def test_impossible_plans_are_user_errors(tiny_tokenizer_config, keys):
    with pytest.raises(UserError, match=re.escape(next(iter(keys)))):
        plan.make_plan(plan.changed(tiny_tokenizer_config, keys))


def test_attention_that_only_a_gpu_has_is_planned_for(tiny_tokenizer_config, once):
    config = edit(tiny_tokenizer_config, plan__devices=1, run__attention="blocks")
    expected = plan.make_plan(config).memory
    for engine in ("cudnn", "flash", "auto"):
        assert plan.make_plan(plan.changed(config, {"run.attention": engine})).memory == expected


@pytest.mark.slow
def test_the_command_plans_without_files_or_devices():
    run = subprocess.run(
        [sys.executable, "-m", "instella_jax.main", "--config=configs/t2i_ar.py:instella_512",
         "--mode=plan", "--config.model.num_layers=1", "--config.text.model.num_hidden_layers=1",
         "--config.model.num_heads=2", "--config.text.model.hidden_size=64",
         "--config.text.model.intermediate_size=64", "--config.text.model.num_attention_heads=2",
         "--config.text.model.num_key_value_heads=2", "--config.plan.devices=4",
         "--config.data.kind=codes"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "mesh data=4 fsdp=1 tensor=1" in run.stdout


def test_the_sums_of_memory_hold_every_part_once():
    memory = plan.Memory(
        params=1, average=10, optimizer=100, frozen=1_000, batch=10_000, gradients=100_000,
        working=1_000_000,
    )  # fmt: skip
    assert memory.kept == 1_111 and memory.total == 1_111_111


def test_the_average_takes_what_the_parameters_take(tiny_tokenizer_config, once):
    config = edit(tiny_tokenizer_config, plan__devices=1, run__attention="blocks")
    memory, state, _ = plan.measure(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    assert memory.average == memory.params == 4 * plan.parameter_count(state.params) > 0
    # A batch that is not taken in parts has its gradients once.
    assert memory.gradients == memory.average
