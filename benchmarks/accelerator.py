"""Measures this package on the accelerator that is here, in one short visit.

    python -m benchmarks.accelerator [--out FOLDER] [--minutes 6] [--rows train diffusion ...]

The most important rows come first, each in a process of its own with a limit of time, and
`accelerator.md` and `accelerator.json` in the folder are written anew after each, so that what was
measured stays whatever happens. Published sizes, random weights, bfloat16; no network, no files, no
extra but the device's own. --tiny tries all of it at sizes that a CPU computes in a minute or two.

Axes: B images, N latent tokens, K bits, L text length.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.arguments import seconds
from instella_jax.errors import command_line

TRAIN = ("-m", "benchmarks.train", "--one", "--synthetic")
PUBLISHED = dict(num_layers=16, num_heads=16, head_dim=128, num_tokens=128, bits=64)
TINY = dict(num_layers=2, num_heads=2, head_dim=16, num_tokens=8, bits=8)
TEXT_TOKENS, STEPS = 64, 20
# Batches of a training step, tried until one fits the memory.
BATCHES = (256, 128, 64, 32)
Call = Callable[[], Any]


def timed(call: Call, repeats: int) -> dict[str, Any]:
    """Return milliseconds of a call, the first of which compiles."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - start
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        spent.append(1e3 * (time.perf_counter() - start))
    return {
        "ms": statistics.median(spent), "least_ms": min(spent), "most_ms": max(spent),
        "first_call_s": first,
    }  # fmt: skip


def random_params(network: Any) -> Any:
    """Return parameters in bfloat16, made on the device."""
    import jax

    from instella_jax.models.functional import init_params
    from instella_jax.runtime import sharding

    return jax.jit(lambda key: sharding.values(init_params(network, key)))(jax.random.key(0))


def execution(tiny: bool) -> Any:
    """Return how networks are computed here."""
    from instella_jax.models.layers import Execution

    return Execution(param_dtype="bfloat16", dtype="bfloat16", unroll=not tiny)


def generators(kind: str, batches: tuple[int, ...], tiny: bool) -> Iterator[tuple[str, Call]]:
    """Yield sampling of codes, conditional and unconditional rows in one batch."""
    import jax
    import jax.numpy as jnp

    from instella_jax.models.ar_transformer import ArTransformer
    from instella_jax.models.diffusion_transformer import DiffusionTransformer
    from instella_jax.sampling import loops

    sizes: dict[str, Any] = TINY if tiny else PUBLISHED
    width = sizes["num_heads"] * sizes["head_dim"]
    network_class = DiffusionTransformer if kind == "diffusion" else ArTransformer
    network = network_class(**sizes, text_width=width, run=execution(tiny))
    params, length = random_params(network), 8 if tiny else TEXT_TOKENS
    for batch in batches:
        shape = (sizes["num_layers"], 2 * batch, length, width)
        text = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
        mask = jnp.broadcast_to(jnp.repeat(jnp.array([1, 0]), batch)[:, None], shape[1:3])
        keys = loops.image_keys(jnp.arange(batch))

        def call(text: Any = text, mask: Any = mask, keys: Any = keys) -> Any:
            if kind == "diffusion":
                return loops.sample_diffusion(network, params, text, mask, keys, steps=STEPS)
            return loops.sample_ar(network, params, text, mask, keys)

        how = f"{STEPS} steps" if kind == "diffusion" else f"{sizes['num_tokens']} tokens"
        yield f"{kind}, {how}, batch {batch}", call


def tokenizer(work: tuple[tuple[str, int, int], ...], tiny: bool) -> Iterator[tuple[str, Call]]:
    """Yield encoding and decoding of (what, pixels, batch)."""
    import jax
    import jax.numpy as jnp

    from instella_jax.models.functional import apply
    from instella_jax.models.tokenizer import TokenizerNetwork
    from instella_jax.models.tokenizer_config import TokenizerConfig

    config = TokenizerConfig()
    if tiny:
        config = TokenizerConfig(
            num_tokens=8, bits=8, encoder_layers=1, encoder_heads=2, encoder_head_dim=16,
            decoder_layers=2, decoder_heads=2, decoder_head_dim=16, rope_axes=(4, 6, 6),
            downsample_after=(0,), upsample_after=(0,),
        )  # fmt: skip
    network = TokenizerNetwork(config, execution(tiny))
    params = random_params(network)
    for what, side, batch in work:
        side = 64 if tiny else side
        shape = (batch, config.num_tokens, config.bits) if what == "decode" else None
        given = jax.random.uniform(jax.random.key(2), shape or (batch, side, side, 3))
        size = (side, side) if what == "decode" else ()
        step = jax.jit(lambda p, x, what=what, size=size: apply(network, p, x, *size, method=what))
        rounded = jnp.round(given)
        yield f"{what} {side} px, batch {batch}", lambda step=step, x=rounded: step(params, x)


