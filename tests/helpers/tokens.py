"""Tokens that others' tools have made indexes of."""

from __future__ import annotations


def golden_c() -> list[list[int]]:
    """Twenty documents, the i-th of (7 i) % 11 + 2 tokens, which count up from 0 through all of them."""
    documents, first = [], 0
    for i in range(20):
        length = (7 * i) % 11 + 2
        documents.append(list(range(first, first + length)))
        first += length
    return documents
