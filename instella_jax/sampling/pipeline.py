"""What a user imports: prompts in, pictures out.

Axes: B pictures, U different prompts, N latent tokens, K bits, L text length.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

from instella_jax.config import Config
from instella_jax.config_keys import check_value
from instella_jax.errors import UserError
from instella_jax.kernels import binary_sampling
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.binary_diffusion import Target
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import Params, apply, check_tensor
from instella_jax.models.layers import Execution
from instella_jax.models.olmo import Olmo
from instella_jax.models.pixels import to_uint8
from instella_jax.models.text import TextTokenizer
from instella_jax.models.tokenizer import BinaryTokenizer
from instella_jax.runtime import sharding
from instella_jax.sampling import loops
from instella_jax.stages.generator import GeneratorStage
from instella_jax.weights import model_folder, model_parts

logger = logging.getLogger(__name__)

Generator = DiffusionTransformer | ArTransformer

# Text is padded to a multiple of this, so that few lengths are ever compiled.
TEXT_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """How prompts are sampled; the defaults are the published ones.

    Attributes:
      negative_prompt: what guidance leads away from; "" is the unconditional prompt.
      images_per_prompt: pictures of each prompt; picture j has the seed `seed` + j.
      seed: of the first picture of every prompt.
      steps: of the diffusion sampler.
      guidance: g in (1 + g) conditional - g unconditional; 0 is none. g is the scale of other
        systems less 1.
      temperature: of the guided logits; 0 takes the likelier bit.
      rho: exponent of the schedule of times.
      protocol: how bits are sampled between steps, 1 or 2 (the posterior).
      height: of the pictures in pixels; 0 is the size that the model was trained at.
      width: likewise.
      batch_size: pictures sampled at a time.
      kernel: what samples the bits, see `kernels.binary_sampling.resolve`.
    """

    negative_prompt: str = ""
    images_per_prompt: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    temperature: float = 1.0
    rho: float = 1.0
    protocol: int = 1
    height: int = 0
    width: int = 0
    batch_size: int = 16
    kernel: str = "auto"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
          UserError: a value is out of range.
        """
        for field in dataclasses.fields(self):
            name = field.name
            check_value(f"sample.{name}", getattr(self, name), called=name)


def options_from_config(config: Config) -> Options:
    """Read the options out of a config's `sample` section."""
    names = {field.name for field in dataclasses.fields(Options)}
    return Options(**{name: config[name] for name in names if name in config})


@functools.partial(jax.jit, static_argnames="network")
def text_features(
    network: Olmo, params: Params, ids: Int[Array, "U L"], mask: Bool[Array, "U L"]
) -> Float[Array, "layers U L Dt"]:
    """Return the text features that the blocks of a generator attend to."""
    return apply(network, params, ids, mask)[1:]


image_keys = jax.jit(loops.image_keys)


@functools.partial(jax.jit, static_argnames=("network", "height", "width"))
def decode(
    network: BinaryTokenizer, params: Params, code: Float[Array, "B N K"], height: int, width: int
) -> UInt8[Array, "B height width 3"]:
    """Decode codes to images."""
    return to_uint8(apply(network, params, code, height, width, method="decode"))