def prompts(batches: tuple[int, ...], tiny: bool) -> Iterator[tuple[str, Call]]:
    """Yield the way from token ids to pictures: OLMo, diffusion, decoder."""
    import jax
    import jax.numpy as jnp

    from instella_jax.models.diffusion_transformer import DiffusionTransformer
    from instella_jax.models.functional import apply
    from instella_jax.models.olmo import Olmo, OlmoConfig
    from instella_jax.models.tokenizer import TokenizerNetwork
    from instella_jax.models.tokenizer_config import TokenizerConfig
    from instella_jax.sampling import loops

    sizes: dict[str, Any] = TINY if tiny else PUBLISHED
    width, run, side = sizes["num_heads"] * sizes["head_dim"], execution(tiny), 1024
    olmo, code = OlmoConfig(), TokenizerConfig()
    if tiny:
        side = 64
        olmo = OlmoConfig(64, width, 2 * width, sizes["num_layers"], 2, 2)
        code = TokenizerConfig(
            num_tokens=8, bits=8, encoder_layers=1, encoder_heads=2, encoder_head_dim=16,
            decoder_layers=2, decoder_heads=2, decoder_head_dim=16, rope_axes=(4, 6, 6),
            downsample_after=(0,), upsample_after=(0,),
        )  # fmt: skip
    reader, drawer = Olmo(olmo, run), TokenizerNetwork(code, run)
    network = DiffusionTransformer(**sizes, text_width=width, run=run)
    params = [random_params(part) for part in (reader, network, drawer)]
    read = jax.jit(lambda p, ids, mask: apply(reader, p, ids, mask)[1:])
    draw = jax.jit(lambda p, bits: apply(drawer, p, bits, side, side, method="decode"))
    for batch in batches:
        mask = jnp.broadcast_to(
            jnp.repeat(jnp.array([1, 0]), batch)[:, None], (2 * batch, 8 if tiny else TEXT_TOKENS)
        )
        keys = loops.image_keys(jnp.arange(batch))

        def call(mask: Any = mask, keys: Any = keys) -> Any:
            text = read(params[0], mask, mask)
            bits = loops.sample_diffusion(network, params[1], text, mask, keys, steps=STEPS)
            return draw(params[2], bits)

        yield f"prompt to {side} px, {STEPS} steps, batch {batch}", call


def floors(tiny: bool) -> Iterator[tuple[str, Call]]:
    """Yield what no program can beat here: a plain product, and reading memory."""
    import jax
    import jax.numpy as jnp

    side = 256 if tiny else 8192
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    yield f"product of {side} x {side} in bfloat16", lambda: product(x)
    long = jnp.ones((2**20 if tiny else 2**30,), jnp.float32)
    total = jax.jit(jnp.sum)
    yield f"sum of {long.size} float32", lambda: total(long)


def pieces(name: str, tiny: bool) -> Iterator[tuple[str, Call]]:
    """Return what a row of the table measures, by name."""
    few = (1,) if tiny else (1, 16)
    work = (("encode", 512, 1), ("encode", 512, 32), ("decode", 512, 1), ("decode", 512, 32),
            ("decode", 1024, 1))  # fmt: skip
    found = {
        "diffusion": lambda: generators("diffusion", few, tiny),
        "ar": lambda: generators("ar", few, tiny),
        "prompt": lambda: prompts(few, tiny),
        "tokenizer": lambda: tokenizer(work[::2] if tiny else work, tiny),
        "floors": lambda: floors(tiny),
    }
    return found[name]()


def training(name: str, tiny: bool) -> list[list[str]]:
    """Return command lines of `benchmarks.train` for a row, to be tried until one succeeds."""
    if tiny:
        config = "tokenizer" if name.startswith("train_tokenizer") else "t2i_diffusion"
        kind = [] if config == "tokenizer" else ["--config.data.kind=codes"]
        return [[*TRAIN, "--steps=2", f"--config=configs/{config}.py", *kind,
                 "--config.train.batch_size=8", "--config.train.steps_per_call=1",
                 "--config.run.unroll=False"]]  # fmt: skip
    if name.startswith("train_tokenizer"):
        side = name.removeprefix("train_tokenizer_")
        return [
            [*TRAIN, "--steps=4", f"--config=configs/tokenizer.py:instella_{side}",
             f"--config.train.batch_size={batch}"]
            for batch in ((32, 8) if side == "512" else (8, 2))
        ]  # fmt: skip
    return [
        [*TRAIN, "--steps=6", "--config=configs/t2i_diffusion.py:instella_512",
         "--config.data.kind=codes", f"--config.train.batch_size={batch}"]
        for batch in BATCHES
    ]  # fmt: skip


