"""Folders of a tiny DINOv2 with random weights, by the names that transformers gives them."""

import json

import numpy as np
from safetensors.numpy import save_file

SIZES = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2, image_size=56,
    patch_size=14,
)  # fmt: skip


def tensors(sizes, seed=0):
    """Random weights of a model, large enough that every part of it shows."""
    rng, c = np.random.default_rng(seed), sizes
    d, side = c["hidden_size"], c["patch_size"]
    wide = int(d * c["mlp_ratio"])
    found = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.mask_token": (1, d),
        "embeddings.position_embeddings": (1, 1 + (c["image_size"] // side) ** 2, d),
        "embeddings.patch_embeddings.projection.weight": (d, 3, side, side),
        "embeddings.patch_embeddings.projection.bias": (d,),
        "layernorm.weight": (d,),
        "layernorm.bias": (d,),
    }
    linear = {
        "attention.attention.query": (d, d),
        "attention.attention.key": (d, d),
        "attention.attention.value": (d, d),
        "attention.output.dense": (d, d),
    }
    if c.get("use_swiglu_ffn"):
        wide = (int(wide * 2 / 3) + 7) // 8 * 8
        linear |= {"mlp.weights_in": (2 * wide, d), "mlp.weights_out": (d, wide)}
    else:
        linear |= {"mlp.fc1": (wide, d), "mlp.fc2": (d, wide)}
    for layer in range(c["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        for name, shape in linear.items():
            found[f"{prefix}{name}.weight"], found[f"{prefix}{name}.bias"] = shape, shape[:1]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            found[prefix + name] = (d,)
        for number in (1, 2):
            found[f"{prefix}layer_scale{number}.lambda1"] = (d,)
    return {
        name: (rng.normal(size=shape) * _spread(name, shape)).astype(np.float32)
        for name, shape in found.items()
    }


def _spread(name, shape):
    return 2 / np.sqrt(np.prod(shape[1:])) if name.endswith("weight") and len(shape) > 1 else 0.5


def write(folder, seed=0, **changes):
    """Write a folder, and return its tensors."""
    sizes = {**SIZES, **changes}
    made = tensors(sizes, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2", **sizes}))
    return made