class InstellaPipeline:
    """A text encoder, a generator and a tokenizer, ready to sample.

    A picture depends on the parameters, its prompt, its seed and the options alone. The order in
    which a matrix product is summed up goes by its shape, though: in a batch of another size the
    features of a prompt differ by about 1e-6 of their largest. Its code has the same bits unless
    one is on the very edge, and a pixel may be another by one grey level.
    With a mesh,
    each batch is spread over its devices; where they are those of several processes, all of them
    must ask for the same pictures, and all get them.
    """

    def __init__(
        self,
        *,
        generator: Generator,
        text: Olmo,
        tokenizer: BinaryTokenizer,
        params: Mapping[str, Params],
        text_tokenizer: TextTokenizer,
        max_length: int,
        image_size: int,
        target: Target = "epsilon",
        mesh: Mesh | None = None,
    ):
        """Join the parts.

        Args:
          generator: the network that makes codes.
          text: the network that describes prompts.
          tokenizer: the network that decodes codes.
          params: parameters of the three, under "generator", "text" and "tokenizer".
          text_tokenizer: cuts prompts into ids.
          max_length: longest prompt in tokens.
          image_size: side in pixels that the model was trained at.
          target: what a diffusion generator was trained to tell, see `binary_diffusion`.
          mesh: devices to sample on, on which the parameters are; None is the default device.
        """
        self.generator, self.text, self.tokenizer = generator, text, tokenizer
        self.params = params
        self.text_tokenizer, self.max_length = text_tokenizer, max_length
        self.image_size, self.target, self.mesh = image_size, target, mesh

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        run: Execution = Execution(),  # noqa: B008 (frozen)
        *,
        kind: str | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
    ) -> "InstellaPipeline":
        """Read a model folder.

        Args:
          folder: with a generator, a text encoder and its `tokenizer.json`.
          tokenizer: folder of the image tokenizer, None where `folder` holds it.
          run: how the networks are computed.
          kind: "diffusion" or "ar", which generator is wanted where the folder holds both; None
            for the one there is, or the diffusion one.
          text_encoder: folder of the text encoder; not looked at where `folder` holds it.
          mesh: devices to sample on; None is the default device.

        Raises:
          UserError: a part is missing, damaged, or the parts do not fit each other or the mesh.
        """
        folder = Path(folder)
        description = model_folder.read_description(folder)
        generator = model_parts.find_generator(folder, description, kind)
        # A generator that was trained on top of a frozen text encoder comes without it.
        text_folder = folder
        if text_encoder is not None and not model_folder.has_weights(folder, "text"):
            text_folder = Path(text_encoder)
        tokenizer_folder = Path(folder if tokenizer is None else tokenizer)
        places = {
            "generator": (folder, generator),
            "text": (text_folder, "text"),
            "tokenizer": (tokenizer_folder, "tokenizer"),
        }
        networks, params = {}, {}
        for part, (place, name) in places.items():
            values = model_folder.read_description(place)
            networks[part] = model_parts.make_network(place, values, name, run)
        if mesh is not None:
            check_tensor(networks, mesh)
        for part, (place, name) in places.items():
            params[part] = model_folder.load(place, name, networks[part], run.param_dtype, mesh)
        return cls(
            **networks,
            params=params,
            text_tokenizer=TextTokenizer.from_folder(text_folder),
            max_length=description["text"]["max_length"],
            image_size=description["image_size"],
            target=description.get("target", "epsilon"),
            mesh=mesh,
        )

    @classmethod
    def from_stage(
        cls, stage: GeneratorStage, params: Mapping[str, Params], mesh: Mesh | None = None
    ) -> "InstellaPipeline":
        """Make a pipeline of a stage's networks and given parameters, on their mesh.

        The image tokenizer's are read from its folder where they are not given: training on codes
        has no use for them.
        """
        tokenizer = stage.tokenizer_network
        if "tokenizer" not in params:
            dtype = stage.run.param_dtype
            loaded = model_folder.load(stage.tokenizer_folder, "tokenizer", tokenizer, dtype, mesh)
            params = {**params, "tokenizer": loaded}
        return cls(
            generator=stage.network,
            text=stage.text_network,
            tokenizer=tokenizer,
            params=params,
            text_tokenizer=stage.text_tokenizer,
            max_length=stage.config.text.max_length,
            image_size=stage.config.data.image_size,
            target=stage.config.loss.get("target", "epsilon"),
            mesh=mesh,
        )

    def __call__(self, prompts: str | Sequence[str], options: Options = Options()) -> np.ndarray:
        """Generate images of prompts.

        Args:
          prompts: U texts, or one.
          options: see `Options`.

        Returns:
          uint8 [U * images_per_prompt, height, width, 3], the pictures of a prompt together.

        Raises:
          UserError: there is no prompt, one is no text, or the tokenizer cannot decode to the size.
        """
        return np.concatenate(list(self.batches(prompts, options)))

    def batches(
        self, prompts: str | Sequence[str], options: Options = Options()
    ) -> Iterator[np.ndarray]:
        """Generate images in the order of `__call__`, a batch at a time.

        What cannot be generated is refused here, before the first batch is asked for.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        for prompt in (*prompts, options.negative_prompt):
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise UserError(f"prompt {prompt!r} is not UTF-8: give it as UTF-8 text")
        if options.negative_prompt and not options.guidance:
            logger.warning(
                "the negative prompt does nothing with guidance 0: it is what guidance leads away "
                "from"
            )
        if not len(prompts):
            raise UserError("there is no prompt")
        height, width = options.height or self.image_size, options.width or self.image_size
        self.tokenizer.config.grid(height, width)
        return self._batches(prompts, options, height, width)

    def _batches(
        self, prompts: Sequence[str], options: Options, height: int, width: int
    ) -> Iterator[np.ndarray]:
        rows = np.repeat(np.arange(len(prompts)), options.images_per_prompt)
        seeds = options.seed + np.tile(np.arange(options.images_per_prompt), len(prompts))
        negative = options.negative_prompt
        tokens = self.tokenise([*prompts, negative])
        parts = sharding.batch_parts(self.mesh) if self.mesh else 1
        size = -(-min(options.batch_size, len(rows)) // parts) * parts
        for start in range(0, len(rows), size):
            # The last batch is filled up, so that all have the compiled shape.
            chosen = np.minimum(np.arange(start, start + size), len(rows) - 1)
            texts = [*(prompts[row] for row in rows[chosen]), *[negative] * size]
            with sharding.use(self.mesh) if self.mesh else contextlib.nullcontext():
                features, mask = self.describe(texts, tokens)
                code = self.codes(features, mask, seeds[chosen], options)
                images = decode(self.tokenizer, self.params["tokenizer"], code, height, width)
            yield sharding.fetch(images)[: len(rows) - start]

    def tokenise(self, prompts: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return ids int32 [L] and mask bool [L] of each prompt.

        L is that of the longest prompt with padding, so that few lengths are compiled.
        """
        unique = list(dict.fromkeys(prompts))
        ids, mask = self.text_tokenizer.encode(unique, max_length=self.max_length)
        length = min(-(-mask.shape[1] // TEXT_BLOCK) * TEXT_BLOCK, self.max_length)
        padding = ((0, 0), (length - mask.shape[1], 0))
        ids = np.pad(ids, padding, constant_values=self.text_tokenizer.pad_id)
        return dict(zip(unique, zip(ids, np.pad(mask, padding), strict=True), strict=True))

    def describe(
        self, prompts: Sequence[str], tokens: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> tuple[Float[Array, "layers rows L Dt"], Bool[np.ndarray, "rows L"]]:
        """Encode prompts, each different one once and the empty one once ever.

        Args:
          prompts: 2B texts.
          tokens: of all of them, see `tokenise`.

        Returns:
          features and mask of rows = 2B.
        """
        unique = list(dict.fromkeys(prompt for prompt in prompts if prompt))
        length = len(next(iter(tokens.values()))[1])
        # Nothing sees the states of the empty prompt, so that any padding does for them.
        features = jnp.pad(self._empty, ((0, 0), (0, 0), (length - 1, 0), (0, 0)))
        mask = np.zeros((1, length), bool)
        if unique:
            ids, seen = map(np.stack, zip(*(tokens[prompt] for prompt in unique), strict=True))
            described = text_features(self.text, self.params["text"], ids, seen)
            features = jnp.concatenate([features, described], axis=1)
            mask = np.concatenate([mask, seen])
        rows = np.array([unique.index(prompt) + 1 if prompt else 0 for prompt in prompts])
        return jnp.take(features, rows, axis=1), mask[rows]

    @functools.cached_property
    def _empty(self) -> Float[Array, "layers 1 1 Dt"]:
        """Features of the empty prompt."""
        ids, mask = self.text_tokenizer.encode([""], pad_to=1)
        return text_features(self.text, self.params["text"], ids, mask)

    def codes(
        self,
        features: Float[Array, "layers rows L Dt"],
        mask: Any,
        seeds: Integer[np.ndarray, " B"],
        options: Options,
    ) -> Float[Array, "B N K"]:
        """Sample codes for text of rows = 2B, conditional ones first."""
        rows: Any = seeds.astype(np.uint32)
        if self.mesh is not None:
            rows, mask = jax.device_put((rows, mask), sharding.batch_sharding(self.mesh))
            features = jax.device_put(features, sharding.batch_sharding(self.mesh, leading=1))
        keys = image_keys(rows)
        params = self.params["generator"]
        kernel = binary_sampling.resolve(options.kernel, jax.default_backend())
        if isinstance(self.generator, ArTransformer):
            return loops.sample_ar(
                self.generator,
                params,
                features,
                mask,
                keys,
                guidance=options.guidance,
                temperature=options.temperature,
                kernel=kernel,
            )
        return loops.sample_diffusion(
            self.generator,
            params,
            features,
            mask,
            keys,
            steps=options.steps,
            guidance=options.guidance,
            temperature=options.temperature,
            rho=options.rho,
            protocol=options.protocol,
            target=self.target,
            kernel=kernel,
        )
