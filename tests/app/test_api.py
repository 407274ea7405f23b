"""The HTTP API, asked by the client package of OpenAI."""

import base64
import concurrent.futures
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from instella_jax.sampling.pipeline import InstellaPipeline
from tests.needs_app import NEEDS_APP
from tests.paths import ROOT
from tests.server_process import serving

pytestmark = NEEDS_APP
PROMPT = "a cat above a blue square"


@pytest.fixture(scope="module")
def server():
    with serving("--api", "--batch=4", "--waiting=12") as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    import httpx

    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def pixels(image):
    with Image.open(io.BytesIO(base64.b64decode(image.b64_json))) as file:
        assert file.format == "PNG"
        # Those of a stream that are not finished say nothing.
        return np.asarray(file), json.loads(file.text.get("instella_jax", "null"))


def wanted(prompt, seed, **options):
    pipe = InstellaPipeline.from_pretrained("demo")
    return np.asarray(pipe(prompt, seed=seed, **options).images[0])


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["demo", "demo_ar"]
    assert client.models.retrieve("demo_ar").kind == "ar"


def test_a_picture_is_the_one_of_its_seed_and_says_how_it_was_made(client):
    answer = client.images.generate(
        model="demo", prompt=PROMPT, extra_body={"seed": 7, "num_inference_steps": 6}
    )
    (image,) = answer.data
    found, made_by = pixels(image)
    np.testing.assert_array_equal(found, wanted(PROMPT, 7, num_inference_steps=6))
    assert (image.seed, answer.size, answer.output_format) == (7, "64x64", "png")
    assert (made_by["text"], made_by["seed"], made_by["steps"]) == (PROMPT, 7, 6)
    # 16 tokens to a picture of the demo.
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (6, 16)


def test_the_command_makes_a_picture_again_from_itself(client, tmp_path):
    answer = client.images.generate(
        model="demo", prompt=PROMPT, n=3, extra_body={"seed": 7, "num_inference_steps": 6}
    )
    (tmp_path / "third.png").write_bytes(base64.b64decode(answer.data[2].b64_json))
    command = [sys.executable, "-m", "instella_jax", "generate", "--from", "third.png"]
    subprocess.run(
        [*command, "--out", "again.png"], cwd=tmp_path, check=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )  # fmt: skip
    with Image.open(tmp_path / "third.png") as first, Image.open(tmp_path / "again.png") as again:
        np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
        assert json.loads(first.text["instella_jax"])["seed"] == 9


def test_all_that_can_be_asked_for_is_answered(client, http):
    answer = client.images.generate(
        model="demo_ar", prompt="two dogs", n=2, size="96x64", response_format="url",
        output_format="webp", output_compression=80, user="me", quality="auto",
        extra_body={"negative_prompt": "a cat", "guidance_scale": 1.5, "temperature": 0.4},
    )  # fmt: skip
    assert answer.data[1].seed == answer.data[0].seed + 1
    for image in answer.data:
        file = http.get(image.url)
        assert file.headers["content-type"] == "image/webp"
        with Image.open(io.BytesIO(file.content)) as picture:
            assert picture.size == (96, 64)
    assert http.get(f"{answer.data[0].url}x").status_code == 404


def test_a_stream_shows_the_picture_as_it_comes_about(client):
    events = list(
        client.images.generate(
            model="demo", prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7}
        )
    )
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + [
        "completed"
    ]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    shown = [pixels(event)[0].astype(int) for event in events]
    np.testing.assert_array_equal(shown[-1], wanted(PROMPT, 7))
    assert np.abs(shown[0] - shown[-1]).mean() > 10


def test_many_at_once_are_batched_and_get_their_own(client, http):
    before = http.get("/health").json()["batches"]

    def ask(number):
        prompt = ("a cat", "two dogs", "a pizza", "a star")[number % 4]
        extra = {"seed": number, "num_inference_steps": 12}
        image = client.images.generate(model="demo", prompt=prompt, extra_body=extra).data[0]
        return image.seed, prompt, pixels(image)[1]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    for number, (seed, prompt, made_by) in enumerate(answers):
        assert seed == made_by["seed"] == number and made_by["text"] == prompt
    # 8 pictures, 4 in a batch at most.
    assert 2 <= http.get("/health").json()["batches"] - before <= 5


