"""What a user imports: `InstellaPipeline`, prompts in and pictures out, as diffusers has it."""

import functools
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from PIL import Image

from instella_jax.codec.tokenizer import BinaryTokenizer
from instella_jax.errors import UserError, value_errors
from instella_jax.models.layers import Execution
from instella_jax.runtime.compile_cache import use_cache
from instella_jax.runtime.sharding import fetch
from instella_jax.sampling.load import Weights, add_adapters
from instella_jax.sampling.options import Options, Request
from instella_jax.sampling.pretrained import Pretrained, open_model, save_model
from instella_jax.sampling.sampler import Sampler
from instella_jax.weights import hub

logger = logging.getLogger(__name__)

OutputType = Literal["pil", "np", "codes"]
OUTPUT_TYPES = ("pil", "np", "codes")

# Called with the pipeline, the number of the step from 0, how many there are, and a dict.
Callback = Callable[["InstellaPipeline", int, int, dict[str, Any]], Any]


class PipelineOutput(NamedTuple):
    """Pictures, those of a prompt together.

    Attributes:
      images: PIL images; with output_type "np" float32 [n, height, width, 3] from 0 to 1; with
        "codes" None.
      codes: bool [n, N, K], what `pipe.tokenizer.decode` makes pictures of.
      seeds: n numbers; each picture comes again from its prompt and its seed alone.
    """

    images: Any
    codes: np.ndarray
    seeds: list[int]


