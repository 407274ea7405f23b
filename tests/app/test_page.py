"""The web page, used by a person's browser: Chromium without a window."""

import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from instella_jax.codec.tokenizer import BinaryTokenizer
from instella_jax.sampling.pipeline import InstellaPipeline
from tests.needs_app import CHROMIUM, NEEDS_BROWSER
from tests.server_process import serving

pytestmark = NEEDS_BROWSER
PROMPT = "a cat above a blue square"
# Chromium of its own accord talks to nobody with these.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Milliseconds until the first picture, which is compiled for.
COMPILED = 180_000


@pytest.fixture(scope="module")
def server():
    with serving() as process:
        yield process


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Visitor:
    """Somebody with a browser of their own."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.asked, self.errors = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda message: self.errors.append(message.text) if message.type == "error" else None,
        )
        self.url = url
        self.page.goto(url)
        self.page.wait_for_selector("#prompt textarea")

    def fill(self, prompt, seed=0, count=1):
        self.page.fill("#prompt textarea", prompt)
        self.page.fill("#seed input", str(seed))
        self.page.fill("#count input[type=number]", str(count))
        self.page.locator("#count input[type=number]").blur()

    def pictures(self):
        """Wait for the gallery and return the pixels of its files, and what they say."""
        self.page.wait_for_selector("#gallery img", timeout=COMPILED)
        found = []
        for image in self.page.locator("#gallery .grid-container img").all():
            file = self.context.request.get(
                self.page.evaluate("x => x.src", image.element_handle())
            )
            with Image.open(io.BytesIO(file.body())) as picture:
                assert picture.format == "PNG"
                found.append((np.asarray(picture), json.loads(picture.text["instella_jax"])))
        return found


@pytest.fixture
def visit(server, browser):
    """Opens the page as somebody new; nobody's browser may ask another machine or see errors."""
    visitors = []

    def visit(**options):
        visitors.append(Visitor(browser, server.url, **options))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.context.close()
        own = (server.url, "data:", "blob:")
        assert not [url for url in visitor.asked if not url.startswith(own)]
        assert not visitor.errors


@pytest.fixture(scope="module")
def pipe():
    return InstellaPipeline.from_pretrained("demo")


def test_the_picture_is_the_one_that_the_pipeline_gives_for_that_seed(visit, pipe):
    visitor = visit()
    visitor.fill(PROMPT, seed=7, count=2)
    visitor.page.click("#run")
    found = visitor.pictures()
    wanted = pipe(PROMPT, seed=7, num_images_per_prompt=2).images
    assert len(found) == 2
    for number, ((picture, made_by), other) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_array_equal(picture, np.asarray(other))
        assert (made_by["text"], made_by["seed"]) == (PROMPT, 7 + number)
    assert re.search(r"Seeds 7 to 8, [\d.]+ s\.", visitor.page.inner_text("#status"))


WATCH = """() => {
  window.shares = [];
  new MutationObserver(() => {
    const bar = document.querySelector('#shown .bar > i');
    if (bar) window.shares.push(parseInt(bar.style.width));
  }).observe(document.querySelector('#shown'), {subtree: true, childList: true, attributes: true});
}"""


def test_the_pictures_are_shown_as_they_come_about(visit):
    visitor = visit()
    visitor.fill(PROMPT, count=10)
    visitor.page.evaluate(WATCH)
    visitor.page.click("#run")
    assert len(visitor.pictures()) == 10
    shares = visitor.page.evaluate("window.shares")
    assert shares == sorted(shares) and 0 < shares[0] < 100


def test_two_at_once_get_their_own_pictures(visit, pipe):
    prompts = (PROMPT, "two red hearts on a blue background")
    visitors = [visit() for _ in prompts]
    for visitor, prompt in zip(visitors, prompts, strict=True):
        visitor.fill(prompt, seed=5)
    for visitor in visitors:
        visitor.page.click("#run")
    for visitor, prompt in zip(visitors, prompts, strict=True):
        ((picture, made_by),) = visitor.pictures()
        assert made_by["text"] == prompt
        wanted = np.asarray(pipe(prompt, seed=5).images[0])
        # Where they shared a batch, which sums in another order: a grey level at most.
        assert np.abs(picture.astype(int) - wanted.astype(int)).max() <= 1


