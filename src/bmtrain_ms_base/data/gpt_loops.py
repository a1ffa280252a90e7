"""Loops over samples that are compiled; importing this imports numba."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled


@compiled()
def blend(weights: np.ndarray, which: np.ndarray, numbers: np.ndarray) -> None:
    """Fill `which`, int16, and `numbers`, int64, of a blend by float64 weights that sum to 1."""
    counts = np.zeros(len(weights), np.int64)
    for i in range(len(which)):
        wanted = max(float(i), 1.0)
        best = 0
        most = weights[0] * wanted - float(counts[0])
        for k in range(1, len(weights)):
            behind = weights[k] * wanted - float(counts[k])
            if behind > most:  # of equal ones the first
                best, most = k, behind
        which[i] = best
        numbers[i] = counts[best]
        counts[best] += 1
