"""`instella-jax doctor`: what this machine computes with, and what is wrong with that."""

import dataclasses
import glob
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from instella_jax.errors import UserError
from instella_jax.runtime import distributed
from instella_jax.runtime.compile_cache import cache_folder, can_keep
from instella_jax.runtime.devices import ASK_DOCTOR, find_devices

PACKAGES = (
    "instella-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
    "transformers", "tokenizers",
)  # fmt: skip
PLUGINS = {
    "NVIDIA GPU": ("jax-cuda13-plugin", "jax-cuda12-plugin"),
    "AMD GPU": ("jax-rocm7-plugin", "jax-rocm60-plugin"),
    "TPU": ("libtpu",),
}
EXTRAS = {"NVIDIA GPU": "cuda", "AMD GPU": "rocm", "TPU": "tpu"}
# A float32 step on an accelerator may use shorter products: this much is no fault.
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found.

    Attributes:
      versions: of installed packages, plugins among them.
      hardware: accelerators of the machine, keys of `PLUGINS`.
      backend: what jax computes on: "cpu", "gpu", "tpu"; "" where it does not start.
      devices: kind of each local device.
      memory: bytes of one device that jax may use, None where it does not say.
      host_memory: bytes of this machine, and how many of them programs can still take; None where
        it does not say.
      attention: engines of attention that work here, see `models.attention`.
      kernel: what samples the bits.
      step_error: relative difference of a training step to the CPU's, NaN where it is not finite.
      step_seconds: what that step took.
      error: what jax said when it did not start, or what failed in the step.
      platforms: JAX_PLATFORMS.
      cache: the folder of compiled programs can be written.
      processes: how this process would join others, see `distributed.Setup`; or the mistake.
    """

    versions: Mapping[str, str]
    hardware: frozenset[str]
    backend: str = ""
    devices: tuple[str, ...] = ()
    memory: int | None = None
    host_memory: tuple[int | None, int | None] = (None, None)
    attention: tuple[str, ...] = ()
    kernel: str = ""
    step_error: float = 0.0
    step_seconds: float = 0.0
    error: str = ""
    platforms: str = ""
    cache: bool = True
    processes: str = "alone"


def find_versions() -> dict[str, str]:
    """Return versions of what is installed of the packages and plugins."""
    found = {}
    for name in (*PACKAGES, *(plugin for group in PLUGINS.values() for plugin in group)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def find_hardware() -> frozenset[str]:
    """Return accelerators that the operating system shows, whatever jax makes of them."""
    found = set()
    if glob.glob("/dev/nvidia[0-9]*") or shutil.which("nvidia-smi"):
        found.add("NVIDIA GPU")
    if os.path.exists("/dev/kfd"):
        found.add("AMD GPU")
    if glob.glob("/dev/accel[0-9]*") or os.environ.get("TPU_WORKER_HOSTNAMES"):
        found.add("TPU")
    return frozenset(found)


def find_memory() -> tuple[int | None, int | None]:
    """Return bytes of the machine's memory, and of what programs can still take; None for
    unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not everywhere
        total = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # Linux alone has it
        lines = []
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return total, 1024 * int(available[0]) if available else None


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:3])


def diagnose(facts: Facts) -> Iterator[str]:
    """Yield one sentence for each thing that is wrong."""
    versions = facts.versions
    jaxlib = versions.get("jaxlib", "")
    if _release(versions.get("jax", "")) != _release(jaxlib):
        yield (
            f"jax {versions.get('jax')} and jaxlib {jaxlib} do not belong together: "
            "pip install --upgrade jax jaxlib"
        )
    installed = {kind: [p for p in group if p in versions] for kind, group in PLUGINS.items()}
    for plugin in (*installed["NVIDIA GPU"], *installed["AMD GPU"]):
        if _release(versions[plugin]) != _release(jaxlib):
            yield (
                f"{plugin} {versions[plugin]} does not fit jaxlib {jaxlib}, so jax may ignore it: "
                f"install both in the same version"
            )
    if installed["NVIDIA GPU"] and installed["AMD GPU"]:
        yield "plugins for NVIDIA and for AMD are both installed: remove the one you do not need"
    for kind in sorted(facts.hardware):
        if facts.backend != "cpu":
            continue
        said = f"this machine has a {kind}, but jax computes on the CPU"
        if "cpu" in facts.platforms.split(","):
            yield f"{said} because JAX_PLATFORMS={facts.platforms} says so"
        elif not installed[kind]:
            extra = f"instella-jax[{EXTRAS[kind]}]"
            yield f"{said}: no plugin for it is installed; pip install '{extra}'"
        else:
            yield (
                f"{said} although {installed[kind][0]} is installed: check the driver and that "
                "this user may open the device"
            )
    if not facts.backend:
        yield f"jax does not start: {facts.error}"
    elif facts.error:
        yield f"a small training step failed on the device: {facts.error}"
    elif not facts.step_error <= TOLERANCE:
        yield (
            f"a small training step gives other numbers on the device than on the CPU "
            f"(relative difference {facts.step_error:.2g}): the driver or the compiler is at fault"
        )
    if not facts.cache:
        yield (
            f"compiled programs cannot be kept in {cache_folder() or 'a home folder'}, so that "
            "every start compiles again: set INSTELLA_JAX_CACHE to a folder of your own"
        )
    if facts.processes.startswith("error: "):
        yield f"the environment of several processes cannot be used: {facts.processes[7:]}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def try_attention() -> tuple[str, ...]:
    """Return engines of attention that give a result on the device."""
    import jax
    import jax.numpy as jnp

    from instella_jax.models.attention import OWN, attend, platform

    x = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    works = ["xla", "blocks"]
    if platform() in OWN:
        own, _ = OWN[platform()]
        try:
            jax.block_until_ready(attend(x, x, x, None, own))
            works.append(own)
        except Exception:  # whatever the library or its absence raises
            pass
    return tuple(works)


