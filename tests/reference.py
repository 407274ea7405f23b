"""The networks of docs/model.md in plain numpy, one tensor at a time, to compare with.

Weights `w` are dictionaries with the reference's names; images are [B, 3, height, width].
"""

import numpy as np


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def layer_norm(x, epsilon=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotate(x, angle):
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
    return x * np.cos(angle)[:, None] + turned * np.sin(angle)[:, None]


def attend(q, k, v, visible=None):
    """[B, T, H, d] from fewer or as many key heads; `visible` [B, T, S]."""
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    if visible is not None:
        logits = np.where(visible[:, None], logits, -1e30)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, v).reshape(*q.shape[:2], -1)


def heads(x, dim):
    return x.reshape(*x.shape[:2], -1, dim)


def swiglu(w, name, x):
    hidden = silu(linear(w, f"{name}.gate_proj", x)) * linear(w, f"{name}.up_proj", x)
    return linear(w, f"{name}.down_proj", hidden)


def ff(w, name, x):
    return linear(w, f"{name}.net.2", gelu(linear(w, f"{name}.net.0.proj", x)))


def conv3(w, name, x, stride):
    """3x3 convolution with padding 1 of [B, D, h, w]."""
    kernel, padded = w[f"{name}.weight"], np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, columns = x.shape[2] // stride, x.shape[3] // stride
    out = w[f"{name}.bias"][None, :, None, None] + np.zeros((1, 1, rows, columns))
    for i in range(3):
        for j in range(3):
            part = padded[:, :, i : i + x.shape[2] : stride, j : j + x.shape[3] : stride]
            out = out + np.einsum("bchw,oc->bohw", part, kernel[:, :, i, j])
    return out


