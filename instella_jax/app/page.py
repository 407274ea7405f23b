"""The web page; gradio is of the extra [app], and so is imported where it is used."""

import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instella_jax.app import look, markup
from instella_jax.app.batching import Job, Made
from instella_jax.app.files import encode
from instella_jax.app.requests import SEEDS, BadField, Request
from instella_jax.app.studio import Studio
from instella_jax.errors import UserError

EXAMPLES = (
    "a cat above a blue square",
    "two red hearts on a blue background",
    "a pizza to the left of a dog on a green background",
    "a rocket in the middle on purple",
    "three apples and a banana on a yellow background",
)
DICE = Path(__file__).parents[1] / "assets" / "app" / "dice.svg"
# On a narrow screen the pictures are below the controls.
SCROLL = """() => {
  const box = document.querySelector('#output');
  if (box.getBoundingClientRect().top > 0.6 * window.innerHeight) box.scrollIntoView();
}"""
START = "Your pictures appear here."
# Visitors whose requests are looked at at once, and that may queue up behind them.
AT_ONCE, QUEUED = 16, 64
# Seconds between two looks at a job.
LOOK = 0.1
# How often gradio removes what it has kept of pictures, and how old that is, in seconds.
CLEANING = (900, 3_600)


def mount(app: Any, studio: Studio) -> Any:
    """Add the page to a FastAPI application, at its root."""
    # Nothing is reported to anybody; gradio reads it when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    page = make_page(studio)
    page.queue(max_size=QUEUED, default_concurrency_limit=AT_ONCE, api_open=False)
    return gr.mount_gradio_app(
        app, page, path="/", footer_links=[], run_history=False, ssr_mode=False,
        enable_monitoring=False, max_file_size=studio.limits.upload_bytes,
        theme=look.theme(), css=look.CSS, show_error=False,
    )  # fmt: skip


