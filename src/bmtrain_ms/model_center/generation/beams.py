"""Beam search: several continuations of a prompt at once, of which the most likely ones go on.

As transformers has it (`generate(num_beams=...)`, `early_stopping=False`), token for token.
"""

from __future__ import annotations

from typing import Callable

import numpy as np

_NEVER = -1e9  # a score that is worse than any


class Beams:
    """The search for one prompt.

    Args:
        beams: how many continuations go on.
        most: tokens that a continuation may have.
        length_penalty: scores of ended continuations are divided by length ** length_penalty; above 0 longer ones gain.
        ended: (new tokens) -> whether a continuation has come to its end.
        candidates: per step and beam; more than one, for those that end.
    """

    def __init__(self, beams: int, most: int, length_penalty: float, ended: Callable[[list[int]], bool], candidates: int):
        self._beams, self._most, self._penalty, self._ended = beams, most, length_penalty, ended
        self._candidates = candidates * beams
        self.running: list[list[int]] = [[] for _ in range(beams)]
        self._scores = np.array([0.0] + [_NEVER] * (beams - 1), np.float32)
        self._finished: list[tuple[float, list[int]]] = []
        self.done = False

    def step(self, log_probabilities: np.ndarray) -> np.ndarray:
        """Take the log probabilities (beams, vocab) of what comes next.

        Returns:
            (beams,) of int: which beam each one goes on from; its new token is the last one of `running`.
        """
        vocab = log_probabilities.shape[1]
        total = (log_probabilities.astype(np.float32) + self._scores[:, None]).reshape(-1)
        best = np.argsort(-total, kind="stable")[: self._candidates]
        sequences = [[*self.running[i // vocab], int(i % vocab)] for i in best]
        over = [len(x) >= self._most or self._ended(x) for x in sequences]
        length = len(sequences[0])
        going = np.argsort(-(total[best] + np.where(over, np.float32(_NEVER), np.float32(0.0))), kind="stable")[: self._beams]
        if not self.done:
            ended = [(float(total[best[i]]) / length**self._penalty, sequences[i]) for i in range(self._beams) if over[i]]
            self._finished = sorted([*self._finished, *ended], key=lambda x: -x[0])[: self._beams]
        self.running = [sequences[i] for i in going]
        self._scores = (total[best] + np.where(over, np.float32(_NEVER), np.float32(0.0)))[going]
        worst = self._finished[-1][0] if len(self._finished) == self._beams else _NEVER
        self.done = self.done or not float(self._scores[0]) / length**self._penalty > worst or all(over)
        return best[going] // vocab

    def best(self, number: int) -> list[list[int]]:
        """The new tokens of the best continuations, best first."""
        found = [tokens for _, tokens in self._finished]
        return (found + [tokens for tokens in self.running if tokens not in found])[:number]
