"""CLIP's towers in Flax (Radford et al., 2021), and the score of pictures by their captions.

The weights are the user's: a folder with `model.safetensors` and `config.json` of transformers'
CLIPModel, such as that of openai/clip-vit-base-patch32, and the files of its tokenizer.

Axes: B batch, T positions, D width, P width of the shared space.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from instella_jax.errors import UserError
from instella_jax.evaluation.feature_sets import of_all
from instella_jax.evaluation.picture_sets import PictureSet, batches
from instella_jax.models.functional import Params
from instella_jax.runtime import sharding
from instella_jax.weights.tensor_files import read_json_file, require_file

# Mean and deviation of the colours, in [0, 1], of CLIP's training pictures.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# The end of text in configs that are older than transformers 4.31, where it is the largest id.
_OLD_END = 2


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of a tower, by the names of transformers' config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the two towers.

    Attributes:
      vision: of the images' tower.
      text: of the texts' tower.
      projection: P.
      image_size: pixels of a side.
      patch_size: likewise of a patch.
      positions: the longest text, in tokens.
      end: id of the end of text; 2 in old configs, where the largest id is meant.
    """

    vision: TowerConfig
    text: TowerConfig
    projection: int
    image_size: int
    patch_size: int
    positions: int
    end: int


def read_config(values: Mapping[str, Any]) -> ClipConfig:
    """Read the sizes out of transformers' `config.json`; what it leaves out is ViT-B/32's.

    Raises:
      UserError: it is no CLIP's, or has a part that is not known.
    """
    if values.get("model_type", "clip") != "clip":
        raise UserError(f"a model of the type {values['model_type']!r}: expected clip")
    vision = {
        **dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12),
        **dict(num_attention_heads=12, image_size=224, patch_size=32),
        **(values.get("vision_config") or {}),
    }
    text = {
        **dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12),
        **dict(num_attention_heads=8, max_position_embeddings=77, eos_token_id=49407),
        **(values.get("text_config") or {}),
    }
    names = [field.name for field in dataclasses.fields(TowerConfig)]
    towers = [TowerConfig(**{k: v for k, v in t.items() if k in names}) for t in (vision, text)]
    for tower in towers:
        if tower.hidden_act not in ("quick_gelu", "gelu"):
            raise UserError(f"CLIP with the activation {tower.hidden_act!r} is not known")
    return ClipConfig(
        *towers,
        projection=values.get("projection_dim", 512),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        positions=text["max_position_embeddings"],
        end=text["eos_token_id"],
    )


