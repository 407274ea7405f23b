"""Three networks that make pictures of prompts, a batch at a time.

Axes: B pictures, U different prompts, N latent tokens, K bits, L text length.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer

from instella_jax.codec.tokenizer import decode_codes
from instella_jax.config import Config
from instella_jax.config_keys import check_value
from instella_jax.errors import UserError
from instella_jax.kernels import binary_sampling
from instella_jax.models import binary_diffusion, lora
from instella_jax.models.ar_transformer import ArTransformer
from instella_jax.models.binary_diffusion import Target
from instella_jax.models.diffusion_transformer import DiffusionTransformer
from instella_jax.models.functional import Params, apply, check_tensor
from instella_jax.models.layers import Execution
from instella_jax.models.olmo import Olmo
from instella_jax.models.text import TextTokenizer
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.runtime import sharding
from instella_jax.sampling import loops
from instella_jax.stages.generator import GeneratorStage
from instella_jax.weights import model_folder, model_parts

logger = logging.getLogger(__name__)

Generator = DiffusionTransformer | ArTransformer

# Text is padded to a multiple of this, so that few lengths are ever compiled.
TEXT_BLOCK = 32
# Bytes of text features that are kept for prompts that come again.
TEXT_CACHE = 2**28


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


class Request(NamedTuple):
    """A picture to sample.

    Attributes:
      prompt: what it shows.
      negative_prompt: what guidance leads away from; "" is the unconditional prompt.
      seed: of its random numbers.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0


def requests_of(prompts: str | Sequence[str], options: Options) -> list[Request]:
    """Return the pictures that options ask for, those of a prompt together."""
    return [
        Request(prompt, options.negative_prompt, options.seed + number)
        for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        for number in range(options.images_per_prompt)
    ]


class Samples(NamedTuple):
    """Pictures and their codes.

    Attributes:
      images: uint8 [n, height, width, 3]; with no height where none were asked for.
      codes: bool [n, N, K].
    """

    images: np.ndarray
    codes: np.ndarray


class Start(NamedTuple):
    """Codes that sampling starts from, in the place of noise.

    Attributes:
      code: float32 [B, N, K], 0 and 1.
      keep: bool [B, N], tokens that stay as they are; None for none.
      step: the step of the diffusion sampler that comes first; the codes get the noise of its time.
    """

    code: np.ndarray
    keep: np.ndarray | None = None
    step: int = 0


# Called after each step with how many are done, how many there are, and the codes of a batch.
OnStep = Callable[[int, int, jax.Array], None]


@functools.partial(jax.jit, static_argnames="network")
def text_features(
    network: Olmo, params: Params, ids: Int[Array, "U L"], mask: Bool[Array, "U L"]
) -> Float[Array, "layers U L Dt"]:
    """Return the text features that the blocks of a generator attend to."""
    return apply(network, params, ids, mask)[1:]


@jax.jit
def _rows_of(
    features: tuple[Float[Array, "layers 1 L Dt"], ...], rows: Int[Array, " rows"]
) -> Float[Array, "layers rows L Dt"]:
    """Return the features of rows, each one of those given."""
    return jnp.take(jnp.concatenate(features, axis=1), rows, axis=1)


image_keys = jax.jit(loops.image_keys)


