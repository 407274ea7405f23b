"""The models of a server, and the one queue before them.

Axes: B pictures.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instella_jax.app.batching import Batcher, Job, Made, OnPreview, Row, Settings
from instella_jax.app.requests import BadField, Limits, Request
from instella_jax.codec.tokenizer import BinaryTokenizer
from instella_jax.errors import UserError
from instella_jax.sampling import options as sampling_options
from instella_jax.sampling.pipeline import InstellaPipeline
from instella_jax.sampling.records import make_record

# How many previews of a picture are decoded on the way.
PREVIEWS = 10


class Studio:
    """Answers requests for pictures, those of the same settings together.

    Attributes:
      models: pipelines by the names that requests call them by.
      limits: what requests may ask for.
      batcher: what waits and is computed.
    """

    def __init__(self, models: Mapping[str, InstellaPipeline], limits: Limits = Limits()):  # noqa: B008
        """Start the thread that computes."""
        self.models, self.limits = dict(models), limits
        self.batcher = Batcher(self._compute, max_batch=limits.batch, max_waiting=limits.waiting)

    @classmethod
    def open(cls, names: Sequence[str], limits: Limits = Limits()) -> "Studio":  # noqa: B008
        """Open models by their names, see `InstellaPipeline.from_pretrained`.

        Raises:
          UserError: there is no such model, or it is damaged, or two are called the same.
        """
        models: dict[str, InstellaPipeline] = {}
        for name in names:
            called = short_name(name)
            if called in models:
                raise UserError(f"two models are called {called!r}: give each once, or copy one")
            models[called] = InstellaPipeline.from_pretrained(name)
        return cls(models, limits)

    @functools.cached_property
    def codec(self) -> BinaryTokenizer:
        """The tokenizer of images of the first model."""
        return next(iter(self.models.values())).tokenizer

    def warm_up(self) -> None:
        """Ask for a picture of each model, so that the first visitor does not wait for XLA."""
        for name, pipe in self.models.items():
            known = pipe.sampler.text_tokenizer.words
            self.submit(Request(known[0] if known else "a picture", model=name))

    def submit(
        self,
        request: Request,
        on_preview: OnPreview | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Job:
        """Put the pictures of a request into the queue.

        Args:
          request: what is asked for.
          on_preview: see `Job`.
          names: see `Request.check`.

        Raises:
          BadField: a value is not taken.
          Busy: the queue is full.
          Stopping: the server is shutting down.
        """
        request.check(self.limits, names)
        settings = self.settings(request)
        rows = [
            Row(request.prompt, request.negative_prompt, request.seed + number)
            for number in range(request.pictures)
        ]
        return self.batcher.submit(Job(settings, rows, on_preview))

    def model(self, name: str) -> InstellaPipeline:
        """Return a model; "" is the first one.

        Raises:
          BadField: there is none of that name.
        """
        name = name or next(iter(self.models))
        if name not in self.models:
            known = ", ".join(map(repr, self.models))
            raise BadField(
                "model", f"there is no model {name[:80]!r} here: expected one of {known}"
            )
        return self.models[name]

    def settings(self, request: Request) -> Settings:
        """Return the settings of a request, the model's own in the place of what it leaves open.

        Raises:
          BadField: there is no such model, or it makes no pictures of that size.
        """
        pipe = self.model(request.model)
        guidance, temperature = request.guidance_scale, request.temperature
        height, width = self._size(pipe, request.height, request.width)
        return Settings(
            model=request.model or next(iter(self.models)),
            height=height,
            width=width,
            steps=request.steps,
            guidance_scale=float(pipe.guidance_scale if guidance is None else guidance),
            temperature=float(pipe.temperature if temperature is None else temperature),
            rho=float(pipe.rho if request.rho is None else request.rho),
            protocol=request.protocol,
        )

    def _size(self, pipe: InstellaPipeline, height: Any, width: Any) -> tuple[int, int]:
        trained, multiple = pipe.sampler.image_size, pipe.sampler.tokenizer.config.multiple
        most = self.limits.zoom * trained
        sides = []
        for side in (height, width):
            whole = isinstance(side, int) and not isinstance(side, bool)
            if not whole or side % multiple or not 0 <= side <= most:
                raise BadField(
                    "size",
                    f"size is {str(width)[:20]}x{str(height)[:20]}: expected width and height as "
                    f"multiples of {multiple} up to {most} pixels",
                )
            sides.append(side or trained)
        return sides[0], sides[1]

    def unknown_words(self, request: Request) -> list[str]:
        """Return the words of a prompt that the model does not know, with its nearest ones."""
        texts = self.model(request.model).sampler.text_tokenizer
        found = []
        for word in texts.unknown_words(request.prompt):
            near = difflib.get_close_matches(word, texts.words, n=1)
            found.append(f"{word} ({near[0]}?)" if near else word)
        return found

    def _compute(
        self, settings: Settings, rows: Sequence[Row], on_preview: OnPreview | None
    ) -> Made:
        """Sample a batch."""
        pipe = self.models[settings.model]
        # Few sizes of batches are ever compiled: the powers of two.
        size = min(1 << (len(rows) - 1).bit_length(), self.limits.batch)
        requests = [sampling_options.Request(*rows[min(n, len(rows) - 1)]) for n in range(size)]
        options = pipe.options(
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            temperature=settings.temperature,
            height=settings.height,
            width=settings.width,
            rho=settings.rho,
            protocol=settings.protocol,
            batch_size=size,
        )

        def on_step(done: int, total: int, codes: Any) -> None:
            assert on_preview is not None
            # The last one is shown as the result.
            if done % max(1, total // PREVIEWS) == 0 or done == total:
                pictures = pipe.sampler.decode(codes, settings.height, settings.width)
                on_preview(done, total, pictures[: len(rows)])

        (made,) = pipe.sampler.batches(
            requests, options, on_step=None if on_preview is None else on_step
        )
        length = pipe.sampler.text_length([text for request in requests for text in request[:2]])
        records = [
            make_record(pipe.sampler, pipe.weights, request, options, size, length)
            for request in requests[: len(rows)]
        ]
        for record in records:
            # As it is called here: where the server has it is nobody else's business.
            record["weights"] = {**record["weights"], "folder": settings.model}
        return Made(made.images[: len(rows)], records)


def short_name(model: str) -> str:
    """Return what requests call a model: the last part of its path or id."""
    return model if "/" not in model and "\\" not in model else Path(model).absolute().name
