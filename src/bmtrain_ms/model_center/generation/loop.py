"""Generating tokens with a key-value cache, on sharded parameters."""

from __future__ import annotations

import contextlib
import inspect
import reprlib
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from bmtrain_ms_base.checks import number, whole
from bmtrain_ms_base.random import key_of, uniform

from ...comm import all_ranks
from ...comm import world as current_world
from ...comm.agreement import gather_json
from ...compat.autograd import no_grad
from ...compat.cells import evaluating
from ...compat.runtime import from_host, host_array
from ...zero import unwritten
from ..layer import KeyValueCache
from .beams import Beams
from .sampling import choose, penalised

_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "most": (lambda x: x >= 1, "at least 1"),
    "temperature": (lambda x: x >= 0, "at least 0"),
    "top_k": (lambda x: x >= 0, "at least 0, which is all"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda x: x > 0, "above 0"),
}
_TOLD = {"most": "max_new_tokens", "beams": "num_beams", "sequences": "num_return_sequences"}


@dataclass(frozen=True)
class _Settings:
    """How `generate` goes on; see there."""

    most: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    beams: int
    length_penalty: float
    sequences: int
    ends: Any
    stop: Callable[[list[int]], bool] | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("most", "top_k", "beams", "sequences", "seed"):
            least = 1 if name in ("beams", "sequences") else None
            object.__setattr__(self, name, whole(_TOLD.get(name, name), getattr(self, name), least))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        ends = self.ends if isinstance(self.ends, Sequence) else [] if self.ends is None else [self.ends]
        object.__setattr__(self, "ends", tuple(whole("eos_id", x) for x in ends))
        for name, (fits, text) in _LIMITS.items():
            if not fits(getattr(self, name)):
                raise ValueError(f"{_TOLD.get(name, name)} must be {text}, not {getattr(self, name)}")
        if self.beams > 1 and self.temperature:
            raise ValueError("num_beams takes the most likely continuations: leave the temperature at 0")
        if self.beams > 1 and self.sequences > self.beams:
            raise ValueError(f"num_return_sequences={self.sequences} of num_beams={self.beams} cannot be returned")
        if self.beams == 1 and self.sequences > 1 and not self.temperature:
            raise ValueError("num_return_sequences would be the same each time: set a temperature, or num_beams")

    def ended(self, tokens: list[int]) -> bool:
        """Whether new tokens come to an end here."""
        return tokens[-1] in self.ends or (self.stop is not None and self.stop(tokens))


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    num_return_sequences: int = 1,
    eos_id: int | Sequence[int] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    seed: int = 0,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt. All ranks call it together, with as many new tokens; prompts may differ among ranks that are not of one
    pipeline, nor of one group of tensor-parallel ranks.

    Prompts of different lengths are padded on the left; what is padded is not looked at. The result does not depend on the number
    of ranks over which prompts are divided, nor on the other prompts' lengths beyond rounding: sampling draws by a row's place
    among those of all data-parallel ranks, so the same prompt on each of them has other continuations. Nobody may write parameters
    meanwhile, `on_token` and `stop` neither.

    Args:
        model: called as `CausalLM` is, with token ids, padding and a `KeyValueCache`.
        prompts: token ids, at least one each.
        max_new_tokens: at most so many; fewer where `eos_id` comes, which is kept, or `stop` says so.
        temperature, top_k, top_p, min_p: see `choose`; temperature 0, the default, is greedy.
        repetition_penalty: above 1 makes tokens less likely that a row has already, the prompt's included; see `penalised`.
        num_beams: search for the most likely continuation with so many at once; see `Beams`.
        length_penalty: of beams.
        num_return_sequences: so many continuations of each prompt, one behind the other in the result.
        eos_id: a token that ends a text, or several.
        stop: (new tokens) -> whether the text ends with the last of them; see `stop_strings`.
        seed: of the sampling.
        on_token: called with the (batch,) tokens of every step; not with beams, whose tokens are known at the end.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: an empty prompt, a token that the model does not have, or a setting out of range or without effect.
        TypeError: prompts that are not lists of token ids.
        FloatingPointError: the model computes NaN or infinity.
    """
    given = _checked(prompts, getattr(getattr(model, "config", None), "vocab_size", None))
    limits = temperature, top_k, top_p, min_p, repetition_penalty
    settings = _Settings(max_new_tokens, *limits, num_beams, length_penalty, num_return_sequences, eos_id, stop, seed)
    if on_token is not None and num_beams > 1:
        raise ValueError("on_token has no effect with num_beams: which tokens are kept is known at the end")
    with evaluating(model), unwritten(model) if isinstance(model, nn.Cell) else contextlib.nullcontext():
        return _beams(model, given, settings) if settings.beams > 1 else _sampled(model, given, settings, on_token)


def stop_strings(decode: Callable[[list[int]], str], strings: Sequence[str], longest: int = 64) -> Callable[[list[int]], bool]:
    """What `generate(stop=...)` takes, to end a text where one of these strings has been written.

    Args:
        decode: token ids -> text, of a tokenizer.
        strings: not empty, each.
        longest: so many of the last tokens are looked at.
    """
    if isinstance(strings, str) or not all(strings):
        raise ValueError(f"stop strings are a list of texts that are not empty, not {strings!r}")
    return lambda tokens: any(string in decode(tokens[-longest:]) for string in strings)


def _sampled(
    model: Any, prompts: list[np.ndarray], settings: _Settings, on_token: Callable[[np.ndarray], None] | None
) -> list[list[int]]:
    rows = [prompt for prompt in prompts for _ in range(settings.sequences)]
    results: list[list[int]] = [[] for _ in rows]
    done = np.zeros(len(rows), bool)
    first = _rows_before(len(rows)) if settings.temperature else 0
    for step, last in enumerate(steps := _Steps(model, rows, settings.most)):
        words = np.random.Philox(key=key_of(settings.seed, "sample", step)).random_raw(-(-(first + len(rows)) // 4) * 4)
        seen = [[*row, *new] for row, new in zip(rows, results)] if settings.repetition_penalty != 1.0 else []
        scores = penalised(last, seen, settings.repetition_penalty)
        draws = uniform(words[first : first + len(rows)])
        chosen = choose(scores, draws, settings.temperature, settings.top_k, settings.top_p, settings.min_p)
        steps.append(chosen)
        if on_token is not None:
            on_token(chosen)
        for i in np.flatnonzero(~done):
            results[i].append(int(chosen[i]))
            done[i] = settings.ended(results[i])
        if _all_done(settings, bool(done.all())):
            break
    return results


def _beams(model: Any, prompts: list[np.ndarray], settings: _Settings) -> list[list[int]]:
    rows = [prompt for prompt in prompts for _ in range(settings.beams)]
    candidates = max(2, 1 + len(settings.ends))
    searches = [
        Beams(settings.beams, settings.most, settings.length_penalty, settings.ended, candidates) for _ in range(len(prompts))
    ]
    for last in (steps := _Steps(model, rows, settings.most)):
        log_probabilities = last - last.max(-1, keepdims=True)
        log_probabilities -= np.log(np.exp(log_probabilities).sum(-1, keepdims=True))
        new = [tokens for search in searches for tokens in search.running]
        seen = [[*row, *tokens] for row, tokens in zip(rows, new)] if settings.repetition_penalty != 1.0 else []
        scores = penalised(log_probabilities, seen, settings.repetition_penalty)
        parts = np.split(scores, len(prompts))
        origins = [i * settings.beams + search.step(part) for i, (search, part) in enumerate(zip(searches, parts))]
        steps.reorder(np.concatenate(origins))
        steps.append(np.array([tokens[-1] for search in searches for tokens in search.running], np.int32))
        if _all_done(settings, all(search.done for search in searches)):
            break
    return [tokens for search in searches for tokens in search.best(settings.sequences)]


def _rows_before(own: int) -> int:
    """How many rows the data-parallel ranks before this one have: a row draws by its place among the rows of all."""
    world = current_world()
    counts = gather_json(own, world.along("dp"), "rows to sample")
    return sum(counts[: world.mesh.dp_rank])


def _all_done(settings: _Settings, done: bool) -> bool:
    """Whether every rank has come to an end; asked only where texts may end early."""
    if not settings.ends and settings.stop is None and settings.beams == 1:
        return False
    return all_ranks(current_world().everyone, done, "generation done")


class _Steps:
    """The model's logits for the next token, again and again, while tokens are appended."""

    def __init__(self, model: Any, prompts: Sequence[np.ndarray], most: int):
        self._model, self._most = model, most
        takes = inspect.signature(getattr(model, "construct", model)).parameters
        self._options = {"last_only": True} if "last_only" in takes else {}  # a model of one's own need not know it
        self._ids, self._real = _padded(prompts)
        self._has_padding = not self._real.all()
        self._cache = KeyValueCache(self._ids.shape[1] + most)

    def append(self, tokens: np.ndarray) -> None:
        """(batch,): what comes next."""
        self._ids = tokens[:, None]
        self._real = np.concatenate([self._real, np.ones((len(tokens), 1), bool)], 1)

    def reorder(self, rows: np.ndarray) -> None:
        """Have each row go on from another one."""
        self._real = self._real[rows]
        self._cache.reorder(rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        """(batch, vocab) float32 each."""
        for step in range(self._most):
            with no_grad():
                padding = from_host(self._real) if self._has_padding else None
                logits = self._model(from_host(self._ids), padding, self._cache, **self._options)
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
