"""Requests and answers in the form of OpenAI's images API."""

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from instella_jax.app.batching import Busy, Stopping
from instella_jax.app.files import FORMATS
from instella_jax.app.requests import SEEDS, BadField, Limits, Request
from instella_jax.errors import UserError

# What fields are called there; the others are called as `Request` has them.
NAMES = {"pictures": "n", "steps": "num_inference_steps"}
OURS = ("negative_prompt", "seed", "guidance_scale", "temperature", "rho", "protocol")
# Fields of theirs that change nothing here, with the values that ask for nothing.
WITHOUT_EFFECT = {
    "quality": ("auto", "standard"),
    "style": (),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
}
TAKEN = (
    "prompt", "model", "n", "size", "num_inference_steps", "response_format", "output_format",
    "output_compression", "stream", "partial_images", "user", *OURS, *WITHOUT_EFFECT,
)  # fmt: skip
MAX_PARTIAL = 3


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a request is to be answered.

    Attributes:
      form: "b64_json", or "url" for links that hold for a while.
      kind: of the files, one of `FORMATS`.
      quality: of JPEG and WebP.
      stream: whether events are sent in the place of one body.
      partial: how many events show the picture on the way.
    """

    form: str = "b64_json"
    kind: str = "png"
    quality: int = 95
    stream: bool = False
    partial: int = 0


def parse(body: bytes) -> dict[str, Any]:
    """Read the JSON of a request; a field that is null is as if it were not there.

    Raises:
      BadField: it is no JSON object.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        # Its last words only: how deep it went is of no use to a client.
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "too deep"
        raise BadField("", f"the body is no JSON ({reason})") from None
    if not isinstance(values, dict):
        raise BadField("", f"the body is a {type(values).__name__}: expected a JSON object")
    return {name: value for name, value in values.items() if value is not None}


def read(values: Mapping[str, Any], limits: Limits) -> tuple[Request, Answer]:
    """Read the fields of a request.

    Raises:
      BadField: one is missing, unknown, or of a value that is not taken.
    """
    for name in values:
        if name not in TAKEN:
            raise BadField(name[:80], f"unknown field {name[:80]!r}: expected {', '.join(TAKEN)}")
    if "prompt" not in values:
        raise BadField("prompt", "prompt is missing: say what the picture shows")
    for name, harmless in WITHOUT_EFFECT.items():
        if name in values and values[name] not in harmless:
            choice = f"expected {' or '.join(harmless)}" if harmless else "leave it out"
            raise BadField(
                name, f"{name} {str(values[name])[:40]!r} is not to be had here: {choice}"
            )
    if not isinstance(values.get("model", ""), str):
        raise BadField("model", "model is no text: expected the name of one of GET /v1/models")
    height, width = _size(values.get("size", "auto"))
    fields = {name: values[name] for name in OURS if name in values}
    fields.setdefault("seed", secrets.randbelow(SEEDS - limits.pictures))
    request = Request(
        prompt=values["prompt"],
        model=values.get("model", ""),
        pictures=values.get("n", 1),
        steps=values.get("num_inference_steps", Request.steps),
        height=height,
        width=width,
        **fields,
    )
    return request, _answer(values, request)


def _size(value: Any) -> tuple[int, int]:
    """Return height and width, 0 for those of the model."""
    if value == "auto":
        return 0, 0
    match = re.fullmatch(
        r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value if isinstance(value, str) else ""
    )
    if not match:
        raise BadField("size", f"size is {str(value)[:40]!r}: expected WIDTHxHEIGHT or auto")
    return int(match[2]), int(match[1])


def _answer(values: Mapping[str, Any], request: Request) -> Answer:
    answer = Answer(
        form=values.get("response_format", "b64_json"),
        kind=values.get("output_format", "png"),
        quality=values.get("output_compression", 95),
        stream=values.get("stream", False),
        partial=values.get("partial_images", 0),
    )
    if answer.form not in ("b64_json", "url"):
        raise BadField(
            "response_format",
            f"response_format is {str(answer.form)[:40]!r}: expected b64_json or url",
        )
    if not isinstance(answer.kind, str) or answer.kind not in FORMATS:
        raise BadField(
            "output_format",
            f"output_format is {str(answer.kind)[:40]!r}: expected {', '.join(FORMATS)}",
        )
    for name, value, most in (
        ("output_compression", answer.quality, 100),
        ("partial_images", answer.partial, MAX_PARTIAL),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise BadField(
                name, f"{name} is {str(value)[:40]}: expected a whole number from 0 to {most}"
            )
    if not isinstance(answer.stream, bool):
        raise BadField("stream", f"stream is {str(answer.stream)[:40]}: expected true or false")
    if answer.stream and (request.pictures != 1 or answer.form == "url"):
        raise BadField(
            "stream", "a stream holds one picture, as b64_json: leave n and response_format out"
        )
    if answer.partial and not answer.stream:
        raise BadField("partial_images", "partial_images are for a stream: give stream=true")
    return answer


def error_body(
    message: str, kind: str = "invalid_request_error", field: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return an error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": field or None, "code": code}}


def describe_error(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return the status and the body that tell a client of an error."""
    if isinstance(error, BadField):
        missing = error.field == "model"
        code = "model_not_found" if missing else "invalid_value"
        return 404 if missing else 400, error_body(str(error), field=error.field, code=code)
    if isinstance(error, Busy):
        return 429, error_body(str(error), "rate_limit_error", code="queue_full")
    if isinstance(error, Stopping):
        return 503, error_body(str(error), "server_error", code="shutting_down")
    if isinstance(error, UserError):
        return 400, error_body(str(error))
    return 500, error_body(
        "the server failed to make this picture; its log says why",
        "server_error",
        code="internal_error",
    )