def make_page(studio: Studio) -> Any:
    """Return the page as gradio's blocks."""
    import gradio as gr

    from instella_jax.app.tokenizer_tab import add_tokenizer_tab

    with gr.Blocks(title="instella-jax", analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.HTML(
            "<div id=head><h1>instella-jax</h1><p>Text to image with 1D binary latents. "
            "It runs on this machine, and sends nothing anywhere.</p></div>"
        )
        with gr.Tab("Generate"):
            _add_generator(gr, studio)
        with gr.Tab("Tokenizer"):
            add_tokenizer_tab(gr, studio)
        with gr.Tab("API"):
            gr.Markdown(_api_text(studio))
    return page


def _add_generator(gr: Any, studio: Studio) -> None:
    """Add the controls, the pictures and what joins them."""
    names, limits = list(studio.models), studio.limits
    first = studio.models[names[0]]
    sizes = choices_of_size(studio)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=6, max_length=limits.prompt, autofocus=True,
                placeholder="a cat above a blue square", elem_id="prompt",
            )  # fmt: skip
            negative = gr.Textbox(
                label="Negative prompt", lines=1, max_lines=3, max_length=limits.prompt,
                placeholder="what it should not show", elem_id="negative",
            )  # fmt: skip
            model = gr.Radio(
                [(title_of(studio, name), name) for name in names], value=names[0], label="Model",
                visible=len(names) > 1, elem_id="model",
            )  # fmt: skip
            with gr.Row():
                size = gr.Dropdown(sizes, value=sizes[0][1], label="Size", min_width=130)
                count = gr.Slider(
                    1, limits.pictures, 4, step=1, label="Pictures", min_width=130, elem_id="count"
                )
            with gr.Row(elem_id="seed-row"):
                seed = gr.Number(
                    0, label="Seed", precision=0, minimum=0, maximum=SEEDS - 1 - limits.pictures,
                    min_width=120, scale=3, elem_id="seed",
                )  # fmt: skip
                dice = gr.Button("Another", icon=str(DICE), min_width=110, scale=2, elem_id="dice")
            with gr.Row():
                run = gr.Button("Generate", variant="primary", elem_id="run", scale=3)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=1, min_width=80)
            with gr.Accordion("Sampling", open=False):
                steps = gr.Slider(1, limits.steps, 20, step=1, label="Steps (diffusion)")
                guidance = gr.Slider(
                    0, limits.guidance_scale, first.guidance_scale, step=0.1,
                    label="Guidance scale (at most 1: none)",
                )  # fmt: skip
                temperature = gr.Slider(
                    0, limits.temperature, first.temperature, step=0.05,
                    label="Temperature (0: the likelier bit)",
                )  # fmt: skip
            if known := first.sampler.text_tokenizer.words:
                with gr.Accordion(f"The {len(known)} words that it knows", open=False):
                    gr.HTML(markup.words(known))
        with gr.Column(scale=6, min_width=320, elem_id="output"):
            shown = gr.HTML(markup.waiting(START), elem_id="shown")
            gallery = gr.Gallery(
                label="Pictures", show_label=False, visible=False, format="png", elem_id="gallery",
                object_fit="contain", height="auto", interactive=False, columns=2,
                buttons=["download", "download_all", "fullscreen"],
            )  # fmt: skip
            status = gr.HTML(markup.said(""), elem_id="status")
            if first.sampler.text_tokenizer.words:
                gr.Examples(
                    [[text] for text in EXAMPLES], [prompt], label="Try one of these",
                    elem_id="examples",
                )  # fmt: skip

    def generate(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from _generate(gr, studio, *values)

    inputs = [prompt, negative, model, size, count, seed, steps, guidance, temperature]
    running = gr.on(
        [run.click, prompt.submit], generate, inputs, [shown, gallery, status],
        show_progress="hidden", concurrency_limit=AT_ONCE, trigger_mode="once",
        api_visibility="private",
    )  # fmt: skip
    run.click(None, None, None, js=SCROLL, queue=False)
    stop.click(
        lambda: (markup.said("Stopped."),), None, [status], cancels=[running], queue=False,
        api_visibility="private",
    )  # fmt: skip
    dice.click(
        lambda: random.randrange(2**31), None, seed, show_progress="hidden", queue=False,
        api_visibility="private",
    )  # fmt: skip

    def own_settings(name: str) -> tuple[float, float]:
        pipe = studio.model(name)
        return pipe.guidance_scale, pipe.temperature

    model.change(
        own_settings, model, [guidance, temperature], show_progress="hidden", queue=False,
        api_visibility="private",
    )  # fmt: skip


class _Latest:
    """The last preview of a job, handed from the thread that computes."""

    def __init__(self) -> None:
        self._value: tuple[int, int, np.ndarray] | None = None
        self._lock = threading.Lock()

    def put(self, done: int, steps: int, pictures: np.ndarray) -> None:
        with self._lock:
            self._value = done, steps, pictures

    def take(self) -> tuple[int, int, np.ndarray] | None:
        with self._lock:
            value, self._value = self._value, None
        return value


def _generate(
    gr: Any,
    studio: Studio,
    prompt: str,
    negative: str,
    model: str,
    size: str,
    count: Any,
    seed: Any,
    steps: Any,
    guidance: Any,
    temperature: Any,
) -> Iterator[tuple[Any, ...]]:
    """Make pictures, and show how they come about."""
    start, latest = time.perf_counter(), _Latest()
    try:
        height, width = _sides(size)
        request = Request(
            prompt=prompt or "", model=model or "", negative_prompt=negative or "",
            pictures=_as_whole(count), seed=_as_whole(seed), steps=_as_whole(steps),
            height=height, width=width, guidance_scale=guidance, temperature=temperature,
        )  # fmt: skip
        job = studio.submit(request, latest.put, {"pictures": "the number of pictures"})
    except UserError as error:
        yield gr.skip(), gr.skip(), markup.notice(error)
        return
    hidden = gr.Gallery(visible=False)
    try:
        yield gr.HTML(markup.waiting("…"), visible=True), hidden, markup.said(_place(studio, job))
        while not job.future.done():
            time.sleep(LOOK)
            if preview := latest.take():
                done, total, pictures = preview
                share = done / total
                text = markup.said(f"{share:.0%}")
                yield markup.progress(pictures, share), hidden, text
            elif ahead := studio.batcher.ahead_of(job):
                yield gr.skip(), hidden, markup.said(_place(studio, job, ahead))
        made = job.result()
    except Exception as error:
        yield gr.HTML(markup.waiting(START)), hidden, markup.notice(error)
        return
    finally:
        # Where the visitor has gone or stopped it.
        job.cancel()
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory(prefix="instella-jax-") as folder:
        files = _write(Path(folder), made)
        # gradio copies the files before it asks for more.
        yield (
            gr.HTML(visible=False),
            gr.Gallery(files, visible=True, columns=markup.across(len(files))),
            markup.said(_summary(studio, request, job, seconds)),
        )


def _as_whole(value: Any) -> Any:
    """Return the whole number that a field of a page holds; others are refused later."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sides(size: Any) -> tuple[int, int]:
    """Return height and width of a choice of `choices_of_size`."""
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", str(size))
    if not match:
        raise BadField("size", "size is none of those that are offered")
    return int(match[2]), int(match[1])


def _place(studio: Studio, job: Job, ahead: int | None = None) -> str:
    ahead = studio.batcher.ahead_of(job) if ahead is None else ahead
    if ahead:
        return f"Waiting: {ahead} picture{'s' if ahead > 1 else ''} ahead."
    return "Starting; the first pictures of a size take longer, as they are compiled for."


def _summary(studio: Studio, request: Request, job: Job, seconds: float) -> str:
    first, last = job.rows[0].seed, job.rows[-1].seed
    seeds = f"Seed {first}" if first == last else f"Seeds {first} to {last}"
    text = f"{seeds}, {seconds:.1f} s."
    if unknown := studio.unknown_words(request):
        text += f" Words that the model does not know: {', '.join(unknown[:8])}."
    return text


def _write(folder: Path, made: Made) -> list[str]:
    """Write PNG files with names that say what they are."""
    paths = []
    for picture, record in zip(*made, strict=True):
        words = re.sub(r"[^a-z0-9]+", "-", record["text"].lower()).strip("-")[:48]
        path = folder / f"{words or 'picture'}-seed{record['seed']}.png"
        path.write_bytes(encode(picture, record))
        paths.append(str(path))
    return paths


def title_of(studio: Studio, name: str) -> str:
    """Return what the page calls a model."""
    kind = {"diffusion": "Diffusion", "ar": "Autoregressive"}[studio.models[name].kind]
    return kind if name in ("demo", "demo_ar") else f"{name} ({kind.lower()})"


def choices_of_size(studio: Studio) -> list[tuple[str, str]]:
    """Return labels and values of the sizes that the page offers, that of training first."""
    found: dict[str, str] = {}
    for pipe in studio.models.values():
        side, multiple = pipe.sampler.image_size, pipe.sampler.tokenizer.config.multiple
        half = -(-side * 3 // 2 // multiple) * multiple
        zoomed = studio.limits.zoom * side
        shapes = [(side, side), (half, side), (side, half), (half, half), (zoomed, zoomed)]
        for width, height in shapes:
            found.setdefault(f"{width}x{height}", f"{width} × {height}")
    return [(label, value) for value, label in found.items()]


def _api_text(studio: Studio) -> str:
    name = next(iter(studio.models))
    return f"""
This server also answers in the form of OpenAI's images API; it asks for no key.

```python
import base64
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="none")
answer = client.images.generate(
    model="{name}", prompt="{EXAMPLES[0]}", n=2,
    extra_body={{"seed": 7, "guidance_scale": 2.0}},
)
open("picture.png", "wb").write(base64.b64decode(answer.data[0].b64_json))
```

Models: {", ".join(f"`{name}`" for name in studio.models)}. Beside OpenAI's fields it takes
`negative_prompt`, `seed`, `num_inference_steps`, `guidance_scale`, `temperature`, `rho` and
`protocol`; `stream=True` with `partial_images` sends pictures as they come about.
`GET /health` tells how many wait.
"""
