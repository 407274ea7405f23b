"""Three networks that make pictures of prompts, a batch at a time.

Axes: B pictures, U prompts, N latent tokens, K bits, L text length.
"""

import contextlib
import copy
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer

from instella_jax.codec.tokenizer import decode_codes
from instella_jax.errors import UserError
from instella_jax.models import lora
from instella_jax.models.binary_diffusion import Target
from instella_jax.models.functional import Params, check_tensor
from instella_jax.models.layers import Execution
from instella_jax.models.olmo import Olmo
from instella_jax.models.text import TextTokenizer
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.runtime import sharding
from instella_jax.sampling import loops
from instella_jax.sampling.generation import Generator, OnStep, generate_codes
from instella_jax.sampling.options import Options, Request, requests_of
from instella_jax.sampling.prompt_features import PromptFeatures
from instella_jax.stages.generator import GeneratorStage
from instella_jax.weights import model_folder, model_parts

logger = logging.getLogger(__name__)


class Samples(NamedTuple):
    """Pictures and their codes.

    Attributes:
      images: uint8 [n, height, width, 3]; with no height where none were asked for.
      codes: bool [n, N, K].
    """

    images: np.ndarray
    codes: np.ndarray


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
        self.image_size, self.mesh = image_size, mesh
        self.target: Target = target
        self.prompt_features = PromptFeatures(text, params["text"], text_tokenizer, max_length)

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

    def __call__(
        self,
        prompts: str | Sequence[str],
        options: Options = Options(),  # noqa: B008 (frozen)
    ) -> np.ndarray:
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
        options: Options = Options(),  # noqa: B008
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
            features, mask = self.prompt_features(texts, length)
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

    def codes(
        self,
        features: Float[Array, "layers rows L Dt"],
        mask: Any,
        seeds: Integer[np.ndarray, " B"],
        options: Options,
        **how: Any,
    ) -> Float[Array, "B N K"]:
        """Sample codes for text of rows = 2B, conditional ones first.

        Args:
          features: see `PromptFeatures`.
          mask: likewise.
          seeds: of the pictures.
          options: see `Options`.
          how: see `generate_codes`.
        """
        rows: Any = seeds.astype(np.uint32)
        if self.mesh is not None:
            rows, mask = jax.device_put((rows, mask), sharding.batch_sharding(self.mesh))
            features = jax.device_put(features, sharding.batch_sharding(self.mesh, leading=1))
        return generate_codes(
            self.generator,
            self.params["generator"],
            features,
            mask,
            image_keys(rows),
            options,
            target=self.target,
            **how,
        )

    def text_length(self, prompts: Sequence[str]) -> int:
        """Return the number of tokens that prompts are padded to, see `PromptFeatures.length`."""
        return self.prompt_features.length(prompts)