def test_stop_ends_what_is_being_made(visit, server):
    import httpx

    with httpx.Client(base_url=server.url, timeout=60) as client:
        before = client.get("/health").json()["batches"]
        visitor = visit()
        visitor.fill(PROMPT, count=10)
        visitor.page.get_by_text("Sampling").click()
        steps = visitor.page.get_by_label("number input for Steps (diffusion)")
        steps.fill("100")
        steps.blur()
        visitor.page.click("#run")
        visitor.page.wait_for_selector("#shown .bar", timeout=COMPILED)
        visitor.page.click("#stop")
        visitor.page.get_by_text("Stopped.").wait_for()
        while client.get("/health").json()["running"]:
            time.sleep(0.05)
        # The second of two batches is not begun.
        state = client.get("/health").json()
        assert state["batches"] - before == 1 and not state["waiting"]


def test_the_other_model_and_the_dice(visit):
    visitor = visit()
    visitor.fill(PROMPT)
    visitor.page.click("#dice")
    visitor.page.wait_for_function("document.querySelector('#seed input').value != '0'")
    seed = int(visitor.page.input_value("#seed input"))
    visitor.page.get_by_label("Autoregressive").check()
    visitor.page.click("#run")
    ((picture, made_by),) = visitor.pictures()
    assert (made_by["weights"]["folder"], made_by["seed"]) == ("demo_ar", seed)
    assert picture.shape == (64, 64, 3)


def test_no_prompt_gets_a_message_and_an_unknown_word_too(visit):
    visitor = visit()
    visitor.fill("  ")
    visitor.page.click("#run")
    notice = visitor.page.wait_for_selector("#status [role=alert]")
    assert notice.inner_text() == "Prompt is empty: say what the picture shows."
    visitor.fill("a catt on a red background")
    visitor.page.click("#run")
    visitor.pictures()
    assert "does not know: catt (cat?)" in visitor.page.inner_text("#status")


def upload(page, name, content):
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.set_input_files("#upload input[type=file]", files=[file])


def test_a_picture_goes_through_the_tokenizer(visit, pipe, tmp_path):
    visitor = visit()
    visitor.page.get_by_role("tab", name="Tokenizer").click()
    source = pipe(PROMPT, seed=3).images[0].resize((200, 120))
    file = io.BytesIO()
    source.save(file, format="PNG")
    upload(visitor.page, "mine.png", file.getvalue())
    visitor.page.wait_for_selector("#parts table", timeout=COMPILED)
    row = visitor.page.inner_text("#parts tr.ours").split()
    assert row[:3] == ["1D", "bits", "64"] and float(row[3]) > 15
    assert visitor.page.locator("#parts figure img").count() == 4
    with visitor.page.expect_download() as download:
        visitor.page.click("#bits")
    download.value.save_as(tmp_path / "mine.b1d")
    back = BinaryTokenizer.from_pretrained("demo").from_bytes((tmp_path / "mine.b1d").read_bytes())
    assert back.shape == (120, 200, 3)
    assert np.abs(back.astype(int) - np.asarray(source).astype(int)).mean() < 25


@pytest.mark.parametrize(
    ("name", "content"), [("notes.txt", b"hello"), ("broken.png", b"\x89PNG\r\n\x1a\n" + b"x" * 99)]
)
def test_a_bad_upload_gets_a_message(visit, name, content):
    visitor = visit()
    visitor.page.get_by_role("tab", name="Tokenizer").click()
    upload(visitor.page, name, content)
    notice = visitor.page.wait_for_selector("#parts [role=alert]", timeout=30_000)
    assert "this file" in notice.inner_text().lower() and "/" not in notice.inner_text()
    # What the browser itself says of an image that it cannot show.
    visitor.errors[:] = [text for text in visitor.errors if "Failed to load resource" not in text]


def test_limits_hold_for_those_who_do_not_use_the_page(server):
    import httpx

    with httpx.Client(base_url=server.url, timeout=60) as client:
        config = client.get("/config").json()
        (generate,) = (each["id"] for each in config["dependencies"] if len(each["inputs"]) == 9)
        before = client.get("/health").json()["batches"]
        for changes in (
            {4: 10_000},
            {6: 1_000_000},
            {3: "9999x9999"},
            {0: "x" * 100_000},
            {2: "x"},
        ):
            values = [PROMPT, "", "demo", "64x64", 1, 0, 20, 2.0, 1.0]
            for place, value in changes.items():
                values[place] = value
            session = f"session{next(iter(changes))}"
            body = {"data": values, "fn_index": generate, "session_hash": session}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200
            with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as events:
                said = "".join(events.iter_text())
            assert "picture-seed" not in said and "process_completed" in said
        assert client.get("/health").json()["batches"] == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_all_of_it(visit, scheme):
    visitor = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for tab in ("Generate", "Tokenizer", "API"):
        visitor.page.get_by_role("tab", name=tab).click()
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    colour = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = np.mean([int(number) for number in re.findall(r"\d+", colour)[:3]])
    assert light > 200 if scheme == "light" else light < 60