class Tower(nn.Module):
    """The layers of a transformer with normalisation first, and their biases."""

    config: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply all layers."""
        c = self.config
        shape = (*x.shape[:2], c.num_attention_heads, -1)
        for number in range(c.num_hidden_layers):
            name = f"layers.{number}"
            y = nn.LayerNorm(epsilon=c.layer_norm_eps, name=f"{name}.layer_norm1")(x)
            q, k, v = (
                nn.Dense(c.hidden_size, name=f"{name}.self_attn.{kind}_proj")(y).reshape(shape)
                for kind in "qkv"
            )
            y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(x.shape)
            x = x + nn.Dense(c.hidden_size, name=f"{name}.self_attn.out_proj")(y)
            y = nn.LayerNorm(epsilon=c.layer_norm_eps, name=f"{name}.layer_norm2")(x)
            y = nn.Dense(c.intermediate_size, name=f"{name}.mlp.fc1")(y)
            quick = c.hidden_act == "quick_gelu"
            y = y * nn.sigmoid(1.702 * y) if quick else nn.gelu(y, approximate=False)
            x = x + nn.Dense(c.hidden_size, name=f"{name}.mlp.fc2")(y)
        return x


class ImageTower(nn.Module):
    """Images to the shared space."""

    config: ClipConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B side side 3"]) -> Float[Array, "B P"]:
        """Embed images whose colours are normalised."""
        c, d, p = self.config, self.config.vision.hidden_size, self.config.patch_size
        patches = nn.Conv(d, (p, p), (p, p), use_bias=False, name="embeddings.patch_embedding")
        x = patches(images).reshape(len(images), -1, d)
        first = self.param("embeddings.class_embedding", nn.initializers.normal(), (d,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, d)), x], 1)
        places = nn.Embed(x.shape[1], d, name="embeddings.position_embedding")
        x = x + places(jnp.arange(x.shape[1]))
        eps = c.vision.layer_norm_eps
        x = nn.LayerNorm(epsilon=eps, name="pre_layrnorm")(x)
        x = Tower(c.vision, causal=False, name="encoder")(x)
        x = nn.LayerNorm(epsilon=eps, name="post_layernorm")(x[:, 0])
        return nn.Dense(c.projection, use_bias=False, name="projection")(x)


class TextTower(nn.Module):
    """Texts to the shared space."""

    config: ClipConfig
    vocabulary: int

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B P"]:
        """Embed texts, each read at its end."""
        c, d = self.config, self.config.text.hidden_size
        x = nn.Embed(self.vocabulary, d, name="embeddings.token_embedding")(ids)
        places = nn.Embed(c.positions, d, name="embeddings.position_embedding")
        x = x + places(jnp.arange(ids.shape[1]))
        x = Tower(c.text, causal=True, name="encoder")(x)
        x = nn.LayerNorm(epsilon=c.text.layer_norm_eps, name="final_layer_norm")(x)
        ends: Bool[Array, "B T"] | Int[Array, "B T"] = ids if c.end == _OLD_END else ids == c.end
        x = x[jnp.arange(len(x)), jnp.argmax(ends, axis=1)]
        return nn.Dense(c.projection, use_bias=False, name="projection")(x)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A CLIP model.

    Attributes:
      config: its sizes.
      params: of the two towers, under "vision" and "text".
      tokenizer: transformers' CLIPTokenizer.
    """

    config: ClipConfig
    params: Params
    tokenizer: Any = None

    def embed_images(self, images: Float[Array, "B side side 3"]) -> Float[Array, "B P"]:
        """Embed images that `prepare` has made, to norm 1."""
        return _embed_images(self.config, self.params["vision"], images)

    def embed_texts(self, ids: Int[Array, "B T"]) -> Float[Array, "B P"]:
        """Embed ids of texts, to norm 1."""
        return _embed_texts(self.config, self.params["text"], ids)

    def tokenise(self, texts: Sequence[str]) -> np.ndarray:
        """Return ids int32 [B, T] of texts, cut at the longest the tower takes, padded to it."""
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.config.positions
        )
        return np.asarray(found["input_ids"], np.int32)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resize, crop and normalise uint8 [h, w, 3] as CLIP does: float32 [side, side, 3]."""
        from PIL import Image

        side = self.config.image_size
        rows, columns = image.shape[:2]
        least = min(rows, columns)
        size = (side * columns // least, side * rows // least)
        whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
        pixels = whole[top : top + side, left : left + side].astype(np.float32) / 255
        return (pixels - np.asarray(_MEAN, np.float32)) / np.asarray(_DEVIATION, np.float32)


@functools.partial(jax.jit, static_argnames="config")
def _embed_images(config: ClipConfig, params: Params, images: jax.Array) -> jax.Array:
    return _unit(ImageTower(config).apply({"params": params}, images))


@functools.partial(jax.jit, static_argnames="config")
def _embed_texts(config: ClipConfig, params: Params, ids: jax.Array) -> jax.Array:
    vocabulary = params["embeddings.token_embedding"]["embedding"].shape[0]
    return _unit(TextTower(config, vocabulary).apply({"params": params}, ids))


def _unit(x: Any) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def from_transformers(tensors: Mapping[str, np.ndarray]) -> Params:
    """Return our parameters out of those of transformers' CLIPModel."""
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name in tensors:
        if name in ("logit_scale",) or name.endswith("position_ids"):
            continue
        value = np.asarray(tensors[name], np.float32)
        tower, _, rest = name.partition(".")
        if tower in ("visual_projection", "text_projection"):
            flat["vision" if tower[0] == "v" else "text", "projection", "kernel"] = value.T
            continue
        path = [tower.removesuffix("_model")]
        if rest.startswith("encoder."):
            path, rest = [*path, "encoder"], rest.removeprefix("encoder.")
        module, _, leaf = rest.rpartition(".")
        if leaf == "class_embedding":
            flat[(*path, rest)] = value
            continue
        if module.endswith("_embedding") and value.ndim == 2:
            kind = "embedding"
        elif value.ndim == 4:
            kind, value = "kernel", value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            kind, value = "kernel", value.T
        else:
            kind = "scale" if leaf == "weight" else "bias"
        flat[(*path, module, kind)] = value
    return unflatten_dict(flat)


