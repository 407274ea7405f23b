"""Softmax attention and its gradients written out in numpy, and what to try them on.

Axes: B batch, T queries, S keys, H heads, G heads of the keys, d head width.
"""

import jax
import jax.numpy as jnp
import numpy as np


def inputs(batch, queries, keys, heads, groups, dim=16, dtype=jnp.float32):
    shapes = (batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, dim)
    ks = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(ks, shapes, strict=True)]


def masks(kind, batch, queries, keys):
    """Of no keys, of padding that hides all of the first row, and of what comes later."""
    if kind == "none":
        return None
    if kind == "padding":
        return (jnp.arange(keys) >= keys - 5 * jnp.arange(batch)[:, None])[:, None, None]
    return jnp.tril(jnp.ones((queries, keys), bool), -1)[None, None]


def of_heads(q, k, v, mask):
    """Yields batch, head, head of the keys, and that head's weights [T, S]."""
    batch, queries, heads, dim = q.shape
    if mask is not None:
        mask = np.broadcast_to(mask, (batch, 1, queries, k.shape[1]))[:, 0]
    for b in range(batch):
        for h in range(heads):
            shared = h * k.shape[2] // heads
            logits = q[b, :, h] @ k[b, :, shared].T / np.sqrt(dim)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            if mask is not None:
                blind = ~mask[b].any(-1, keepdims=True)
                weights = np.where(blind, 1.0, weights * mask[b])
            yield b, h, shared, weights / weights.sum(-1, keepdims=True)


def float64(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def written_out(q, k, v, mask):
    """The result [B, T, H * d]."""
    q, k, v = float64(q, k, v)
    out = np.zeros_like(q)
    for b, h, shared, weights in of_heads(q, k, v, mask):
        out[b, :, h] = weights @ v[b, :, shared]
    return out.reshape(*q.shape[:2], -1)


def gradients(q, k, v, mask, of_result):
    """Gradients of the sum of the result times `of_result` [B, T, H * d]."""
    q, k, v, of_result = float64(q, k, v, of_result)
    of_result = of_result.reshape(q.shape)
    of_q, of_k, of_v = (np.zeros_like(x) for x in (q, k, v))
    for b, h, shared, weights in of_heads(q, k, v, mask):
        of_weights = of_result[b, :, h] @ v[b, :, shared].T
        of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
        of_logits /= np.sqrt(q.shape[-1])
        of_q[b, :, h] = of_logits @ k[b, :, shared]
        of_k[b, :, shared] += of_logits.T @ q[b, :, h]
        of_v[b, :, shared] += weights.T @ of_result[b, :, h]
    return of_q, of_k, of_v
