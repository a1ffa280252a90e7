"""Choosing the next token of logits."""

from __future__ import annotations

from typing import Sequence

import numpy as np


def choose(
    logits: np.ndarray, draws: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Pick a token per row.

    Args:
        logits: (rows, vocab) float.
        draws: (rows,) in [0, 1), what decides; unused for temperature 0.
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens that together have this probability (Holtzman et al., 2020); at least one.
        min_p: only tokens that are at least so many times as likely as the most likely one (Nguyen et al., 2024).

    Returns:
        (rows,) int32.
    """
    if temperature == 0.0:
        return logits.argmax(-1).astype(np.int32)
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    probabilities = np.exp(np.take_along_axis(scaled, order, -1) - scaled.max(-1, keepdims=True))
    if top_k:
        probabilities[:, top_k:] = 0.0
    probabilities[probabilities < min_p] = 0.0  # the first one is 1 here
    probabilities /= probabilities.sum(-1, keepdims=True)
    before = np.cumsum(probabilities, -1) - probabilities
    probabilities[before >= top_p] = 0.0
    probabilities[:, 0] = np.maximum(probabilities[:, 0], np.finfo(np.float64).tiny)
    cumulative = np.cumsum(probabilities, -1)
    picked = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
    last = (probabilities > 0).sum(-1) - 1  # rounding must not pick a token that was ruled out
    return np.take_along_axis(order, np.minimum(picked, last)[:, None], -1)[:, 0].astype(np.int32)


def penalised(scores: np.ndarray, seen: Sequence[Sequence[int]], penalty: float) -> np.ndarray:
    """Scores (rows, vocab) of tokens that a row has already: divided by the penalty where positive, multiplied with it where
    negative (Keskar et al., 2019)."""
    if penalty == 1.0:
        return scores
    scores = scores.copy()
    for row, tokens in zip(scores, seen):
        there = np.unique(np.asarray(tokens, np.int64))
        row[there] = np.where(row[there] > 0, row[there] / penalty, row[there] * penalty)
    return scores