def try_step(device: Any) -> tuple[float, float]:
    """Take a training step of a tiny tokenizer on a device.

    Returns:
      Sum of squares of the updated parameters, and the seconds of a second step.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from instella_jax.models.functional import apply, init_params
    from instella_jax.models.tokenizer import TokenizerNetwork
    from instella_jax.models.tokenizer_config import TokenizerConfig
    from instella_jax.runtime.sharding import values

    sizes = TokenizerConfig(
        num_tokens=4, bits=8, encoder_layers=1, encoder_heads=2, encoder_head_dim=16,
        decoder_layers=1, decoder_heads=2, decoder_head_dim=16, rope_axes=(8, 4, 4),
        downsample_after=(), upsample_after=(), scale=None,
    )  # fmt: skip
    network = TokenizerNetwork(sizes)
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(params: Any, images: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            code = jax.nn.sigmoid(apply(network, params, images, method="encode"))
            decoded = apply(network, params, code, 32, 32, method="decode")
            return jnp.mean(jnp.square(decoded - images))

        updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    with jax.default_device(device):
        params = jax.jit(lambda key: values(init_params(network, key)))(jax.random.key(0))
        images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3), minval=-1.0)
        new = jax.block_until_ready(step(params, images))
        start = time.perf_counter()
        jax.block_until_ready(step(new, images))
        seconds = time.perf_counter() - start
        total = sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(jax.device_get(new)))
    return total, seconds


def examine() -> Facts:
    """Look at the machine, and compute a little."""
    try:
        setup = distributed.detect(os.environ)
        processes = setup.how if setup.how == "alone" else f"{setup.how}, {setup.processes or '?'}"
    except UserError as error:
        processes = f"error: {error}"
    facts = Facts(
        find_versions(),
        find_hardware(),
        host_memory=find_memory(),
        platforms=os.environ.get("JAX_PLATFORMS", ""),
        cache=can_keep(),
        processes=processes,
    )
    try:
        devices = find_devices()
    except UserError as error:
        return dataclasses.replace(facts, error=str(error).removesuffix(ASK_DOCTOR))
    import jax

    from instella_jax.kernels import binary_sampling

    backend = jax.default_backend()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    facts = dataclasses.replace(
        facts,
        backend=backend,
        devices=tuple(device.device_kind for device in devices),
        memory=memory,
        kernel=binary_sampling.resolve("auto", backend),
    )
    try:
        attention = try_attention()
        total, seconds = try_step(devices[0])
        expected = total
        if backend != "cpu" and "cpu" in (facts.platforms or "cpu").split(","):
            expected, _ = try_step(jax.devices("cpu")[0])
    except Exception as error:  # whatever a broken driver makes of it
        return dataclasses.replace(facts, error=_one_line(error))
    difference = abs(total - expected) / abs(expected)
    return dataclasses.replace(
        facts, attention=attention, step_error=difference, step_seconds=seconds
    )


def describe(facts: Facts) -> Iterator[str]:
    """Yield what was found, a line for each."""
    yield f"python      {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "packages    " + ", ".join(f"{k} {v}" for k, v in facts.versions.items())
    yield f"hardware    {', '.join(sorted(facts.hardware)) or 'no accelerator seen'}"
    kinds = ", ".join(f"{facts.devices.count(k)} x {k}" for k in dict.fromkeys(facts.devices))
    yield f"backend     {facts.backend or 'none'} ({kinds or 'no device'})"
    if facts.backend not in ("", "cpu"):
        yield f"memory      of each device for jax: {_gigabytes(facts.memory)}"
    total, available = map(_gigabytes, facts.host_memory)
    yield f"host memory {total}, available {available}"
    yield f"attention   {', '.join(facts.attention) or 'not tried'} (config.run.attention)"
    yield f"bit kernel  {facts.kernel or 'not tried'}"
    if facts.attention:
        milliseconds = 1e3 * facts.step_seconds
        same = "" if facts.backend == "cpu" else f", as on the CPU to {facts.step_error:.1g}"
        yield f"tiny step   {milliseconds:.1f} ms{same}"
    yield f"cache       {cache_folder() or 'none: this user has no home folder'}"
    yield f"processes   {facts.processes}"


def main(as_json: bool = False) -> int:
    """Print facts and problems, or their JSON; return 1 where there is a problem, else 0."""
    facts = examine()
    problems = list(diagnose(facts))
    if as_json:
        values = {k: getattr(facts, k) for k in (f.name for f in dataclasses.fields(facts))}
        print(json.dumps({**values, "problems": problems}, default=sorted))
        return 1 if problems else 0
    print("\n".join(describe(facts)))
    for problem in problems:
        print(f"PROBLEM: {problem}.")
    if not problems:
        print("Nothing wrong was found.")
    return 1 if problems else 0