class InstellaPipeline:
    """Text to image with one call, by diffusion or autoregressive, whichever the model is.

    >>> from instella_jax import InstellaPipeline
    >>> pipe = InstellaPipeline.from_pretrained("demo")
    >>> output = pipe("a cat above a blue square", seed=7)
    >>> output.images[0].size, output.codes.shape, output.seeds
    ((64, 64), (1, 16, 32), [7])
    >>> picture = pipe.tokenizer.decode(output.codes)[0]
    >>> bool((picture == output.images[0]).all())
    True

    The first call of a shape (number of pictures, height and width, length of the text) compiles,
    and says so; whatever else changes, the later ones do not.

    Attributes:
      sampler: the networks and what runs them.
      weights: which weights they have.
      guidance_scale: the model's own, used where a call names none.
      temperature: likewise.
      rho: likewise; 1 where the sampler has none.
      results: measured figures by name, for the model card.
    """

    def __init__(self, model: Pretrained):
        """Wrap what `sampling.pretrained.open_model` returns; see `from_pretrained`."""
        self.sampler: Sampler = model.sampler
        self.weights: Weights = model.weights
        self.guidance_scale = 1.0 + model.sampling["guidance"]
        self.temperature = model.sampling["temperature"]
        self.rho = model.sampling.get("rho", 1.0)
        self.results = dict(model.results)
        self._compiled: set[tuple[Any, ...]] = set()
        # What there was before adapters, where there are any.
        self._plain: tuple[Sampler, Weights] | None = None

    @classmethod
    @value_errors()
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        kind: Literal["diffusion", "ar"] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        revision: str | None = None,
    ) -> "InstellaPipeline":
        """Open a model; see `sampling.pretrained` for the kinds of folders.

        Nothing is fetched unless the id of a repository is given, and that once: with
        HF_HUB_OFFLINE=1 the copy in the hub's cache is used.

        Args:
          model: "demo" (diffusion) or "demo_ar", which come with the package; a folder; or an id
            on the Hugging Face hub, "owner/name".
          tokenizer: folder or id of the tokenizer of images, for a model that comes without.
          text_encoder: likewise of the text encoder.
          kind: which generator, where the model has both.
          dtype: what the networks compute in and hold their parameters in.
          revision: branch, tag or commit of the id.

        Raises:
          ValueError: there is no such model, or it is damaged; one sentence.
        """
        if jax.config.values["jax_compilation_cache_dir"] is None:
            use_cache(0.0)

        def text(name: str | os.PathLike[str] | None) -> str | None:
            return None if name is None else os.fspath(name)

        return cls(
            open_model(
                os.fspath(model),
                tokenizer=text(tokenizer),
                text_encoder=text(text_encoder),
                kind=kind,
                run=Execution(dtype=dtype, param_dtype=dtype),
                revision=revision,
            )
        )

    @value_errors()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        temperature: float | None = None,
        rho: float | None = None,
        protocol: int = 1,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        batch_size: int = 16,
    ) -> PipelineOutput:
        """Generate pictures.

        Args:
          prompt: a text, or several.
          negative_prompt: what guidance leads away from, one for all or one for each prompt.
          num_inference_steps: of the diffusion sampler; an autoregressive one takes a step for each
            token.
          guidance_scale: diffusers' w, 1 more than the published g; at most 1 is no guidance. None
            for the model's own.
          num_images_per_prompt: pictures of each prompt.
          height: in pixels, any multiple of the tokenizer's patches; None for the size that the
            model was trained at.
          width: likewise.
          seed: picture j of a prompt has seed + j; or a list, with one for each prompt or one for
            each picture.
          temperature: of the guided logits; 0 takes the likelier bit. None for the model's own.
          rho: exponent of the diffusion sampler's times. None for the model's own.
          protocol: how its bits are sampled between steps, 1 or 2 (the posterior).
          output_type: "pil", "np" or "codes", see `PipelineOutput`.
          callback_on_step_end: called after each step as callback(pipe, step, total, values), with
            step from 0 and values of "codes" (bool [b, N, K]), "seeds", and "first", the number of
            the batch's first picture. It changes no bit; what it returns is not looked at.
          batch_size: pictures sampled at a time.

        Raises:
          ValueError: an argument is out of its range or does not fit another one; one sentence.
        """
        options = self.options(
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            temperature=temperature,
            rho=rho,
            protocol=protocol,
            batch_size=batch_size,
        )
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}: expected one of {OUTPUT_TYPES}")
        requests = make_requests(prompt, negative_prompt, seed, num_images_per_prompt)
        self._tell_of_compiling(requests, options)
        seeds = [request.seed for request in requests]
        size = self.sampler.batch_size(len(requests), options)
        batches, first = [], 0

        def on_step(done: int, total: int, codes: jax.Array) -> None:
            assert callback_on_step_end is not None
            own = seeds[first : first + size]
            values = {"codes": fetch(codes)[: len(own)] > 0.5, "seeds": own, "first": first}
            callback_on_step_end(self, done - 1, total, values)

        watch = None if callback_on_step_end is None else on_step
        for samples in self.sampler.batches(
            requests, options, on_step=watch, decode=output_type != "codes"
        ):
            batches.append(samples)
            first += len(samples.codes)
        codes = np.concatenate([samples.codes for samples in batches])
        if output_type == "codes":
            return PipelineOutput(None, codes, seeds)
        pixels = np.concatenate([samples.images for samples in batches])
        if output_type == "np":
            return PipelineOutput(pixels.astype(np.float32) / 255, codes, seeds)
        return PipelineOutput([Image.fromarray(picture) for picture in pixels], codes, seeds)

    def options(
        self,
        *,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        rho: float | None = None,
        num_inference_steps: int = 20,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        **others: Any,
    ) -> Options:
        """Return the sampler's options for arguments of a call, with the model's own for None.

        Raises:
          UserError: one is out of its range.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(scale, int | float) or not 0 <= scale <= 1_001:
            raise UserError(f"guidance_scale is {scale!r}: expected a number from 0 to 1001")
        for name, value in (("height", height), ("width", width)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value!r}: expected at least 1 pixel")
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}: expected a whole number of at least 1")
        return Options(
            guidance=max(0.0, float(scale) - 1.0),
            temperature=self.temperature if temperature is None else temperature,
            rho=self.rho if rho is None else rho,
            steps=num_inference_steps,
            images_per_prompt=num_images_per_prompt,
            height=height or 0,
            width=width or 0,
            **others,
        )

    @functools.cached_property
    def tokenizer(self) -> BinaryTokenizer:
        """What turns pictures into codes and back, with this model's own weights."""
        sampler = self.sampler
        return BinaryTokenizer(
            sampler.tokenizer,
            sampler.params["tokenizer"],
            shapes=((sampler.image_size, sampler.image_size),),
            fingerprint=self.weights.digests["tokenizer"],
            mesh=sampler.mesh,
        )

    @property
    def kind(self) -> str:
        """What the generator is, "diffusion" or "ar"."""
        return self.sampler.kind

    @value_errors()
    def load_lora_weights(
        self, folder: str | os.PathLike[str], *, scale: float = 1.0, merge: bool = False
    ) -> None:
        """Let the generator use adapters, in addition to any that it uses already.

        Args:
          folder: with `adapter_config.json` and `adapter_model.safetensors`, as training leaves it
            in `lora/` and PEFT saves it.
          scale: how much of them, 1 being what was trained.
          merge: whether they become part of the kernels, which samples as fast as without them, and
            takes the memory of the kernels once more until `unload_lora_weights`.

        Raises:
          ValueError: there are no adapters, or those of another model; one sentence.
        """
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise UserError(f"scale is {scale!r}: expected a number")
        plain = self.sampler, self.weights
        self.sampler, self.weights = add_adapters(*plain, folder, scale, merge)
        self._plain = self._plain or plain
        self._compiled.clear()

    def unload_lora_weights(self) -> None:
        """Let the generator be as it was before `load_lora_weights`."""
        if self._plain is not None:
            self.sampler, self.weights = self._plain
            self._plain = None
            self._compiled.clear()

    @value_errors()
    def save_pretrained(
        self, folder: str | os.PathLike[str], results: Mapping[str, Any] | None = None
    ) -> None:
        """Write a folder that `from_pretrained` reads, and the hub shows; adapters are merged.

        Args:
          folder: to make.
          results: measured figures by name, for the model card; None for those that came along.

        Raises:
          ValueError: it is there already, or cannot be written.
        """
        found = self.results if results is None else dict(results)
        sampling = {"guidance": self.guidance_scale - 1.0, "temperature": self.temperature}
        if self.kind == "diffusion":
            sampling["rho"] = self.rho
        save_model(Pretrained(self.sampler, self.weights, sampling, found), Path(folder))

    @value_errors()
    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        results: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload the model to the Hugging Face hub, by the token that `hf auth login` stored.

        Args:
          repository: "owner/name", made if it is not there.
          private: whether one that is made can be seen by its owner alone.
          results: see `save_pretrained`.

        Returns:
          The address of the commit.

        Raises:
          ValueError: the hub refuses, or cannot be reached.
        """
        if not hub.is_id(repository):
            raise UserError(f"{repository!r} is no id of a repository: expected owner/name")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save_pretrained(folder, results)
            return hub.push(folder, repository, private=private)

    def _tell_of_compiling(self, requests: Sequence[Request], options: Options) -> None:
        """Say that a shape is new."""
        sampler = self.sampler
        height, width = sampler.size(options)
        count = sampler.batch_size(len(requests), options)
        texts = [text for request in requests for text in request[:2]]
        shape = (count, height, width, sampler.text_length(texts), options.protocol)
        if shape not in self._compiled:
            self._compiled.add(shape)
            logger.warning(
                "compiling, once for this shape: %d picture(s) of %dx%d", count, height, width
            )


def make_requests(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    seed: int | Sequence[int],
    each: int,
) -> list[Request]:
    """Return a request for each picture, those of a prompt together.

    Args: see `InstellaPipeline.__call__`.

    Raises:
      UserError: numbers do not fit, or a value is of another type.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if isinstance(negative_prompt, str) or negative_prompt is None:
        negatives = [negative_prompt or ""] * len(prompts)
    else:
        negatives = list(negative_prompt)
    if strange := [text for text in (*prompts, *negatives) if not isinstance(text, str)]:
        raise UserError(f"prompt {strange[0]!r} is a {type(strange[0]).__name__}: expected a text")
    if len(negatives) != len(prompts):
        raise UserError(
            f"there are {len(negatives)} negative prompts for {len(prompts)} prompts: give one, or "
            "one for each"
        )
    if isinstance(seed, int | np.integer):
        seeds = [int(seed) + number for _ in prompts for number in range(each)]
    else:
        seeds = [int(one) for one in seed]
        if len(seeds) == len(prompts):
            seeds = [one + number for one in seeds for number in range(each)]
        elif len(seeds) != len(prompts) * each:
            raise UserError(
                f"there are {len(seeds)} seeds for {len(prompts)} prompts with {each} picture(s) "
                "each: give one for each prompt or one for each picture"
            )
    if strange := [one for one in seeds if not 0 <= one < 2**32]:
        raise UserError(f"seed is {strange[0]}: expected a whole number from 0 to {2**32 - 1}")
    pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(each)]
    return [Request(*pair, one) for pair, one in zip(pairs, seeds, strict=True)]