def load_clip(folder: Path) -> Clip:
    """Read a folder of transformers' CLIPModel with its tokenizer; nothing is fetched.

    Raises:
      UserError: a file is missing or damaged, or holds something else.
    """
    from transformers import CLIPTokenizer

    config = read_config(read_json_file(folder / "config.json"))
    params = from_transformers(_read_tensors(folder / "model.safetensors"))
    _check(config, params, folder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} holds no tokenizer of CLIP ({line})") from None
    return Clip(config, params, tokenizer)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    require_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error})") from None


def _check(config: ClipConfig, params: Params, folder: Path) -> None:
    """Check shapes.

    Raises:
      UserError: a tensor is missing, unknown or of another shape.
    """
    vocabulary = params.get("text", {}).get("embeddings.token_embedding", {}).get("embedding")
    if vocabulary is None:
        raise UserError(f"{folder} holds no CLIP: the weights lack the text model's embeddings")
    side = config.image_size
    like = {
        "vision": jax.eval_shape(
            ImageTower(config).init, jax.random.key(0), jnp.zeros((1, side, side, 3))
        )["params"],
        "text": jax.eval_shape(
            TextTower(config, len(vocabulary)).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
        )["params"],
    }
    wanted, found = (
        {jax.tree_util.keystr(k): v.shape for k, v in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (like, params)
    )
    if odd := sorted(set(wanted.items()) ^ set(found.items())):
        raise UserError(f"{folder}: the weights do not fit its config.json at {odd[0][0]}")


def clip_scores(
    clip: Clip,
    pictures: PictureSet,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Return the cosine of each picture and its text, float32 [n], those of all processes.

    Args:
      clip: the model.
      pictures: the whole set, in every process.
      texts: of each picture.
      batch_size: pictures at a time in each process, which its devices share.
      show: is given how many pictures of this process are done, of how many.
    """
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    size = -(-batch_size // mesh.size) * mesh.size
    rows = sharding.batch_sharding(mesh)
    placed = dataclasses.replace(
        clip, params=jax.device_put(clip.params, sharding.replicated(mesh))
    )
    part, of = jax.process_index(), jax.process_count()
    own = [texts[i] for i in range(part, len(pictures), of)]
    scores = np.zeros(0, np.float32)
    for images in batches(pictures, clip.prepare, size, part, of):
        some = own[len(scores) : len(scores) + len(images)]
        # The last batch is filled up, so that all have the compiled shape.
        left = size - len(some)
        full = np.pad(images, ((0, left), *((0, 0),) * (images.ndim - 1)))
        ids = clip.tokenise([*some, *some[-1:] * left])
        seen = placed.embed_images(jax.device_put(full, rows))
        read = placed.embed_texts(jax.device_put(ids, rows))
        scores = np.concatenate([scores, np.asarray((seen * read).sum(-1))[: len(some)]])
        show(len(scores), len(own))
    found = np.zeros(len(pictures), np.float32)
    for number, each in enumerate(of_all(scores)):
        found[number::of] = each
    return found
