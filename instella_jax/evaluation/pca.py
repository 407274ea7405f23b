"""A classical codec to compare the tokenizer with: principal components, scalar quantizers.

Axes: n pictures, d numbers in a picture, m components.
"""

import heapq

import numpy as np
import scipy.linalg


def lloyd_max(values: np.ndarray, levels: int, rounds: int = 30) -> np.ndarray:
    """Fit the levels of a scalar quantizer to values [n]: sorted levels [levels]."""
    centres = np.quantile(values, (np.arange(levels) + 0.5) / levels)
    for _ in range(rounds):
        cell = quantize(values, centres)
        count = np.bincount(cell, minlength=levels)
        total = np.bincount(cell, values, minlength=levels)
        centres = np.sort(np.where(count > 0, total / np.maximum(count, 1), centres))
    return centres


def quantize(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return index of the nearest of sorted centres for values [n]: int [n]."""
    return np.searchsorted((centres[1:] + centres[:-1]) / 2, values)


def components(centred: np.ndarray, most: int) -> np.ndarray:
    """Return the `most` leading principal components [m, d] of centred pictures [n, d].

    The largest comes first. Directions without energy are left out: they are noise, and not at
    right angles to the others.
    """
    # The n x n problem has the same components as the d x d one.
    of_pictures = len(centred) < centred.shape[1]
    products = centred @ centred.T if of_pictures else centred.T @ centred
    size = len(products)
    energies, vectors = scipy.linalg.eigh(
        products, subset_by_index=(max(0, size - most), size - 1), overwrite_a=True
    )
    kept = vectors[:, energies > 1e-6 * energies[-1]][:, ::-1]
    directions = kept.T @ centred if of_pictures else kept.T
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


class PcaCodec:
    """Pictures in a fixed number of bits: each bit goes where it lowers the error most."""

    def __init__(self, pictures: np.ndarray, bits: int):
        """Fit mean, components, quantizers and the share of bits.

        Args:
          pictures: training pictures [n, d], n at least a few times the number of components.
          bits: bits per picture.
        """
        self.mean = pictures.mean(0)
        centred = (pictures - self.mean).astype(np.float32)
        self.components = components(centred, bits)
        count = len(self.components)
        coefficients = centred @ self.components.T
        self.levels = [np.zeros(1)] * count
        queue = []
        for index in range(count):
            self._offer(queue, coefficients[:, index], index, 1)
        for _ in range(bits):
            _, index, centres = heapq.heappop(queue)
            self.levels[index] = centres
            self._offer(queue, coefficients[:, index], index, int(np.log2(len(centres))) + 1)

    def _offer(self, queue: list, values: np.ndarray, index: int, bits: int) -> None:
        """Queue one bit more for a component, by what it would save."""
        centres = lloyd_max(values, 2**bits)
        old = self.levels[index]
        now, then = (np.mean((values - c[quantize(values, c)]) ** 2) for c in (old, centres))
        heapq.heappush(queue, (then - now, index, centres))

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Code and decode pictures [n, d]."""
        coefficients = (pictures - self.mean) @ self.components.T
        coded = [c[quantize(x, c)] for x, c in zip(coefficients.T, self.levels, strict=True)]
        return self.mean + np.stack(coded, axis=1) @ self.components
