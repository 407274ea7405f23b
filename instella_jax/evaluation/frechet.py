"""Distances of two sets of features: Frechet distance, precision and recall.

Axes: n pictures, d numbers in a feature.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from instella_jax.errors import UserError

# Rows of distances computed at a time.
_ROWS = 2_048


@dataclasses.dataclass
class Statistics:
    """Mean and scatter of features, in float64, as they come.

    Attributes:
      count: n so far.
      mean: [d].
      scatter: sum of the outer products of what is left without the mean, [d, d].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, width: int) -> Statistics:
        """Return those of no features."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    def add(self, features: np.ndarray) -> None:
        """Take in features [n, d]."""
        rows = features.astype(np.float64)
        mean = rows.mean(0)
        self.merge(Statistics(len(rows), mean, (rows - mean).T @ (rows - mean)))

    def merge(self, other: Statistics) -> None:
        """Take in others (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if not other.count:
            return
        step = other.mean - self.mean
        self.scatter = (
            self.scatter + other.scatter + np.outer(step, step) * (self.count * other.count / count)
        )
        self.mean = self.mean + step * (other.count / count)
        self.count = count

    @property
    def covariance(self) -> np.ndarray:
        """The covariance [d, d], divided by n - 1.

        Raises:
          UserError: there are not two features.
        """
        if self.count < 2:
            raise UserError(f"a covariance of {self.count} picture(s): at least 2 are needed")
        return self.scatter / (self.count - 1)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return |ma - mb|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)) in float64.

    The trace of the root is that of (Ca^(1/2) Cb Ca^(1/2))^(1/2), which is symmetric: no imaginary
    part to drop, and nothing to add to a diagonal where there are few pictures.
    """
    root = _root(a.covariance)
    inner = root @ b.covariance @ root
    values = np.linalg.eigvalsh((inner + inner.T) / 2)
    # What rounding makes of zeros would count by its root, which is far larger.
    tiny = values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    shared = np.sqrt(np.where(values > tiny, values, 0)).sum()
    step = a.mean - b.mean
    return float(step @ step + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


@jax.jit
def _squares(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return squared distances [n, m]."""
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)
    return jnp.maximum(norms - 2 * product, 0)


def _parts(features: np.ndarray) -> list[np.ndarray]:
    return np.array_split(features, -(-len(features) // _ROWS))


def _radii(features: np.ndarray, nearest: int) -> np.ndarray:
    """Return the squared distance [n] of each feature to its k-th nearest other one."""
    rows = [
        np.partition(np.asarray(_squares(part, features)), nearest, axis=1)[:, nearest]
        for part in _parts(features)
    ]
    return np.concatenate(rows)


def _share_inside(features: np.ndarray, others: np.ndarray, radii: np.ndarray) -> float:
    """Return the share of features that lie in the ball of at least one of the others."""
    inside = [(np.asarray(_squares(p, others)) <= radii).any(1) for p in _parts(features)]
    return float(np.concatenate(inside).mean())


def precision_recall(
    real: np.ndarray, generated: np.ndarray, nearest: int = 3
) -> tuple[float, float]:
    """Return precision and recall (Kynkaanniemi et al., 2019), each in [0, 1].

    Args:
      real: features [n, d].
      generated: features [m, d].
      nearest: which neighbour's distance is a feature's radius.

    Raises:
      UserError: there are too few pictures.
    """
    if min(len(real), len(generated)) <= nearest:
        raise UserError(f"precision and recall need more than {nearest} pictures on both sides")
    # Moved together: distances stay, and float32 loses less.
    centre = real.mean(0)
    real, generated = real - centre, generated - centre
    precision = _share_inside(generated, real, _radii(real, nearest))
    recall = _share_inside(real, generated, _radii(generated, nearest))
    return precision, recall
