"""Times this package beside the same networks in plain PyTorch, in one process and in turn.

    python -m benchmarks.against_torch [--what encode decode diffusion ar train] [--compile]

Both have the same random weights, and what they compute is compared before it is timed. PyTorch's
side is `benchmarks/plain_torch.py`, eager or under torch.compile: attention by SDPA, all tokens so
far computed anew for each one that is sampled autoregressively, as in the published system. Runs on
the first GPU where both frameworks have one, else on the CPU. Needs the extra `torch`. Prints
Markdown; --json writes the figures too.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.arguments import whole
from benchmarks.timing import spread, where
from instella_jax.errors import UserError, command_line
from instella_jax.models import binary_diffusion
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import Network, apply, init_params
from instella_jax.models.layers import Execution
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.models.tokenizer_config import TokenizerConfig
from instella_jax.runtime import sharding
from instella_jax.sampling import loops
from instella_jax.weights import convert

SIZES = {
    "mid": dict(num_layers=6, num_heads=8, head_dim=64, num_tokens=128, bits=64, text_width=512),
    "published": dict(
        num_layers=16, num_heads=16, head_dim=128, num_tokens=128, bits=64, text_width=2_048
    ),
}
TINY_GENERATOR = dict(num_layers=2, num_heads=2, head_dim=16, num_tokens=8, bits=8, text_width=16)
TINY_TOKENIZER = TokenizerConfig(
    num_tokens=8, bits=8, encoder_layers=2, encoder_heads=2, encoder_head_dim=16, decoder_layers=2,
    decoder_heads=2, decoder_head_dim=16, rope_axes=(4, 6, 6), downsample_after=(0,),
    upsample_after=(0,),
)  # fmt: skip
PATHS = ("encode", "decode", "diffusion", "ar", "train")
LENGTH = 64  # text tokens
GUIDANCE = 7.5
# Of the largest result: how far apart results of the two may be in each type of the computation.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
# Diffusion is compared over so few steps: a bit that rounding flips changes others in every later
# step, and after 20 steps of random weights and strong guidance one in a hundred differs.
COMPARED = 2


class Both:
    """Makes what is timed, the same for both frameworks.

    Attributes:
      torch: the module.
      device: of PyTorch.
    """

    def __init__(self, options: argparse.Namespace):
        """Read the command line.

        Raises:
          UserError: PyTorch is not installed.
        """
        try:
            import torch

            from benchmarks import plain_torch
        except ModuleNotFoundError:
            raise UserError(
                "no PyTorch to compare with: pip install 'instella-jax[torch]'"
            ) from None
        self.torch, self.plain, self.options = torch, plain_torch, options
        gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
        self.device = "cuda" if gpu else "cpu"
        if not gpu and hasattr(os, "sched_getaffinity"):
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        tiny = options.size == "tiny"
        self.tokenizer = TINY_TOKENIZER if tiny else TokenizerConfig()
        sizes: dict[str, Any] = dict(TINY_GENERATOR if tiny else SIZES[options.size])
        self.text_width = sizes.pop("text_width")
        self.generator, self.length = sizes, 5 if tiny else LENGTH
        self.run = Execution(dtype=options.dtype, param_dtype=options.dtype, unroll=True)
        # As the codec computes it: 24 layers would compile for minutes on a CPU.
        self.scanned = dataclasses.replace(self.run, unroll=False)
        self.rng = np.random.default_rng(0)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile PyTorch's side where it is asked for."""
        return self.torch.compile(function) if self.options.compile else function

    def tensor(self, x: Any) -> Any:
        """Return PyTorch's copy of an array, in the type of the computation."""
        tensor = self.torch.from_numpy(np.array(x, np.float32)).to(self.device)
        return tensor.to(getattr(self.torch, self.options.dtype))

    def weights(self, network: Network) -> tuple[Any, dict[str, Any]]:
        """Return random parameters, and the same by their published names."""
        params = jax.jit(lambda key: sharding.values(init_params(network, key)))(jax.random.key(0))
        # Weights that start at zero would hide what they are for.
        leaves, tree = jax.tree.flatten(params)
        leaves = [
            x + jax.random.normal(jax.random.key(i), x.shape, x.dtype) * 0.02
            for i, x in enumerate(leaves)
        ]
        params = jax.tree.unflatten(tree, leaves)
        named = convert.from_params(network, params)
        return params, {name: self.tensor(value) for name, value in named}

    def timed(self, ours: Callable[..., jax.Array], theirs: Callable[..., Any]) -> Any:
        """Return both as calls that wait and give numpy arrays."""

        def wait(*arguments: Any) -> np.ndarray:
            with self.torch.no_grad():
                return theirs(*arguments).float().cpu().numpy()

        return lambda *arguments: np.asarray(ours(*arguments), np.float32), wait

    def encode(self) -> Any:
        """Return images to logits."""
        network = TokenizerNetwork(self.tokenizer, self.scanned)
        params, w = self.weights(network)
        side, batch = self.options.side, self.options.batch
        images = self.rng.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
        call = jax.jit(lambda p, x: apply(network, p, x, method="encode"))
        theirs = self.compiled(lambda w, x: self.plain.encode(w, self.tokenizer, x))
        given, tensor = jnp.asarray(images), self.tensor(images.transpose(0, 3, 1, 2))
        return self.timed(lambda: call(params, given), lambda: theirs(w, tensor))

    def decode(self) -> Any:
        """Return codes to images."""
        network = TokenizerNetwork(self.tokenizer, self.scanned)
        params, w = self.weights(network)
        side, batch = self.options.side, self.options.batch
        code = self.code(batch, self.tokenizer.num_tokens, self.tokenizer.bits)
        call = jax.jit(
            lambda p, x: apply(network, p, x, side, side, method="decode").transpose(0, 3, 1, 2)
        )
        theirs = self.compiled(lambda w, x: self.plain.decode(w, self.tokenizer, x, side, side))
        given, tensor = jnp.asarray(code), self.tensor(code)
        return self.timed(lambda: call(params, given), lambda: theirs(w, tensor))

    def code(self, *shape: int) -> np.ndarray:
        """Return random bits."""
        return self.rng.integers(0, 2, shape).astype(np.float32)

    def prompts(self, rows: int, empty: int) -> tuple[np.ndarray, np.ndarray]:
        """Return text features and mask, the last `empty` rows being the empty prompt."""
        shape = (self.generator["num_layers"], rows, self.length, self.text_width)
        mask = np.ones((rows, self.length), np.int32)
        mask[rows - empty :] = 0
        return self.rng.normal(size=shape).astype(np.float32), mask

    def diffusion(self) -> Any:
        """Return sampling by diffusion."""
        network = DiffusionTransformer(**self.generator, text_width=self.text_width, run=self.run)
        params, w = self.weights(network)
        batch, steps = self.options.batch, self.options.steps
        text, mask = self.prompts(2 * batch, batch)
        shape = (steps, batch, network.num_tokens, network.bits)
        uniforms = self.rng.random(shape, np.float32)
        sizes = self.plain.Generator(**self.generator)
        predict = self.compiled(
            lambda z, t, w, text, mask: self.plain.diffusion(w, sizes, z, t, text, mask)
        )
        features, given = self.tensor(text), self.tensor(mask)
        numbers, keys = self.tensor(uniforms), loops.image_keys(jnp.arange(batch))
        own = tuple(map(jnp.asarray, (text, mask, uniforms)))

        def ours(steps: int = steps) -> jax.Array:
            return loops.sample_diffusion(
                network, params, own[0], own[1], keys, steps=steps, guidance=GUIDANCE,
                uniforms=own[2][:steps],
            )  # fmt: skip

        def theirs(steps: int = steps) -> Any:
            return self.plain.sample_diffusion(
                lambda z, t: predict(z, t, w, features, given), numbers[:steps], guidance=GUIDANCE
            )

        return self.timed(ours, theirs)

    def ar(self) -> Any:
        """Return sampling token by token."""
        network = ArTransformer(**self.generator, text_width=self.text_width, run=self.run)
        params, w = self.weights(network)
        batch = self.options.batch
        text, mask = self.prompts(2 * batch, batch)
        uniforms = self.rng.random((batch, network.num_tokens, network.bits), np.float32)
        sizes = self.plain.Generator(**self.generator)
        predict = self.compiled(
            lambda z, w, text, mask: self.plain.autoregressive(w, sizes, z, text, mask)
        )
        features, given, numbers = self.tensor(text), self.tensor(mask), self.tensor(uniforms)
        own, keys = tuple(map(jnp.asarray, (text, mask, uniforms))), jnp.arange(batch)

        def ours() -> jax.Array:
            return loops.sample_ar(
                network, params, own[0], own[1], loops.image_keys(keys), guidance=GUIDANCE,
                temperature=1.0, uniforms=own[2],
            )  # fmt: skip

        def theirs() -> Any:
            return self.plain.sample_ar(
                lambda z: predict(z, w, features, given), numbers, guidance=GUIDANCE
            )

        return self.timed(ours, theirs)

    def train(self) -> Any:
        """Return the loss of a step of AdamW on the diffusion generator, which goes on learning."""
        network = DiffusionTransformer(**self.generator, text_width=self.text_width, run=self.run)
        params, w = self.weights(network)
        batch = self.options.train_batch
        text, mask = self.prompts(batch, batch // 8)
        code, t = self.code(batch, network.num_tokens, network.bits), self.rng.random(batch)
        z = np.where(self.rng.random(code.shape) < t[:, None, None] / 2, 1 - code, code)
        optimizer = optax.adamw(1e-4, weight_decay=0.0)

        def loss(params: Any, z: Any, t: Any, code: Any, text: Any, mask: Any) -> jax.Array:
            flip = apply(network, params, z, t, text, mask)
            return binary_diffusion.loss(binary_diffusion.clean_logits(flip, z), code)

        def update(params: Any, state: Any, *batch: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params, *batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        step = jax.jit(update, donate_argnums=(0, 1))
        held = [params, jax.jit(optimizer.init)(params)]
        own = tuple(jnp.asarray(x, jnp.float32) for x in (z, t, code, text, mask))

        def ours() -> jax.Array:
            held[0], held[1], value = step(*held, *own)
            return value

        torch, sizes = self.torch, self.plain.Generator(**self.generator)
        leaves = {name: x.requires_grad_() for name, x in w.items()}
        adam = torch.optim.AdamW(leaves.values(), 1e-4, weight_decay=0.0)
        tensors = tuple(self.tensor(x) for x in (z, t, code, text, mask))

        def torch_loss(w: Any, z: Any, t: Any, code: Any, text: Any, mask: Any) -> Any:
            flip = self.plain.diffusion(w, sizes, z, t, text, mask)
            clean = torch.where(z > 0.5, -flip, flip).float()
            return torch.nn.functional.binary_cross_entropy_with_logits(clean, code.float())

        measured = self.compiled(torch_loss)

        def theirs() -> Any:
            with torch.enable_grad():
                value = measured(leaves, *tensors)
                value.backward()
            adam.step()
            adam.zero_grad()
            return value.detach()

        return self.timed(ours, theirs)


def difference(ours: np.ndarray, theirs: np.ndarray, bits: bool) -> float:
    """Return how far apart results are: the share of other bits, or of the largest number."""
    if bits:
        return float(np.mean(ours != theirs))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def measure(both: Both, name: str, repeats: int) -> dict[str, Any]:
    """Compare the results of a path, then time both sides in turn.

    Raises:
      UserError: the results are not the same.
    """
    ours, theirs = getattr(both, name)()
    few = (COMPARED,) if name == "diffusion" else ()
    apart = difference(ours(*few), theirs(*few), name in ("diffusion", "ar"))
    limit = TOLERANCES[both.options.dtype]
    if not apart <= limit:
        raise UserError(f"{name}: results are {apart:.2g} apart, over {limit:g}")
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(repeats):
        for side, call in {"ours": ours, "torch": theirs}.items():
            start = time.perf_counter()
            call()
            seconds[side].append(time.perf_counter() - start)
    mine, other = (spread(seconds[side]) for side in ("ours", "torch"))
    return {
        "path": name, "ours": mine, "torch": other, "ratio": other.median / mine.median,
        "ratio_of_least": other.least / mine.least, "apart": apart,
    }  # fmt: skip


def row(result: dict[str, Any]) -> str:
    """Return a row of the table, in milliseconds."""
    cells = [result["path"]]
    for side in ("ours", "torch"):
        median, least, most = (1e3 * x for x in result[side])
        cells.append(f"{median:.1f} ({least:.1f} to {most:.1f})")
    ratio, least = result["ratio"], result["ratio_of_least"]
    cells += [f"{ratio:.2f} ({least:.2f})", f"{result['apart']:.1g}"]
    return f"| {' | '.join(cells)} |"


def run(options: argparse.Namespace) -> None:
    """Measure what the arguments name.

    Raises:
      UserError: PyTorch is missing, or results differ.
    """
    both = Both(options)
    how = "torch.compile" if options.compile else "eager"
    setting = (
        f"{where()}; torch {both.torch.__version__} ({how}) on {both.device}; {options.dtype}; "
        f"tokenizer at {options.side} px; generators: {options.size}; batch {options.batch}, "
        f"{options.train_batch} in training; {options.steps} steps of diffusion"
    )
    print(f"{setting}\n\n| | ours, ms | torch, ms | ratio (of the least) | apart |")
    print("|---|---|---|---|---|", flush=True)
    results = []
    for name in options.what:
        results.append(measure(both, name, options.repeats))
        print(row(results[-1]), flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"setting": setting, "results": results}, file, indent=1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument(
        "--size", choices=("tiny", *SIZES), default="mid",
        help="of the generators; the tokenizer has the published size unless tiny",
    )  # fmt: skip
    parser.add_argument("--side", type=whole(), default=512, help="of the pictures, in pixels")
    parser.add_argument("--batch", type=whole(), default=1)
    parser.add_argument("--train-batch", type=whole(8), default=8)
    parser.add_argument("--steps", type=whole(), default=20, help="of the diffusion sampler")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32")
    parser.add_argument("--repeats", type=whole(), default=5, help="timed calls of each")
    parser.add_argument("--compile", action="store_true", help="torch.compile on their side")
    parser.add_argument("--json", help="file for the figures")
    with command_line():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
