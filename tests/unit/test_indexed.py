"""Megatron's .bin and .idx: the same bytes, and a clear error for anything else. No MindSpore here."""

from __future__ import annotations

import hashlib
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtrain_ms_base.data import indexed
from bmtrain_ms_base.data.indexed import IndexedError, IndexedFile, IndexedWriter, token_type
from tests.helpers.tokens import golden_c

# Golden bytes: written by Megatron-LM core_r0.6.0's IndexedDatasetBuilder.
INDEX_A = (
    "4d4d4944494458000001000000000000000803000000000000000400000000000000"
    "030000000100000002000000"
    "000000000000000006000000000000000800000000000000"
    "0000000000000000010000000000000002000000000000000300000000000000"
)


def write(path: Path, documents: Sequence[Sequence[int]], dtype: str) -> IndexedFile:
    with IndexedWriter(path, dtype) as out:
        for ids in documents:
            out.add(ids)
    return IndexedFile(path)


def sha(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_golden_16_bits(tmp_path):
    write(tmp_path / "a", [[1, 2, 3], [40000], [5, 6]], "uint16")
    assert (tmp_path / "a.bin").read_bytes().hex() == "010002000300409c05000600"
    assert (tmp_path / "a.idx").read_bytes().hex() == INDEX_A
    assert sha(f"{tmp_path}/a.idx") == "1c8fe6f3727b2b1f50f9d9f1c8ac39414f04463fc33c45feb10b3dfd564cc8e2"


def test_golden_32_bits(tmp_path):
    write(tmp_path / "b", [[1, 2, 3], [70000], [5, 6]], "int32")
    assert sha(f"{tmp_path}/b.bin") == "001f7f2dafcfaf9544852b72b6a94d415d37089b6937b34aaa7954a3545f52fe"
    assert sha(f"{tmp_path}/b.idx") == "3058cb4b397c35fd3c28ad46de96ef68cbad794fb616e3338494e9893cf6628f"


def test_golden_twenty_documents(tmp_path):
    file = write(tmp_path / "c", golden_c(), "uint16")
    assert file.lengths.tolist() == [2, 9, 5, 12, 8, 4, 11, 7, 3, 10, 6, 2, 9, 5, 12, 8, 4, 11, 7, 3]
    assert sha(f"{tmp_path}/c.bin") == "25f65b1876456bd85139ae50cf0438d025d7e469b22fd1fb54636c7eaf3de83c"
    assert sha(f"{tmp_path}/c.idx") == "b74c80dfb3e73b71de6f08065eca5d7a10388b4fbeb366cf3d139b0c021a38dd"
    assert (file.tokens, file.documents, len(file)) == (138, 20, 20)


@pytest.mark.parametrize("vocab, name", [(1, "uint16"), (65499, "uint16"), (65500, "int32"), (131072, "int32")])
def test_the_type_is_megatrons(vocab, name):
    assert token_type(vocab) == np.dtype(name)


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=4), max_size=8),
    dtype=st.sampled_from(["uint8", "int16", "uint16", "int32", "int64"]),
)
def test_what_was_written_is_read(tmp_path_factory, documents, dtype):
    """Also empty ones, and documents of several sequences."""
    documents = [[[x % 128 for x in sequence] for sequence in document] for document in documents]
    path = tmp_path_factory.mktemp("indexed") / "x"
    with IndexedWriter(path, dtype) as out:
        for sequences in documents:
            out.add([x for sequence in sequences for x in sequence], [len(sequence) for sequence in sequences])
    with IndexedFile(f"{path}.bin") as file:
        flat = [sequence for document in documents for sequence in document]
        assert file.dtype == np.dtype(dtype)
        assert [file.read(i).tolist() for i in range(len(file))] == flat
        assert np.diff(file.ends).tolist() == [len(document) for document in documents]
        assert file.span(0, file.tokens).tolist() == [x for sequence in flat for x in sequence]
    assert sorted(os.listdir(path.parent)) == ["x.bin", "x.idx"]


def test_offsets_beyond_32_bits(tmp_path, monkeypatch):
    """Lengths are int32; a sum of them that is too would overflow."""
    lengths = [np.full(3, 2**30, np.int32), np.full(2, 7, np.int32)]
    indexed.write_index(tmp_path / "x.idx", np.dtype("int32"), lambda: lengths, lambda: [np.ones(5, np.int32)])
    offsets = np.frombuffer((tmp_path / "x.idx").read_bytes(), "<i8", 5, 34 + 20)
    assert offsets.tolist() == [0, 2**32, 2**33, 3 * 2**32, 3 * 2**32 + 28]


def test_a_part_of_a_sequence(tmp_path):
    file = write(tmp_path / "x", [[1, 2, 3], [4, 5, 6, 7]], "int32")
    assert file.read(1, 1, 3).tolist() == [5, 6] and file.read(1, 4).tolist() == []
    with pytest.raises(IndexError, match=r"sequence 1 of .*x has 4 tokens, not from 2 to 5"):
        file.read(1, 2, 5)
    with pytest.raises(IndexError, match=r"x has 2 sequences; there is no 2"):
        file.read(2)


