"""Plans against hand counts, against real training states, and their warnings."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from instella_jax import flops, plan, plan_report, sharding
from instella_jax.errors import UserError
from instella_jax.run_setup import initial_state, load_frozen
from instella_jax.stages import make_stage

pytestmark = pytest.mark.usefixtures("quick_compile")


def edit(config, **keys):
    return plan.changed(config, {key.replace("__", "."): value for key, value in keys.items()})


def test_counts_are_those_of_a_real_training_state(tiny_diffusion_config):
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
    assert plan.count(shapes) == sum(x.size for x in jax.tree.leaves(loaded))


@pytest.mark.slow
def test_accumulation_takes_less(tiny_tokenizer_config):
    base = edit(tiny_tokenizer_config, train__batch_size=32, data__image_size=64)
    mesh = sharding.make_mesh(base.mesh, jax.devices()[:1])
    plain = plan.measure(base, mesh)[0].working
    parts = plan.measure(edit(base, train__accumulate=4), mesh)[0].working
    assert parts < plain / 2
    # The pictures of a batch, three floats of each pixel, are among the activations.
    assert plain > 32 * 64 * 64 * 3 * 4


def test_a_step_that_fits_is_planned_without_warning(tiny_tokenizer_config, capsys):
    config = edit(tiny_tokenizer_config, plan__devices=1, plan__utilisation=0.5)
    made = plan.make_plan(config)
    text = plan_report.report(made, config)
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


@pytest.mark.slow
def test_a_step_that_does_not_fit_names_what_would(tiny_tokenizer_config):
    config = edit(tiny_tokenizer_config, train__batch_size=64, plan__devices=1)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    memory = plan.measure(config, mesh)[0]
    room = memory.kept + memory.batch + memory.params + memory.working / 3
    config = edit(config, plan__memory_gb=room / plan.USABLE / 1e9)
    made = plan.make_plan(config)
    changes, fitting = made.remedies[-1]
    assert not made.fits and fitting.total <= made.limit
    assert {"train.accumulate", "run.remat"} & set(changes)
    # What is named does what it says.
    again = plan.measure(plan.changed(config, changes), mesh)[0]
    assert again == fitting
    text = plan_report.report(made, config)
    assert "does NOT fit" in text and f"--config.{next(iter(changes))}=" in text


@pytest.mark.slow
def test_nothing_fits_in_no_memory(tiny_tokenizer_config):
    config = edit(tiny_tokenizer_config, mesh__data=2, plan__devices=2, plan__memory_gb=1e-9)
    made = plan.make_plan(config)
    assert any("mesh.fsdp" in changes for changes, _ in made.remedies)
    assert "nothing tried fits" in plan_report.report(made, config)


@pytest.mark.parametrize(
    "keys",
    [
        {"plan.chip": "M1"},
        {"plan.utilisation": 0.0},
        {"plan.utilisation": 1.5},
        {"run.attention": "flash", "plan.devices": 1},
    ],
)
def test_impossible_plans_are_user_errors(tiny_tokenizer_config, keys):
    with pytest.raises(UserError, match=re.escape(next(iter(keys)))):
        plan.make_plan(plan.changed(tiny_tokenizer_config, keys))


def test_attention_that_only_a_gpu_has_is_planned_for(tiny_tokenizer_config):
    config = edit(tiny_tokenizer_config, plan__devices=1, run__attention="xla")
    cudnn = plan.changed(config, {"run.attention": "cudnn"})
    assert plan.make_plan(cudnn).memory == plan.make_plan(config).memory


@pytest.mark.slow
def test_the_command_plans_without_files_or_devices():
    run = subprocess.run(
        [sys.executable, "-m", "instella_jax.main", "--config=configs/t2i_ar.py:instella_512",
         "--mode=plan", "--config.model.num_layers=2", "--config.text.model.num_hidden_layers=2",
         "--config.plan.devices=4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "mesh data=4 fsdp=1 tensor=1" in run.stdout
