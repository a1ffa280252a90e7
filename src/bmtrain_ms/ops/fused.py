"""Attention by MindSpore's fused operation for Ascend, which takes no memory for all pairs of tokens (Dao et al., 2022).

[Note: fused attention]
`ops.flash_attention_score` has conditions: 16-bit types, heads of a multiple of 16 elements up to 512, values as wide as keys, no
soft cap. Narrow heads get zeros, which change no score, and whose results are cut off; where another condition is not met,
`attention` says None, and the plain form is used. Which form of mask it is given:

* all that is not later: the compressed one, 2048 x 2048 whatever the length (`sparse_mode=3`, aligned to the last query and key);
* packed documents: tokens of all rows in one line (TND), with the *cumulative ends* of documents, without a leading 0, and the
  compressed mask for each; up to 1024 documents that lie in one piece each;
* padding, windows, and other documents: a byte for each pair, 1 where a key is *hidden* (`sparse_mode=1`). There every query sees
  itself, also one that is padding: what the operation makes of a query that sees nothing is not documented.

A rehearsal runs `Rehearsed`, which refuses what the documentation of MindSpore 2.5 and 2.10 does not allow.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any, Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from bmtrain_ms_base.launchers import FUSED_ATTENTION

from ..compat.autograd import no_grad
from ..compat.device import on_host, rehearsed
from ..compat.runtime import from_host, host_array
from .seen import NOT_SEEN, Seen

WIDEST, MULTIPLE, DOCUMENTS, COMPRESSED = 512, 16, 1024, 2048
HALVES = (ms.bfloat16, ms.float16)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Seen | None, scale: float, softcap: float | None) -> Tensor | None:
    """See `bmtrain_ms.ops.attention`; None where the fused operation cannot do it, see [Note: fused attention]."""
    fused = operation()
    if fused is None or softcap is not None or isinstance(mask, Tensor) or q.dtype not in HALVES:
        return None
    if max(q.shape[-1], v.shape[-1]) > WIDEST or v.shape[-1] > q.shape[-1]:
        return None
    batch, groups, rows, dim = q.shape
    queries = rows if mask is None else mask.queries
    q = q.reshape(batch, groups * (rows // queries), queries, dim)
    wide = -(-dim // MULTIPLE) * MULTIPLE
    width = v.shape[-1]
    q, k, v = (_widened(x, wide) for x in (q, k, v))
    ends = None if mask is None else mask.ends(DOCUMENTS)
    if ends is not None:
        out = fused(*map(_in_one_line, (q, k, v)), q.shape[1], **_documents(ends), scalar_value=scale, input_layout="TND")
        out = out.reshape(batch, queries, q.shape[1], wide).swapaxes(1, 2)
    else:
        out = fused(q, k, v, q.shape[1], **_mask(mask), scalar_value=scale, input_layout="BNSD")
    return out[..., :width].reshape(batch, groups, rows, width)


def operation() -> Callable[..., Tensor] | None:
    """MindSpore's on Ascend, its stand-in in a rehearsal; None on the host, and where the environment says 0.

    Raises:
        ValueError: the environment's variable is neither 1 nor 0.
    """
    if on_host():
        return None
    word = os.environ.get(FUSED_ATTENTION, "1")
    if word not in ("", "0", "1"):
        raise ValueError(f"{FUSED_ATTENTION}={word!r}: write 0 for attention without flash_attention_score, or 1")
    if word == "0":
        return None
    return stand_in if rehearsed() else ops.flash_attention_score


def _widened(x: Tensor, width: int) -> Tensor:
    """x with zeros behind its last dim."""
    missing = width - x.shape[-1]
    return x if missing == 0 else ops.cat((x, ops.zeros((*x.shape[:-1], missing), x.dtype)), -1)


def _in_one_line(x: Tensor) -> Tensor:
    """(batch, heads, length, dim) -> (batch * length, heads, dim)."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _documents(ends: Sequence[int]) -> dict[str, Any]:
    return {"attn_mask": _triangle(), "actual_seq_qlen": ends, "actual_seq_kvlen": ends, "next_tokens": 0, "sparse_mode": 3}


def _mask(mask: Seen | None) -> dict[str, Any]:
    if mask is None or (mask.causal and mask.queries == 1):
        return {}
    if mask.causal:
        return {"attn_mask": _triangle(), "sparse_mode": 3}
    return {"attn_mask": mask.hidden(), "sparse_mode": 1}


@functools.lru_cache(maxsize=1)
def _triangle() -> Tensor:
    with no_grad():
        return from_host(np.triu(np.ones((COMPRESSED, COMPRESSED), np.uint8), 1))