@pytest.mark.parametrize(
    ("changes", "field", "code"),
    [
        ({"prompt": " "}, "prompt", "invalid_value"),
        ({"prompt": "x" * 1_001}, "prompt", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"size": "65x64"}, "size", "invalid_value"),
        ({"size": "1024x1024"}, "size", "invalid_value"),
        ({"extra_body": {"num_inference_steps": 101}}, "num_inference_steps", "invalid_value"),
        ({"extra_body": {"sede": 1}}, "sede", "invalid_value"),
        ({"quality": "hd"}, "quality", "invalid_value"),
    ],
)
def test_what_is_not_taken_is_an_error_in_openais_form(client, changes, field, code):
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"model": "demo", "prompt": PROMPT, **changes})
    assert (refused.value.param, refused.value.code) == (field, code)
    assert refused.value.type == "invalid_request_error"


def test_another_model_and_another_path_are_not_found(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="no model 'gpt-image-1' here") as refused:
        client.images.generate(model="gpt-image-1", prompt=PROMPT)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.edit(model="demo", image=b"x", prompt=PROMPT)
    assert refused.value.code == "unknown_url"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, "no JSON"),
        ({"content": b"{}"}, "content type"),
        ({"data": {"prompt": PROMPT}}, "content type"),
        ({"json": {"prompt": "x" * 70_000}}, "over 65,536 bytes"),
        ({"json": [PROMPT]}, "expected a JSON object"),
    ],
)
def test_a_body_that_is_no_request_is_refused(http, options, said):
    answer = http.post("/v1/images/generations", **options)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_a_name_that_is_not_this_machine_is_refused(http):
    assert http.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_a_full_queue_is_said_at_once_and_the_rest_is_answered(client):
    import openai

    def ask(seed):
        extra = {"seed": seed, "num_inference_steps": 100}
        try:
            answer = client.images.generate(model="demo", prompt="a dog", n=4, extra_body=extra)
        except openai.RateLimitError as error:
            assert error.code == "queue_full" and error.response.headers["retry-after"] == "1"
            return None
        return len(answer.data)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert set(answers) == {4, None}


def test_a_client_that_has_gone_is_not_computed_for(server, http):
    host, _, port = server.url.removeprefix("http://").partition(":")
    body = json.dumps({"prompt": "a dog", "n": 10, "num_inference_steps": 100}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    before = http.get("/health").json()["batches"]
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        while not http.get("/health").json()["running"]:
            time.sleep(0.01)
    end = time.monotonic() + 60
    while http.get("/health").json()["waiting"] and time.monotonic() < end:
        time.sleep(0.05)
    while http.get("/health").json()["running"]:
        time.sleep(0.05)
    # Of its three batches the one that was being computed, and perhaps the next.
    assert http.get("/health").json()["batches"] - before <= 2


def test_a_key_is_asked_for_where_there_is_one():
    import openai

    with serving("--api", "--model=demo", INSTELLA_JAX_API_KEY="s3cret") as process:
        address = f"{process.url}/v1"
        with openai.OpenAI(base_url=address, api_key="s3cret", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["demo"]
        with openai.OpenAI(base_url=address, api_key="other", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"


def test_a_server_that_is_told_to_stop_answers_what_it_was_asked():
    import openai

    with serving("--api", "--model=demo") as process:
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=0) as client:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                asked = pool.submit(
                    client.images.generate, model="demo", prompt=PROMPT, n=2,
                    extra_body={"num_inference_steps": 100},
                )  # fmt: skip
                health = f"{process.url}/health"
                import httpx

                while httpx.get(health).json()["running"] != 2:
                    time.sleep(0.02)
                process.send_signal(signal.SIGTERM)
                assert len(asked.result(120).data) == 2
        assert process.wait(60) == 0
        assert process.stdout.read().endswith("stopped\n")
