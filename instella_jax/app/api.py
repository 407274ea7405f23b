"""The HTTP API: `POST /v1/images/generations` and what belongs to it, in OpenAI's form.

fastapi is of the extra [app], and so is imported where it is used.
"""

import asyncio
import base64
import collections
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np

from instella_jax.app import openai_form
from instella_jax.app.batching import Busy, Job, Made, Settings
from instella_jax.app.files import FORMATS, encode
from instella_jax.app.openai_form import Answer, describe_error, error_body
from instella_jax.app.studio import Studio
from instella_jax.errors import UserError
from instella_jax.sampling.card import version

logger = logging.getLogger(__name__)

# Bytes of a request's body.
MAX_BODY = 64 * 2**10
# Seconds between two looks at whether a client is still there.
LOOK = 0.25
# Pictures that links lead to; an older link leads nowhere.
LINKS = 256


class Shelf:
    """The last pictures that were asked for as links."""

    def __init__(self, most: int = LINKS):
        """Make room for `most` pictures."""
        self._files: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._most, self._lock = most, threading.Lock()

    def put(self, content: bytes, kind: str) -> str:
        """Keep a file and return its name, which nobody can guess."""
        name = f"{secrets.token_urlsafe(16)}.{kind}"
        with self._lock:
            self._files[name] = content
            while len(self._files) > self._most:
                self._files.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """Return a file, None where it is not there any more."""
        with self._lock:
            return self._files.get(name)


