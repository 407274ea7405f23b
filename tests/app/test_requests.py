import dataclasses

import pytest

from instella_jax.app import openai_form
from instella_jax.app.batching import Busy, Stopping
from instella_jax.app.requests import BadField, Limits, Request
from instella_jax.errors import UserError

LIMITS = Limits(prompt=20, pictures=4, steps=50)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""), ("prompt", " \n"), ("prompt", 3), ("prompt", "x" * 21),
        ("prompt", "\ud800"), ("negative_prompt", "x" * 21), ("pictures", 0), ("pictures", 5),
        ("pictures", 2.0), ("pictures", True), ("seed", -1), ("seed", 2**32), ("steps", 0),
        ("steps", 51), ("steps", "9"), ("protocol", 3), ("guidance_scale", -0.1),
        ("guidance_scale", float("nan")), ("guidance_scale", "2"), ("temperature", float("inf")),
        ("temperature", True), ("rho", 0),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name(field, value):
    good = Request("a cat", pictures=4, steps=50, seed=2**32 - 4)
    good.check(LIMITS)
    with pytest.raises(BadField, match=field) as refused:
        dataclasses.replace(good, **{field: value}).check(LIMITS)
    assert refused.value.field == field


def test_a_field_is_called_as_it_is_where_it_comes_from():
    with pytest.raises(BadField, match="^n is 9: expected a whole number from 1 to 4$"):
        Request("a cat", pictures=9).check(LIMITS, openai_form.NAMES)


def read(**values):
    return openai_form.read({"prompt": "a cat", **values}, LIMITS)


def test_a_request_is_read_whole():
    request, answer = read(
        model="demo_ar", n=3, size="96x64", seed=7, num_inference_steps=9, guidance_scale=3,
        negative_prompt="a dog", temperature=0.5, rho=2.0, protocol=2, quality="auto", user="me",
        output_format="webp", output_compression=40, response_format="url",
    )  # fmt: skip
    assert request == Request(
        "a cat", "demo_ar", "a dog", 3, 7, height=64, width=96, steps=9, guidance_scale=3,
        temperature=0.5, rho=2.0, protocol=2,
    )  # fmt: skip
    assert answer == openai_form.Answer("url", "webp", 40)


def test_what_is_left_out_is_the_models_own_and_the_seed_another_each_time():
    seeds = {read()[0].seed for _ in range(20)}
    assert len(seeds) > 15 and all(0 <= seed < 2**32 for seed in seeds)
    assert read(seed=0)[0] == Request("a cat")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "64"), ("size", "0x64"), ("size", "64x64\n"), ("size", 64), ("size", "999999x64"),
        ("response_format", "png"), ("response_format", 1), ("output_format", "gif"),
        ("output_format", ["png"]), ("output_compression", 101), ("partial_images", 4),
        ("partial_images", 2), ("stream", "yes"), ("quality", "hd"), ("style", "vivid"),
        ("background", "transparent"), ("model", 3), ("colour", "red"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(field, value):
    with pytest.raises(BadField, match=field) as refused:
        read(**{field: value})
    assert refused.value.field == field


@pytest.mark.parametrize("others", [{"n": 2}, {"response_format": "url"}])
def test_a_stream_is_of_one_picture(others):
    read(stream=True, partial_images=3)
    with pytest.raises(BadField, match="a stream holds one picture"):
        read(stream=True, **others)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'"a"'])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(BadField, match="^the body is "):
        openai_form.parse(body)


def test_a_field_that_is_null_is_left_out():
    assert openai_form.parse(b'{"prompt": "a cat", "n": null}') == {"prompt": "a cat"}


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (BadField("model", "no model"), 404, "invalid_request_error", "model_not_found"),
        (BadField("n", "too many"), 400, "invalid_request_error", "invalid_value"),
        (Busy("full"), 429, "rate_limit_error", "queue_full"),
        (Stopping("ends"), 503, "server_error", "shutting_down"),
        (UserError("no such size"), 400, "invalid_request_error", None),
        (ZeroDivisionError("of ours"), 500, "server_error", "internal_error"),
    ],
)
def test_each_error_has_the_status_that_clients_go_by(error, status, kind, code):
    found, body = openai_form.describe_error(error)
    assert (found, body["error"]["type"], body["error"]["code"]) == (status, kind, code)
    assert body["error"]["param"] == getattr(error, "field", None)
    assert "of ours" not in body["error"]["message"]