class Sampler:
    """A text encoder, a generator and a tokenizer, ready to sample.

    A picture depends on the parameters, its prompt, its seed and the options alone. The order in
    which a matrix product is summed up goes by its shape, though: in a batch of another size, or
    with prompts padded to another length, a code has the same bits unless one is on the very edge,
    and a pixel may be another by one grey level. With a mesh, each batch is spread over its
    devices; where they are those of several processes, all of them must ask for the same pictures,
    and all get them.
    """

    def __init__(
        self,
        *,
        generator: Generator,
        text: Olmo,
        tokenizer: TokenizerNetwork,
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
        self._ids: dict[str, np.ndarray] = {}
        # Features by prompt and padded length, the latest last.
        self._known: collections.OrderedDict[tuple[str, int], jax.Array] = collections.OrderedDict()

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        run: Execution = Execution(),  # noqa: B008 (frozen)
        *,
        kind: str | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        text_tokenizer: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
    ) -> "Sampler":
        """Read a model folder.

        Args:
          folder: with a generator, a text encoder and its `tokenizer.json`.
          tokenizer: folder of the image tokenizer, None where `folder` holds it.
          run: how the networks are computed.
          kind: "diffusion" or "ar", which generator is wanted where the folder holds both; None
            for the one there is, or the diffusion one.
          text_encoder: folder of the text encoder; not looked at where `folder` holds it.
          text_tokenizer: folder of the text tokenizer; None for that of the text encoder.
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
            text_tokenizer=TextTokenizer.from_folder(Path(text_tokenizer or text_folder)),
            max_length=description["text"]["max_length"],
            image_size=description["image_size"],
            target=description.get("target", "epsilon"),
            mesh=mesh,
        )

    @classmethod
    def from_stage(
        cls, stage: GeneratorStage, params: Mapping[str, Params], mesh: Mesh | None = None
    ) -> "Sampler":
        """Make a pipeline of a stage's networks and given parameters, on their mesh.

        The image tokenizer's are read from its folder where they are not given: training on codes
        has no use for them.
        """
        tokenizer = stage.tokenizer_network
        if "tokenizer" not in params:
            dtype = stage.run.param_dtype
            loaded = model_folder.load(stage.tokenizer_folder, "tokenizer", tokenizer, dtype, mesh)
            params = {**params, "tokenizer": loaded}
        params = stage.adapted(params)
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

    def with_adapters(self, adapters: Params, scale: float, merged: bool = False) -> "Sampler":
        """Return a sampler whose generator has adapters, in addition to any it has already.

        Args:
          adapters: host arrays, as `weights.lora_files.load` reads them.
          scale: of their product.
          merged: whether they become part of the kernels.
        """
        generator = self.params["generator"]
        dtype = jax.tree.leaves(generator)[0].dtype
        place = None if self.mesh is None else sharding.replicated(self.mesh)
        adapters = jax.tree.map(lambda x: jax.device_put(x.astype(dtype), place), adapters)
        generator = lora.adapt(generator, adapters, scale)
        other = copy.copy(self)
        other.params = {**self.params, "generator": lora.merge(generator) if merged else generator}
        return other

    @property
    def kind(self) -> str:
        """What the generator is, "diffusion" or "ar"."""
        kinds = model_parts.GENERATORS.items()
        return next(kind for kind, network in kinds if isinstance(self.generator, network))

    def describe_parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the `config.json` of a model folder with the generator, and one with the text."""
        sizes = ("num_layers", "num_heads", "head_dim", "num_tokens", "bits")
        text = {
            **dataclasses.asdict(self.text.config),
            "max_length": self.max_length,
            "pad_token_id": self.text_tokenizer.pad_id,
        }
        generator = {
            "generator": {
                "kind": self.kind,
                **{name: getattr(self.generator, name) for name in sizes},
            },
            "text": text,
            "target": self.target,
            "image_size": self.image_size,
        }
        return generator, {"text": text}

    def __call__(self, prompts: str | Sequence[str], options: Options = Options()) -> np.ndarray:
        """Sample pictures of prompts.

        Args:
          prompts: U texts, or one.
          options: see `Options`.

        Returns:
          uint8 [U * images_per_prompt, height, width, 3], the pictures of a prompt together.

        Raises:
          UserError: see `batches`.
        """
        batches = self.batches(requests_of(prompts, options), options)
        return np.concatenate([samples.images for samples in batches])

    def batches(
        self,
        requests: Sequence[Request],
        options: Options = Options(),
        *,
        text_length: int = 0,
        on_step: OnStep | None = None,
        decode: bool = True,
    ) -> Iterator[Samples]:
        """Sample pictures in the order of their requests, a batch at a time.

        What cannot be sampled is refused here, before the first batch is asked for.

        Args:
          requests: what to sample.
          options: see `Options`; prompts and seeds are those of the requests.
          text_length: prompts are padded to at least so many tokens.
          on_step: see `OnStep`.
          decode: whether pictures are wanted, and not codes alone.

        Raises:
          UserError: there is no prompt, or the tokenizer cannot decode to the size.
        """
        if not options.guidance and any(request.negative_prompt for request in requests):
            logger.warning(
                "the negative prompt does nothing with guidance 0: it is what guidance leads away "
                "from"
            )
        if not requests:
            raise UserError("there is no prompt")
        size = self.size(options)
        return self._batches(requests, options, size if decode else None, text_length, on_step)

    def size(self, options: Options) -> tuple[int, int]:
        """Return height and width of the pictures that options ask for.

        Raises:
          UserError: the tokenizer cannot decode to it.
        """
        height, width = options.height or self.image_size, options.width or self.image_size
        self.tokenizer.config.grid(height, width)
        return height, width

    def batch_size(self, pictures: int, options: Options) -> int:
        """Return how many pictures a batch has, fillers included, where so many are asked for."""
        parts = sharding.batch_parts(self.mesh) if self.mesh else 1
        return -(-min(options.batch_size, pictures) // parts) * parts

    def _batches(
        self,
        requests: Sequence[Request],
        options: Options,
        pixels: tuple[int, int] | None,
        text_length: int,
        on_step: OnStep | None,
    ) -> Iterator[Samples]:
        length = self.text_length([text for request in requests for text in request[:2]])
        length = max(length, text_length)
        size = self.batch_size(len(requests), options)
        for start in range(0, len(requests), size):
            # The last batch is filled up, so that all have the compiled shape.
            chosen = [requests[min(i, len(requests) - 1)] for i in range(start, start + size)]
            texts = [r.prompt for r in chosen] + [r.negative_prompt for r in chosen]
            seeds = np.array([r.seed for r in chosen])
            codes = self.sample(texts, seeds, options, text_length=length, on_step=on_step)
            images = self.decode(codes, *pixels) if pixels else np.zeros((size, 0, 0, 3), np.uint8)
            count = len(requests) - start
            yield Samples(images[:count], sharding.fetch(codes)[:count] > 0.5)

    def sample(
        self,
        texts: Sequence[str],
        seeds: np.ndarray,
        options: Options,
        *,
        text_length: int = 0,
        **how: Any,
    ) -> Float[Array, "B N K"]:
        """Sample a batch of codes.

        Args:
          texts: B prompts and B negative ones; between them B more prompts to blend with.
          seeds: B of them.
          options: see `Options`.
          text_length: prompts are padded to at least so many tokens.
          how: see `codes`.
        """
        with self._devices():
            length = max(self.text_length(texts), text_length)
            features, mask = self.describe(texts, length)
            return self.codes(features, mask, seeds, options, **how)

    def decode(
        self, codes: Float[Array, "B N K"] | Float[np.ndarray, "B N K"], height: int, width: int
    ) -> np.ndarray:
        """Return the pictures of codes, uint8 [B, height, width, 3]."""
        with self._devices():
            params, codes = self.params["tokenizer"], jnp.asarray(codes)
            return sharding.fetch(decode_codes(self.tokenizer, params, codes, height, width))

    def _devices(self) -> contextlib.AbstractContextManager[None]:
        return sharding.use(self.mesh) if self.mesh else contextlib.nullcontext()

    def text_length(self, prompts: Sequence[str]) -> int:
        """Return the number of tokens that prompts are padded to: that of the longest, rounded up.

        Rounded, so that few lengths are compiled.

        Raises:
          UserError: a prompt is no text.
        """
        longest = max([1, *map(len, self._tokens(prompts))])
        return min(-(-longest // TEXT_BLOCK) * TEXT_BLOCK, self.max_length)

    def _tokens(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each prompt, int32 without padding."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._ids]
        for prompt in new:
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise UserError(f"prompt {prompt!r} is not UTF-8: give it as UTF-8 text")
        if new:
            if len(self._ids) >= 2**16:
                new = list(dict.fromkeys(prompts))
                self._ids.clear()
            rows = self.text_tokenizer.encode(new, max_length=self.max_length)
            own = {prompt: ids[mask] for prompt, ids, mask in zip(new, *rows, strict=True)}
            self._ids.update(own)
        return [self._ids[prompt] for prompt in prompts]

    def describe(
        self, prompts: Sequence[str], length: int
    ) -> tuple[Float[Array, "layers rows L Dt"], Bool[np.ndarray, "rows L"]]:
        """Encode prompts, each different one by itself and once.

        So no prompt's features depend on the others', and those that come again are remembered,
        the last ones in `TEXT_CACHE` bytes.

        Args:
          prompts: the texts of all rows.
          length: L, see `text_length`.

        Returns:
          features and mask of the rows.
        """
        unique = list(dict.fromkeys(prompts))
        mask = np.zeros((len(unique), length), bool)
        for row, ids in zip(mask, self._tokens(unique), strict=True):
            row[length - len(ids) :] = True
        rows = np.array([unique.index(prompt) for prompt in prompts])
        features = tuple(self._features(prompt, length) for prompt in unique)
        return _rows_of(features, rows), mask[rows]

    def _features(self, prompt: str, length: int) -> Float[Array, "layers 1 L Dt"]:
        if (prompt, length) in self._known:
            self._known.move_to_end((prompt, length))
            return self._known[prompt, length]
        (ids,) = self._tokens([prompt])
        if len(ids):
            padded = np.full((1, length), self.text_tokenizer.pad_id, np.int32)
            padded[0, length - len(ids) :] = ids
            mask = np.arange(length)[None] >= length - len(ids)
            features = text_features(self.text, self.params["text"], padded, mask)
        else:
            # Nothing sees the states of the empty prompt, so that any do.
            sizes = self.text.config
            shape = (sizes.num_hidden_layers, 1, length, sizes.hidden_size)
            features = jax.device_put(np.zeros(shape, jnp.dtype(self.text.run.output_dtype)))
        self._known[prompt, length] = features
        while sum(x.nbytes for x in self._known.values()) > TEXT_CACHE and len(self._known) > 1:
            self._known.popitem(last=False)
        return features

    def codes(
        self,
        features: Float[Array, "layers rows L Dt"],
        mask: Any,
        seeds: Integer[np.ndarray, " B"],
        options: Options,
        *,
        start: Start | None = None,
        blend: float | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Array, "B N K"]:
        """Sample codes for text of rows = 2B, conditional ones first.

        Args:
          features: see `describe`.
          mask: likewise.
          seeds: of the pictures.
          options: see `Options`.
          start: see `Start`; None for noise.
          blend: with rows = 3B, how far from the first B prompts to the second.
          on_step: see `OnStep`; it changes no bit.
        """
        rows: Any = seeds.astype(np.uint32)
        if self.mesh is not None:
            rows, mask = jax.device_put((rows, mask), sharding.batch_sharding(self.mesh))
            features = jax.device_put(features, sharding.batch_sharding(self.mesh, leading=1))
        keys = image_keys(rows)
        kernel = binary_sampling.resolve(options.kernel, jax.default_backend())
        shared = dict(
            guidance=options.guidance, temperature=options.temperature, kernel=kernel, blend=blend
        )
        if isinstance(self.generator, ArTransformer):
            return self._autoregressive(features, mask, keys, shared, start, on_step)
        return self._diffusion(features, mask, keys, shared, options, start, on_step)

    def _diffusion(
        self,
        features: Any,
        mask: Any,
        keys: Any,
        shared: Mapping[str, Any],
        options: Options,
        start: Start | None,
        on_step: OnStep | None,
    ) -> Float[Array, "B N K"]:
        shape = (self.generator.num_tokens, self.generator.bits)
        first, known = 0, None
        if start is None:
            bits = loops.initial_bits(keys, shape)
        else:
            first, code = start.step, jnp.asarray(start.code, jnp.float32)
            t = binary_diffusion.time_of_step(first, options.steps, options.rho)
            bits = loops.noisy_bits(code, t, keys)
            known = None if start.keep is None else (code, jnp.asarray(start.keep))
        for step, stop in _parts(first, options.steps, on_step):
            bits = loops.sample_diffusion(
                self.generator,
                self.params["generator"],
                features,
                mask,
                keys,
                steps=options.steps,
                rho=options.rho,
                protocol=options.protocol,
                target=self.target,
                bits=bits,
                first=step,
                last=stop,
                known=known,
                **shared,
            )
            if on_step is not None:
                on_step(stop, options.steps, bits)
        return bits

    def _autoregressive(
        self,
        features: Any,
        mask: Any,
        keys: Any,
        shared: Mapping[str, Any],
        start: Start | None,
        on_step: OnStep | None,
    ) -> Float[Array, "B N K"]:
        network, params = self.generator, self.params["generator"]
        count = network.num_tokens
        code = jnp.asarray(np.zeros((len(keys), count, network.bits), np.float32))
        keep = None
        if start is not None and start.keep is not None:
            code, keep = jnp.asarray(start.code, jnp.float32), jnp.asarray(start.keep)
        cache = loops.start_ar(network, params, features)
        for step, stop in _parts(0, count, on_step):
            cache, code = loops.continue_ar(
                network, params, cache, mask, keys, code, step, stop, keep=keep, **shared
            )
            if on_step is not None:
                on_step(stop, count, code)
        return code


def _parts(first: int, last: int, on_step: OnStep | None) -> list[tuple[int, int]]:
    """Return the parts of a loop: all of it, or each step where somebody watches."""
    return [(first, last)] if on_step is None else [(i, i + 1) for i in range(first, last)]