class Api:
    """The handlers of the API."""

    def __init__(self, studio: Studio, key: str = ""):
        """Answer for a studio.

        Args:
          studio: what makes the pictures.
          key: what clients must give as their API key; "" for none.
        """
        self._studio, self._key = studio, key
        self._shelf = Shelf()
        self._created = int(time.time())

    def add_to(self, app: Any) -> None:
        """Add the routes to a FastAPI application, and errors in OpenAI's form to `/v1`."""
        from starlette.exceptions import HTTPException

        for path, method, handler in (
            ("/v1/images/generations", "POST", self._guarded(self.generate)),
            ("/v1/images/files/{name}", "GET", self.file),
            ("/v1/models", "GET", self._guarded(self.list_models)),
            ("/v1/models/{name:path}", "GET", self._guarded(self.show_model)),
            ("/health", "GET", self.health),
        ):
            app.add_route(path, handler, methods=[method])
        app.add_exception_handler(HTTPException, self.refuse)

    def _guarded(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Return a handler that asks for the key first."""

        async def guarded(request: Any) -> Any:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
                return _json(
                    error_body("the API key is missing or wrong", code="invalid_api_key"), 401
                )
            return await handler(request)

        return guarded

    async def refuse(self, request: Any, error: Any) -> Any:
        """Answer what no route takes."""
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return _json(error_body(message, code=code), error.status_code, error.headers)

    async def health(self, request: Any) -> Any:
        """Tell whether pictures can be asked for, and how many are."""
        del request
        batcher = self._studio.batcher
        stopping = batcher.stopping
        values = {
            "status": "stopping" if stopping else "ok",
            "version": version(),
            "models": list(self._studio.models),
            "waiting": batcher.waiting,
            "running": batcher.running,
            "batches": batcher.batches,
        }
        return _json(values, 503 if stopping else 200)

    async def list_models(self, request: Any) -> Any:
        """List the models."""
        del request
        names = self._studio.models
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    async def show_model(self, request: Any) -> Any:
        """Describe one model."""
        name = request.path_params["name"]
        try:
            self._studio.model(name)
        except UserError as error:
            return _error(error)
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "instella-jax",
            "kind": self._studio.models[name].kind,
        }

    async def file(self, request: Any) -> Any:
        """Send a picture that an answer has a link to."""
        from fastapi.responses import Response

        name = request.path_params["name"]
        content = self._shelf.get(name)
        if content is None:
            return _json(error_body("there is no such picture, or not any more"), 404)
        return Response(content, media_type=FORMATS[name.rpartition(".")[2]])

    async def generate(self, request: Any) -> Any:
        """Make pictures."""
        from fastapi.responses import StreamingResponse

        try:
            values = openai_form.parse(await _body(request))
            wanted, answer = openai_form.read(values, self._studio.limits)
            shown: asyncio.Queue[tuple[int, int, np.ndarray]] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def on_preview(*preview: Any) -> None:
                loop.call_soon_threadsafe(shown.put_nowait, preview)

            watch = on_preview if answer.partial else None
            job = self._studio.submit(wanted, watch, openai_form.NAMES)
            if answer.stream:
                events = self._events(job, shown, answer)
                return StreamingResponse(events, media_type="text/event-stream")
            made = await _result(job, request)
            return _json(await asyncio.to_thread(self._body, request, job, made, answer))
        except Exception as error:
            return _error(error)

    def _body(self, request: Any, job: Job, made: Made, answer: Answer) -> dict[str, Any]:
        """Return the body of an answer with all pictures."""
        data = []
        for row, picture, record in zip(job.rows, *made, strict=True):
            content = encode(picture, record, answer.kind, answer.quality)
            if answer.form == "url":
                link = f"{request.base_url}v1/images/files/{self._shelf.put(content, answer.kind)}"
                data.append({"url": link, "seed": row.seed})
            else:
                data.append({"b64_json": base64.b64encode(content).decode(), "seed": row.seed})
        return {
            "created": int(time.time()),
            "data": data,
            "model": job.settings.model,
            "usage": self._usage(job),
            **_common(job.settings, answer),
        }

    def _usage(self, job: Job) -> dict[str, Any]:
        """Count tokens: of the text, and those that the pictures were decoded from."""
        sampler = self._studio.models[job.settings.model].sampler
        ids, mask = sampler.text_tokenizer.encode([job.rows[0].prompt], sampler.max_length)
        text, made = int(mask.sum()), len(job.rows) * sampler.generator.num_tokens
        return {
            "input_tokens": text,
            "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
            "output_tokens": made,
            "total_tokens": text + made,
        }

    async def _events(
        self, job: Job, shown: "asyncio.Queue[tuple[int, int, np.ndarray]]", answer: Answer
    ) -> AsyncIterator[str]:
        """Send the picture as it comes about, then as it is."""
        ready = asyncio.wrap_future(job.future)
        sent = 0
        try:
            while not (ready.done() and shown.empty()):
                preview = asyncio.ensure_future(shown.get())
                await asyncio.wait({preview, ready}, return_when=asyncio.FIRST_COMPLETED)
                if not preview.done():
                    preview.cancel()
                    break
                done, steps, pictures = preview.result()
                if done < steps and sent < answer.partial * done // steps + 1 <= answer.partial:
                    yield self._event("partial_image", job, pictures[0], None, answer, sent)
                    sent += 1
            made = await ready
            yield self._event("completed", job, made.pictures[0], made.records[0], answer)
        except Exception as error:
            yield f"event: error\ndata: {json.dumps(describe_error(error)[1])}\n\n"
        finally:
            job.cancel()

    def _event(
        self,
        name: str,
        job: Job,
        picture: np.ndarray,
        record: dict[str, Any] | None,
        answer: Answer,
        index: int | None = None,
    ) -> str:
        content = encode(picture, record, answer.kind, answer.quality)
        values: dict[str, Any] = {
            "type": f"image_generation.{name}",
            "b64_json": base64.b64encode(content).decode(),
            "created_at": int(time.time()),
            **_common(job.settings, answer),
        }
        if index is None:
            values.update(usage=self._usage(job), seed=job.rows[0].seed)
        else:
            values["partial_image_index"] = index
        return f"event: {values['type']}\ndata: {json.dumps(values)}\n\n"


def _common(settings: Settings, answer: Answer) -> dict[str, Any]:
    return {
        "size": f"{settings.width}x{settings.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": answer.kind,
    }


async def _body(request: Any) -> bytes:
    """Read the body of a request.

    Raises:
      UserError: it is too long, or not said to be JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise openai_form.BadField("", "the content type must be application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise openai_form.BadField("", f"the body is over {MAX_BODY:,} bytes")
    return body


async def _result(job: Job, request: Any) -> Made:
    """Wait for pictures, and give them up where the client has gone."""
    ready = asyncio.wrap_future(job.future)
    while not ready.done():
        await asyncio.wait({ready}, timeout=LOOK)
        if not ready.done() and await request.is_disconnected():
            job.cancel()
            raise ConnectionError("the client has gone")
    return await ready


def _error(error: BaseException) -> Any:
    status, body = describe_error(error)
    if status == 500 and not isinstance(error, ConnectionError):
        logger.error("a request failed", exc_info=error)
    headers = {"retry-after": "1"} if isinstance(error, Busy) else None
    return _json(body, status, headers)


def _json(values: dict[str, Any], status: int = 200, headers: Any = None) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse(values, status, headers)