def test_ids_that_the_type_cannot_hold(tmp_path):
    with pytest.raises(IndexedError, match="up to 70000 does not fit into uint16"), IndexedWriter(tmp_path / "x", "uint16") as out:
        out.add([1, 70000])
    wrong = pytest.raises(IndexedError, match=r"a document of 2 tokens cannot have sequences of \[1\]")
    with wrong, IndexedWriter(tmp_path / "x", "uint16") as out:
        out.add([1, 2], [1])
    with pytest.raises(IndexedError, match="tokens cannot be kept as float32"):
        IndexedWriter(tmp_path / "x", "float32")
    assert not os.listdir(tmp_path)


def test_nothing_is_there_before_all_is(tmp_path):
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "x", "uint16") as out:
        out.add([1])
        assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.idx"))
        raise KeyError
    assert not os.listdir(tmp_path)
    write(tmp_path / "x", [[1]], "uint16")
    with pytest.raises(IndexedError, match=r"x\.bin is there already: delete it, or choose another name"):
        IndexedWriter(tmp_path / "x", "uint16")


def header(version: int = 1, code: int = 8, sequences: int = 0, ends: int = 1) -> bytes:
    return struct.pack("<9sQBQQ", indexed.MAGIC, version, code, sequences, ends)


@pytest.mark.parametrize(
    "index, text",
    [
        (b"", "does not begin as Megatron's indexes do"),
        (b"TNTIDX\0\0" + bytes(40), "does not begin as Megatron's indexes do"),
        (header(version=2) + bytes(8), "is of version 2; only 1 is known"),
        (header(code=7) + bytes(8), "says that tokens are float32; token ids are whole numbers"),
        (header(code=99) + bytes(8), "has the unknown type 99"),
        (header(sequences=2**63), r"has 34 bytes, where 9,223,372,036,854,775,808 sequences and 1 ends of documents take"),
        (header(ends=0), "has no ends of documents"),
        (header() + struct.pack("<q", 3), "has documents from 3 to 3 of 0 sequences"),
        (header(sequences=1) + struct.pack("<iqq", -1, 0, 1), "has a sequence of negative length, 0"),
        (header(sequences=1) + struct.pack("<iqq", 0, 5, 1), "has sequence 0 at another offset than lengths say"),
        (header(sequences=1, ends=3) + struct.pack("<iqqqq", 0, 0, 0, 2, 1), "has a document that ends before it begins"),
    ],
)
def test_what_is_no_index(tmp_path, index, text):
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(IndexedError, match=rf"x\.idx {text}"):
        IndexedFile(tmp_path / "x")


def test_tokens_that_are_cut(tmp_path):
    file = write(tmp_path / "x", [[1, 2, 3]], "int32")
    os.truncate(tmp_path / "x.bin", 8)
    with pytest.raises(IndexedError, match=r"x\.bin ends before token 3: was it cut since it was opened\?"):
        file.read(0)
    with pytest.raises(IndexedError, match=r"x\.bin has 8 bytes, less than the 12 of its index: prepare or copy it anew"):
        IndexedFile(tmp_path / "x")


def test_a_name_that_is_not_there(tmp_path):
    write(tmp_path / "x_text_document", [[1]], "int32")
    with pytest.raises(IndexedError, match=r"there is no file .*/x\.idx; did you mean x_text_document\?"):
        IndexedFile(tmp_path / "x")
    os.remove(tmp_path / "x_text_document.bin")
    with pytest.raises(IndexedError, match=r"there is no file .*x_text_document\.bin$"):
        IndexedFile(tmp_path / "x_text_document")


def test_two_thousand_damaged_files(tmp_path):
    """Each is refused or read to its end; none makes the reader take more memory than the files have bytes, and a bit."""
    write(tmp_path / "x", golden_c(), "uint16")
    whole = {end: (tmp_path / f"x{end}").read_bytes() for end in (".idx", ".bin")}
    draw, refused = np.random.default_rng(0), 0
    tracemalloc.start()
    for _ in range(2000):
        end = ".idx" if draw.random() < 0.8 else ".bin"
        data = bytearray(whole[end])
        kind = draw.integers(4)
        if kind == 0:
            data = data[: draw.integers(len(data))]
        elif kind == 1:
            data += bytes(draw.integers(1, 40))
        else:
            place = draw.integers(34 if kind == 2 else len(data))  # mostly in the header
            data[place % len(data) : place % len(data) + 8] = draw.bytes(8)
        for name, content in whole.items():
            (tmp_path / f"x{name}").write_bytes(data if name == end else content)
        try:
            with IndexedFile(tmp_path / "x") as file:
                assert sum(len(file.read(i)) for i in range(len(file))) == file.tokens
        except IndexedError as error:
            refused += 1
            assert str(tmp_path / "x") in str(error) and len(str(error)) > len(str(tmp_path)) + 20
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert refused > 1500


def test_an_index_of_a_multimodal_file_is_read(tmp_path):
    write(tmp_path / "x", [[1, 2], [3]], "uint16")
    with open(tmp_path / "x.idx", "ab") as file:
        file.write(bytes(2))  # a mode for each sequence
    assert IndexedFile(tmp_path / "x").read(1).tolist() == [3]