def stand_in(*given: Any, **named: Any) -> Tensor:
    """What `flash_attention_score` returns, by its documentation, of plain operations; for rehearsals.

    Raises:
        TypeError: the call does not bind to the signature of the installed MindSpore.
        ValueError: what the documentation does not allow, or nobody here asks for.
    """
    bound = inspect.signature(ops.flash_attention_score).bind(*given, **named)
    bound.apply_defaults()
    asked = bound.arguments
    _refuse(asked)
    q, k, v = (asked[name] for name in ("query", "key", "value"))
    packed = asked["input_layout"] == "TND"
    if packed:
        q, k, v = (x.swapaxes(0, 1).expand_dims(0) for x in (q, k, v))
    batch, heads, queries, dim = q.shape
    groups, keys = k.shape[1:3]
    shape = batch, groups, heads // groups * queries, dim
    scores = ops.matmul(q.reshape(shape).astype(ms.float32), k.astype(ms.float32).swapaxes(-1, -2)) * asked["scalar_value"]
    scores = scores.reshape(batch, heads, queries, keys)
    with no_grad():
        hidden = from_host(np.ascontiguousarray(_hidden(asked, queries, keys).astype(np.float32) * NOT_SEEN))
    weights = ops.softmax(scores + hidden, -1).reshape(*shape[:-1], keys)
    out = ops.matmul(weights, v.astype(ms.float32)).reshape(q.shape).astype(q.dtype)
    return out[0].swapaxes(0, 1) if packed else out


def _hidden(asked: dict[str, Any], queries: int, keys: int) -> np.ndarray:
    """(..., queries, keys) bool, of the mask that was asked for."""
    if asked["attn_mask"] is None:
        return np.zeros((queries, keys), bool)
    if asked["sparse_mode"] == 1:
        return host_array(asked["attn_mask"]).astype(bool)
    if asked["input_layout"] == "BNSD":
        return np.triu(np.ones((queries, keys), bool), keys - queries + 1)
    hidden, start = np.ones((queries, keys), bool), 0
    for end in asked["actual_seq_qlen"]:
        hidden[start:end, start:end] = np.triu(np.ones((end - start, end - start), bool), 1)
        start = end
    return hidden


def _refuse(asked: dict[str, Any]) -> None:
    q, k, v, mask, mode = (asked[name] for name in ("query", "key", "value", "attn_mask", "sparse_mode"))
    packed = asked["input_layout"] == "TND"
    heads = 1 if packed or asked["input_layout"] == "BNSD" else -1
    ends = asked["actual_seq_qlen"], asked["actual_seq_kvlen"]
    square = mask is not None and tuple(mask.shape) == (COMPRESSED, COMPRESSED)
    upper = host_array(_triangle())
    whole = {(q.shape[-2], k.shape[-2]), (q.shape[0], 1, q.shape[-2], k.shape[-2])}
    wrong = {
        "another layout than BNSD and TND": heads < 0,
        "types other than float16 and bfloat16, or several": q.dtype not in HALVES or not q.dtype == k.dtype == v.dtype,
        "keys and values of different shapes": k.shape != v.shape,
        "another number of dims": not q.ndim == k.ndim == (3 if packed else 4),
        "another head_num than the query's": asked["head_num"] != q.shape[heads],
        "heads that those of keys do not divide": q.shape[heads] % k.shape[heads] != 0,
        "heads of a size that is no multiple of 16 up to 512": q.shape[-1] % MULTIPLE != 0 or q.shape[-1] > WIDEST,
        "a mask of another type than bool or uint8": mask is not None and mask.dtype not in (ms.bool_, ms.uint8),
        "a mask in a mode without one, or none in one": (mask is None) != (mode == 0),
        "another mode than 0, 1 and 3": mode not in (0, 1, 3),
        "a mask that is not the compressed triangle": mode == 3 and not (square and np.array_equal(host_array(mask), upper)),
        "a mask that is not of all pairs": mode == 1 and tuple(mask.shape) not in whole,
        "ends without packed rows, or packed rows without": ends.count(None) != (0 if packed else 2),
        "packed rows without the compressed triangle": packed and mode != 3,
        "ends that are not those of all tokens": packed and None not in ends and not _are_ends(ends, q.shape[0], k.shape[0]),
        "packed rows in which later tokens are seen": packed and asked["next_tokens"] != 0,
        "dropout": asked["keep_prob"] != 1.0 or asked["drop_mask"] is not None,
        "what is not used here": any(asked[name] is not None for name in ("real_shift", "padding_mask", "prefix")),
    }
    found = [what for what, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ValueError(f"flash_attention_score was asked for {' and '.join(found)}: a fault of bmtrain_ms")


def _are_ends(ends: Sequence[Sequence[int]], *totals: int) -> bool:
    each = [list(x) for x in ends]
    rising = all(a < b for x in each for a, b in zip([0, *x], x))
    return rising and len(each[0]) == len(each[1]) <= DOCUMENTS and [x[-1] for x in each] == list(totals)