# The rows in order of importance, with the seconds that each may take.
ROWS = {
    "train": 130, "diffusion": 60, "prompt": 80, "ar": 60, "tokenizer": 80,
    "train_tokenizer_512": 90, "floors": 30, "train_tokenizer_1024": 90,
}  # fmt: skip


def one_row(name: str, tiny: bool) -> None:
    """Measure in this process, a line of JSON for each figure."""
    import jax

    from instella_jax.runtime.compile_cache import use_cache
    from instella_jax.runtime.devices import find_devices

    device = find_devices()[0]
    use_cache()
    for what, call in pieces(name, tiny):
        figures = timed(call, 2 if tiny else 7)
        print(json.dumps({
            "row": name, "what": what, "chip": device.device_kind, "jax": jax.__version__, **figures
        }), flush=True)  # fmt: skip


def lines_of(command: list[str], limit: float) -> tuple[list[dict[str, Any]], str]:
    """Run a command for a limited time.

    Returns:
      what its lines of JSON say, and why it ended early, "" where it did not.
    """
    env = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=env,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit)
        reason = ""
        if process.returncode:
            reason = (err.strip().splitlines() or ["no message"])[-1][:160]
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        reason = f"not finished after {limit:.0f} s"
    finally:
        process.kill()  # where this one is interrupted
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], reason


def of_training(found: dict[str, Any], name: str, command: list[str]) -> dict[str, Any]:
    """Return a figure of `benchmarks.train` in the form of the others."""
    batch = next(x.rpartition("=")[2] for x in command if "batch_size" in x)
    more = f"{found['images_per_second']:.1f} images/s, {found['peak_memory'] / 1e9:.1f} GB"
    if "model_flops_utilisation" in found:
        more += f", {found['model_flops_utilisation']:.1%} of peak"
    return {
        "row": name, "what": f"{name.replace('_', ' ')}, batch {batch}",
        "ms": 1e3 * found["median"], "least_ms": 1e3 * found["least"],
        "most_ms": 1e3 * found["most"], "first_call_s": found["compile_seconds"],
        "more": more, "where": found["where"],
    }  # fmt: skip


def measure(name: str, tiny: bool, limit: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of a row, and why there are no more."""
    end = time.monotonic() + limit
    if not name.startswith("train"):
        command = ["-m", "benchmarks.accelerator", "--one", name, *(["--tiny"] if tiny else [])]
        found, reason = lines_of(command, limit)
        yield from found
    else:
        reason = ""
        for command in training(name, tiny):
            found, reason = lines_of(command, max(1.0, end - time.monotonic()))
            if found:
                yield of_training(found[-1], name, command)
                break
            if time.monotonic() > end:
                break
    if reason:
        yield {"row": name, "what": name, "reason": reason}


def markdown(figures: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = ["| work | ms (range) | first call, s | |", "|---|---|---|---|"]
    for x in figures:
        if "reason" in x:
            lines.append(f"| {x['what']} | not measured: {x['reason']} | | |")
            continue
        span = f"{x['ms']:.1f} ({x['least_ms']:.1f} to {x['most_ms']:.1f})"
        lines.append(f"| {x['what']} | {span} | {x['first_call_s']:.1f} | {x.get('more', '')} |")
    setting = next((f"{x['chip']}, jax {x['jax']}" for x in figures if "chip" in x), "")
    setting = setting or next((x["where"] for x in figures if "where" in x), "no device")
    return f"{setting}, {time.strftime('%Y-%m-%d')}\n\n" + "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> None:
    """Measure row by row until the time is over."""
    options.out.mkdir(parents=True, exist_ok=True)
    end, figures = time.monotonic() + 60 * options.minutes, []
    for name in options.rows:
        left = end - time.monotonic()
        if left < 10:
            figures.append({"row": name, "what": name, "reason": "no time was left"})
        else:
            for figure in measure(name, options.tiny, min(ROWS[name], left)):
                figures.append(figure)
                print(json.dumps(figure), flush=True)
        (options.out / "accelerator.md").write_text(markdown(figures), encoding="utf-8")
        (options.out / "accelerator.json").write_text(
            json.dumps(figures, indent=1), encoding="utf-8"
        )
    print(markdown(figures))


def main() -> None:
    """Measure all rows, or one of them in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("accelerator"), help="folder for the table"
    )
    parser.add_argument("--minutes", type=seconds, default=6.0, help="of the whole visit")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU computes in minutes")
    parser.add_argument("--one", choices=tuple(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with command_line():
        if options.one:
            one_row(options.one, options.tiny)
        else:
            run(options)


if __name__ == "__main__":
    main()