def angles(latents, rows, columns, scale, axes, theta):
    def axis(count):
        if scale is None:
            return np.arange(count)
        return np.arange(count) / max(count - 1, 1) * (scale - 1)

    ids = [(i, 0, 0) for i in range(latents)]
    ids += [(0, r, c) for r in axis(rows) for c in axis(columns)]
    parts = []
    for a, size in enumerate(axes):
        frequency = [theta ** (-2 * (j // 2) / size) for j in range(size)]
        parts.append(np.array(ids)[:, a, None] * frequency)
    return np.concatenate(parts, -1)


def trunk(w, bae, side, latent, image, scale):
    """Encoder or decoder blocks; latent [B, N, D], image [B, D, rows, columns]."""
    down = side == "encoder"
    changes, dim = bae["downsample_idx" if down else "upsample_idx"], bae[f"{side}_head_dim"]
    tokens = latent.shape[1]
    for i in range(bae[f"{side}_layers"]):
        name, (batch, width, rows, columns) = f"{side}.transformer_blocks.{i}", image.shape
        angle = angles(tokens, rows, columns, scale, bae["axes_dims_rope"], 1e4)
        x = np.concatenate([latent, image.reshape(batch, width, -1).swapaxes(1, 2)], 1)
        h = rms(x, w[f"{name}.input_layernorm.weight"])
        q, k, v = (heads(linear(w, f"{name}.attn.{p}_proj", h), dim) for p in "qkv")
        q = rotate(rms(q, w[f"{name}.attn.norm_q.weight"]), angle)
        k = rotate(rms(k, w[f"{name}.attn.norm_k.weight"]), angle)
        x = x + linear(w, f"{name}.attn.o_proj", attend(q, k, v))
        x = x + swiglu(w, f"{name}.mlp", rms(x, w[f"{name}.post_attention_layernorm.weight"]))
        latent, image = x[:, :tokens], x[:, tokens:].swapaxes(1, 2)
        image = image.reshape(batch, width, rows, columns)
        if i in changes and down:
            means = image.reshape(batch, width, rows // 2, 2, columns // 2, 2).mean((3, 5))
            image = means + conv3(w, f"encoder.down_layers.{changes.index(i)}.conv", image, 2)
            scale = None if scale is None else scale // 2
        elif i in changes:
            conv = conv3(w, f"decoder.up_layers.{changes.index(i)}.conv", image, 1)
            conv = conv.reshape(batch, width, 2, 2, rows, columns).transpose(0, 1, 4, 2, 5, 3)
            image = conv.reshape(batch, width, 2 * rows, 2 * columns) + np.repeat(
                np.repeat(image, 2, 2), 2, 3
            )
            scale = None if scale is None else scale * 2
    return latent, image


def encode(w, bae, scale, images):
    """Logits [B, N, K]; `scale` is bae_scale or None."""
    side = bae["patch_size"]
    batch, _, height, width = images.shape
    patches = images.reshape(batch, 3, height // side, side, width // side, side)
    x = np.einsum("bcrpsq,dcpq->bdrs", patches, w["encoder.patch_embedder.weight"])
    x = x + w["encoder.patch_embedder.bias"][None, :, None, None]
    latent = np.repeat(w["encoder.latent_tokens"], batch, 0)
    latent, _ = trunk(w, bae, "encoder", latent, x, scale and scale // side)
    latent = linear(w, "encoder.proj_out", rms(latent, w["encoder.norm_out.weight"]))
    return linear(w, "quantizer.proj.0", latent)


def decode(w, bae, scale, code, height, width):
    side, levels = bae["patch_size"], len(bae["upsample_idx"])
    rows, columns = height // side // 2**levels, width // side // 2**levels
    latent = rms(code @ w["quantizer.embed"], w["decoder.input_layer.0.weight"])
    latent = linear(w, "decoder.input_layer.1", latent)
    image = w["decoder.mask_tokens"].reshape(1, -1, 1, 1) * np.ones((len(code), 1, rows, columns))
    _, x = trunk(w, bae, "decoder", latent, image, scale and scale // side // 2**levels)
    x = linear(w, "to_pixel", rms(x.transpose(0, 2, 3, 1), w["decoder.norm_out.weight"]))
    x = x.reshape(len(code), height // side, width // side, side, side, 3)
    return x.transpose(0, 5, 1, 3, 2, 4).reshape(len(code), 3, height, width)


def joint_attention(w, name, h, features, visible, dim):
    text = linear(w, f"{name}.proj_cond", features)
    both = np.concatenate([text, h], 1)
    q = rms(heads(linear(w, f"{name}.attn.q_proj", h), dim), w[f"{name}.attn.norm_q.weight"])
    k = rms(heads(linear(w, f"{name}.attn.k_proj", both), dim), w[f"{name}.attn.norm_k.weight"])
    v = heads(linear(w, f"{name}.attn.v_proj", both), dim)
    return linear(w, f"{name}.attn.o_proj", attend(q, k, v, visible))


def diffusion(w, sizes, z, t, text, mask):
    """Flip logits; text [layers, B, L, Dt], mask [B, L]."""
    e = silu(linear(w, "time_embed.linear_2", silu(linear(w, "time_embed.linear_1", t[:, None]))))
    visible = np.concatenate([mask > 0, np.ones(z.shape[:2], bool)], 1)[:, None]
    x = linear(w, "x_embedder", z)
    for i in range(sizes["num_layers"]):
        name = f"transformer_blocks.{i}"
        parts = np.split(linear(w, f"{name}.norm1.linear", e)[:, None], 6, -1)
        h = layer_norm(x) * (1 + parts[1]) + parts[0] + w[f"{name}.pos_emb"]
        dim = sizes["attention_head_dim"]
        x = x + parts[2] * joint_attention(w, name, h, text[i], visible, dim)
        x = x + parts[5] * ff(w, f"{name}.ff", layer_norm(x) * (1 + parts[4]) + parts[3])
    scale, shift = np.split(linear(w, "norm_out.linear", e)[:, None], 2, -1)
    return linear(w, "proj_out", layer_norm(x) * (1 + scale) + shift)


def ar(w, sizes, z, text, mask):
    """Logits of the first T tokens from z [B, T - 1, K]."""
    split = np.repeat(w["split_token"], len(z), 0)
    x = np.concatenate([split, linear(w, "x_embedder", z)], 1)
    length = x.shape[1]
    causal = np.tril(np.ones((length, length), bool))
    visible = np.stack([np.concatenate([np.tile(m > 0, (length, 1)), causal], 1) for m in mask])
    for i in range(sizes["num_layers"]):
        name = f"transformer_blocks.{i}"
        h = rms(x, w[f"{name}.input_layernorm.weight"]) + w[f"{name}.pos_emb"][:, :length]
        x = x + joint_attention(w, name, h, text[i], visible, sizes["attention_head_dim"])
        x = x + ff(w, f"{name}.mlp", rms(x, w[f"{name}.post_attention_layernorm.weight"]))
    return linear(w, "proj_out", rms(x, w["norm_out.weight"]))


def olmo(w, config, ids, mask):
    """All hidden states [layers + 1, B, L, D]."""
    x = w["model.embed_tokens.weight"][ids]
    length, dim = ids.shape[1], config["hidden_size"] // config["num_attention_heads"]
    clip = config.get("clip_qkv") or np.inf
    frequency = np.tile(config.get("rope_theta", 1e4) ** (-np.arange(0, dim, 2) / dim), 2)
    angle = np.arange(length)[:, None] * frequency
    visible = np.tril(np.ones((length, length), bool)) & (mask > 0)[:, None]
    states = [x]
    for i in range(config["num_hidden_layers"]):
        name, h = f"model.layers.{i}", layer_norm(x, 1e-5)
        q, k, v = (
            heads(np.clip(linear(w, f"{name}.self_attn.{p}_proj", h), -clip, clip), dim)
            for p in "qkv"
        )
        mixed = attend(rotate(q, angle), rotate(k, angle), v, visible)
        x = x + linear(w, f"{name}.self_attn.o_proj", mixed)
        x = x + swiglu(w, f"{name}.mlp", layer_norm(x, 1e-5))
        states.append(x)
    states[-1] = layer_norm(x, 1e-5)
    return np.stack(states)


def guide(logits, guidance, temperature):
    conditional, unconditional = np.split(logits, 2)
    return ((1 + guidance) * conditional - guidance * unconditional) / temperature


def sample_diffusion(predict, uniforms, case):
    """Draws by `predict(z [2B, N, K], t [2B])`; returns z, probs (of each draw) and final."""
    steps, posterior = case["steps"], case["protocol"] == "protocal_2"
    t = [(1 - i / steps) ** case["rho"] for i in range(steps + 1)]
    probs = [np.full_like(uniforms[0], 0.5)]
    zs = []
    for i in range(steps):
        z = (uniforms[i] < probs[i]).astype(np.float64)
        zs.append(z)
        both = np.concatenate([z, z])
        flip = sigmoid(
            guide(predict(both, np.full(len(both), t[i])), case["guidance"], case["temp"])
        )
        p = z * (1 - flip) + (1 - z) * flip
        if not posterior:
            probs.append(p * (1 - t[i + 1]) + 0.5 * t[i + 1])
            continue
        weight = {}
        for value, clean, seen in ((1, p, z), (0, 1 - p, 1 - z)):
            noisy = clean * (1 - t[i + 1]) + 0.5 * t[i + 1]
            weight[value] = noisy * (seen - (t[i] - t[i + 1]) * (seen - 0.5))
        probs.append(weight[1] / (weight[1] + weight[0]))
    return np.stack(zs), np.stack(probs[:-1]), (p > 0.5).astype(np.float64)


def sample_ar(predict, uniforms, case):
    """Draws by `predict(z [2B, n, K]) -> [2B, n + 1, K]`; returns probs and final."""
    z, probs = np.zeros((len(uniforms), 0, uniforms.shape[-1])), []
    for n in range(uniforms.shape[1]):
        logits = predict(np.concatenate([z, z]))[:, -1]
        probs.append(sigmoid(guide(logits, case["guidance"], case["temp"])))
        z = np.concatenate([z, (uniforms[:, n] < probs[-1])[:, None]], 1)
    return np.stack(probs, 1), z
