"""Generating tokens with a key-value cache, on sharded parameters."""

from __future__ import annotations

import reprlib
from typing import Any, Callable, Iterator, Optional, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from bmtrain_ms_base.checks import number, whole
from bmtrain_ms_base.random import key_of, uniform

from ...comm import all_ranks, world
from ...compat.autograd import no_grad
from ...compat.runtime import from_host, host_array
from ..layer import KeyValueCache


def choose(logits: np.ndarray, draws: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Pick a token per row.

    Args:
        logits: (rows, vocab) float.
        draws: (rows,) in [0, 1), what decides; unused for temperature 0.
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens that together have this probability (Holtzman et al., 2020); at least one.

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
    probabilities /= probabilities.sum(-1, keepdims=True)
    before = np.cumsum(probabilities, -1) - probabilities
    probabilities[before >= top_p] = 0.0
    probabilities[:, 0] = np.maximum(probabilities[:, 0], np.finfo(np.float64).tiny)
    cumulative = np.cumsum(probabilities, -1)
    picked = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
    last = (probabilities > 0).sum(-1) - 1  # rounding must not pick a token that was ruled out
    return np.take_along_axis(order, np.minimum(picked, last)[:, None], -1)[:, 0].astype(np.int32)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: Optional[int] = None,
    seed: int = 0,
    on_token: Optional[Callable[[np.ndarray], None]] = None,
) -> list[list[int]]:
    """Continue each prompt. All ranks call it together, with as many new tokens; their prompts may differ.

    Prompts of different lengths are padded on the left; what is padded is not looked at. The result does not depend on the number
    of ranks, nor on the other prompts' lengths beyond rounding.

    Args:
        model: called as `Llama` is, with token ids, padding and a `KeyValueCache`.
        prompts: token ids, at least one each.
        max_new_tokens: at most so many; fewer where `eos_id` comes, which is kept.
        temperature, top_k, top_p: see `choose`; temperature 0, the default, is greedy.
        seed: of the sampling.
        on_token: called with the (batch,) tokens of every step.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an empty prompt, a token that the model does not have, or a setting out of range.
        TypeError: prompts that are not lists of token ids.
        FloatingPointError: the model computes NaN or infinity.
    """
    given = _checked(prompts, getattr(getattr(model, "config", None), "vocab_size", None))
    max_new_tokens, top_k, seed = whole("max_new_tokens", max_new_tokens), whole("top_k", top_k), whole("seed", seed)
    temperature, top_p = number("temperature", temperature), number("top_p", top_p)
    eos_id = None if eos_id is None else whole("eos_id", eos_id)
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"need temperature >= 0, top_k >= 0, 0 < top_p <= 1, max_new_tokens >= 1, not {temperature}, {top_k}, {top_p}, "
            f"{max_new_tokens}"
        )
    results: list[list[int]] = [[] for _ in given]
    done, training = np.zeros(len(given), bool), model.training
    model.set_train(False)
    try:
        for step, last in enumerate(steps := _Steps(model, given, max_new_tokens)):
            words = np.random.Philox(key=key_of(seed, "sample", step)).random_raw(-(-len(given) // 4) * 4)
            chosen = choose(last, uniform(words[: len(given)]), temperature, top_k, top_p)
            steps.append(chosen)
            if on_token is not None:
                on_token(chosen)
            for i in np.flatnonzero(~done):
                results[i].append(int(chosen[i]))
                done[i] = chosen[i] == eos_id
            if eos_id is not None and all_ranks(world().everyone, bool(done.all()), "generation done"):
                break
    finally:
        model.set_train(training)
    return results


class _Steps:
    """The model's logits for the next token, again and again, while tokens are appended."""

    def __init__(self, model: Any, prompts: Sequence[np.ndarray], most: int):
        self._model, self._most = model, most
        self._ids, self._real = _padded(prompts)
        self._has_padding = not self._real.all()
        self._cache = KeyValueCache(self._ids.shape[1] + most)

    def append(self, tokens: np.ndarray) -> None:
        """(batch,): what comes next."""
        self._ids = tokens[:, None]
        self._real = np.concatenate([self._real, np.ones((len(tokens), 1), bool)], 1)

    def __iter__(self) -> Iterator[np.ndarray]:
        """(batch, vocab) each."""
        for step in range(self._most):
            with no_grad():
                padding = from_host(self._real) if self._has_padding else None
                logits = self._model(from_host(self._ids), padding, self._cache)
            last = host_array(logits[:, -1].astype(ms.float32))
            _refuse_nan(last, step)
            yield last


def _padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(batch, length) int32, padded on the left, and bool, which are no padding."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int32)
    real = np.zeros((len(prompts), longest), bool)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = prompt
        real[i, longest - len(prompt) :] = True
    return ids, real


def _refuse_nan(logits: np.ndarray, step: int) -> None:
    if not np.isfinite(logits.max(-1)).all():  # tokens that are ruled out may have -inf
        raise FloatingPointError(
            f"the logits for new token {step} are not finite: no token follows from them. Are the parameters? "
            "(a checkpoint saved after the loss became NaN, or values beyond float16)"
        )


def _checked(prompts: Any, vocab_size: int | None) -> list[np.ndarray]:
    """The prompts as arrays of token ids."""
    checked = []
    for i, prompt in enumerate(prompts):
        tokens = host_array(prompt) if isinstance(prompt, Tensor) else np.asarray(prompt)
        if tokens.ndim != 1:
            raise TypeError(f"prompts are lists of token ids, one list each: prompt {i} is {reprlib.repr(prompt)}")
        if not tokens.size:
            raise ValueError("every prompt needs at least one token; begin with the tokenizer's start token")
        if tokens.dtype.kind not in "iu":
            raise TypeError(f"prompts are whole numbers, ids of a tokenizer: prompt {i} has {reprlib.repr(tokens.tolist())}")
        wrong = tokens[(tokens < 0) | (tokens >= (vocab_size or 1 << 31))]
        if wrong.size:
            limit = f"ids from 0 to {vocab_size - 1}: was it made by another tokenizer?" if vocab_size else "no such ids"
            raise ValueError(f"prompt {i} has the token {wrong[0]}, and the model {limit}")
        checked.append(tokens)
    if not checked:
        raise ValueError("every prompt needs at least one token, and there is no prompt")
    return checked
