# %% [markdown]
# # instella-jax: pictures from 1D binary latents
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# and there *File*, *Upload notebook*.
#
# Text to image with the demo weights, the tokenizer as a codec, two minutes of training, weights of
# your own or from the hub, and checkpoints to orbax and back. It runs on a CPU, a GPU or a TPU, from
# top to bottom in about five minutes on two CPU cores, and fetches nothing but the package.

# %% [markdown]
# ## Install
#
# Nothing happens where the package is there already, as in a clone after `pip install -e .`. Elsewhere
# say where it comes from: the address of the repository that you have this from, or a wheel.

# %%
import importlib.util

SOURCE = ""  # for example git+https://... or instella_jax-0.2.0-py3-none-any.whl
if importlib.util.find_spec("instella_jax") is None:
    assert SOURCE, "set SOURCE above, and run this cell again"
    get_ipython().run_line_magic("pip", f"install -q {SOURCE}")

# %% [markdown]
# ## What it computes with
#
# In Colab: *Runtime*, *Change runtime type*. Everything below is the same on each.

# %%
import jax

kind = jax.default_backend()
print(f"{len(jax.devices())} x {jax.devices()[0].device_kind} ({kind}), jax {jax.__version__}")
if kind == "cpu":
    print("A CPU will do for the demo; for larger models choose a GPU or a TPU runtime.")

# %% [markdown]
# ## Pictures
#
# The demo knows 48 emoji on ten backgrounds, up to three in a picture.

# %%
from IPython.display import display
from PIL import Image

from instella_jax import InstellaPipeline


def show(images, columns=6, side=128):
    """Shows PIL images side by side, enlarged."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * side, rows * side), "white")
    for number, image in enumerate(images):
        place = (number % columns * side, number // columns * side)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    display(sheet)


pipe = InstellaPipeline.from_pretrained("demo")
prompts = [
    "a cat above a blue square on a yellow background",
    "two red hearts on a white background",
    "a rocket to the left of a moon on a black background",
]
output = pipe(prompts, num_images_per_prompt=2, guidance_scale=2.0, seed=0)
show(output.images)

# %% [markdown]
# The generator samples bits, and the same seed gives the same bits:

# %%
print(output.codes.shape, output.codes.dtype, "seeds", output.seeds)
again = pipe(prompts[0], guidance_scale=2.0, seed=1)
print("the same picture again:", again.images[0].tobytes() == output.images[1].tobytes())

# %% [markdown]
# ## The tokenizer as a codec
#
# A 64 x 64 picture is 16 tokens of 32 bits: 64 bytes.

# %%
import io

import numpy as np

from instella_jax import BinaryTokenizer
from instella_jax.data.scenes.source import EmojiScenes

tokenizer = BinaryTokenizer.from_pretrained("demo")
scenes = EmojiScenes(64, split="heldout", places="thirds")
originals = np.stack([scenes[index]["image"] for index in range(6)])
codes = tokenizer.encode(originals)
copies = tokenizer.decode(codes, 64, 64)
show([Image.fromarray(picture) for picture in (*originals, *copies)])

error = np.square(originals.astype(float) - copies).mean((1, 2, 3))
file = io.BytesIO()
Image.fromarray(originals[0]).save(file, "JPEG", quality=75)
print(
    f"{np.packbits(codes[0]).nbytes} bytes a picture (JPEG: {len(file.getvalue())}), "
    f"{10 * np.log10(255**2 / error).mean():.1f} dB"
)

# %% [markdown]
# ## Two minutes of training
#
# An autoregressive generator from random weights, on scenes that are drawn as it learns. The grids
# show held-out prompts, with the average of the weights so far.

# %%
import logging
import tempfile
from pathlib import Path

from instella_jax.commands.config_file import find_config, load_config
from instella_jax.training.loop import train

logging.getLogger().setLevel(logging.ERROR)
work = Path(tempfile.mkdtemp())
config = load_config(find_config("t2i_ar"))
config.train.update(steps=300, log_every=100, eval_every=100, save_every=300, image_every=100)
config.eval.update(batches=2, pictures=6)
result = train(config, work / "run")

# %%
for step in (100, 200, 300):
    print("step", step)
    display(Image.open(work / "run" / "samples" / f"{step:08d}.png"))

# %% [markdown]
# ## Weights of your own, or from the hub
#
# A folder with a model, or the id of a repository on the Hugging Face hub, such as that of the
# published weights (`pip install huggingface_hub`; some GB, so choose a GPU or a TPU). Empty: this
# cell does nothing.

# %%
MODEL = ""

if MODEL:
    published = InstellaPipeline.from_pretrained(MODEL)
    show(published("a photo of a red panda on a tree").images, side=512)
else:
    print("No model is given: skipped.")

# %% [markdown]
# ## Checkpoints to orbax and back
#
# What was trained above is a model folder with safetensors; `instella-jax export` does the same in a
# terminal.

# %%
from safetensors.numpy import load_file

from instella_jax.weights.export import export_model

export_model(work / "run" / "model", "orbax", work / "orbax")
export_model(work / "orbax", "safetensors", work / "back")
first, last = (load_file(work / name / "generator.safetensors") for name in ("run/model", "back"))
print(sorted(path.name for path in (work / "orbax").iterdir()))
print("the same bits:", all(np.array_equal(first[name], last[name]) for name in first | last))
