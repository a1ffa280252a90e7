"""Tokenizers as folders and files hold them, all asked in one way."""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat
from pathlib import Path
from typing import Any, Protocol, Sequence

import xxhash

from .extras import DataError, MissingLibraryError, needed
from .sources import download, found_mode

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>")  # where nothing says which one it is
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_FILES = ("tokenizer.json", *_CONFIG_FILES, "*.model", "*.tiktoken", "vocab.json", "merges.txt", "added_tokens.json")
_ADDS_BY_CONFIG = ("Llama", "CodeLlama", "Gemma", "Cohere")  # classes whose `add_bos_token` counts more than the file

# How words are cut before tiktoken looks at them: https://github.com/openai/tiktoken, and those of the models that use its files.
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": _CL100K,
    "llama3": _CL100K,
    "qwen": _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),
}


class TokenizerError(DataError):
    """A tokenizer that is not there, is damaged, or cannot do what is asked of it."""


class TextTokenizer(Protocol):
    """What makes token ids of texts.

    `vocab_size`: ids are below it.  `end`: the token that ends a document, or None.  `digest`: of its content: equal ones make
    equal ids.
    """

    vocab_size: int
    end: int | None
    digest: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in order; with those tokens around them that the tokenizer's files ask for."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, without special tokens; what is no whole character yet becomes U+FFFD."""
        ...


def load_tokenizer(
    path: str,
    kind: str = "auto",
    special: bool = False,
    merges: str | None = None,
    pattern: str | None = None,
    end: str | None = None,
) -> TextTokenizer:
    """The tokenizer in a folder of Hugging Face's, a file, or a name on a hub, `hf:owner/name`.

    Nothing that such a folder holds is run as a program.

    Args:
        path: folder, `tokenizer.json`, sentencepiece's `.model`, tiktoken's file, a `vocab.json` (with `merges`), or for `null` the
            number of ids.
        kind: "auto", by the files; "hf", "sentencepiece", "tiktoken", "gpt2" (vocab.json, merges.txt), "null" (texts are numbers).
        special: names of special tokens that a text spells are these tokens; else they are text, as any other.
        merges: GPT-2's `merges.txt`, if `path` is a `vocab.json`.
        pattern: of tiktoken's words, one of `PATTERNS`, where the file's name does not say which.
        end: the token that ends documents, where the files do not say which.

    Raises:
        TokenizerError: there is none, or it cannot be read.
        MissingLibraryError: its library is not installed.
    """
    if kind == "null":
        return NullTokenizer(path)
    folder = download(path, "model", _FILES) if path.startswith("hf:") else os.path.expanduser(path)
    mode = found_mode(folder, path)
    if mode is None:
        raise TokenizerError(f"there is no tokenizer {path}; a name on a hub is written hf:owner/name")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise TokenizerError(f"{path} is neither a file nor a folder: name a tokenizer's")
    try:
        file, kind = _chosen(folder, kind)
        config = read_config(os.path.dirname(file))
        if kind == "sentencepiece":
            made: _Known = _SentencePiece(file, config, special)
        elif kind == "tiktoken":
            made = _TikToken(file, config, special, pattern)
        else:
            made = HuggingFace(file, config, special, merges)
    except MissingLibraryError:
        raise
    except OSError as error:
        raise TokenizerError(f"the tokenizer {path} cannot be read: {error}") from error
    made.end = made.find_end(end or config.get("eos_token"), given=end is not None)
    return made


def _chosen(path: str, kind: str) -> tuple[str, str]:
    """The file, and of which kind it is."""
    folder = Path(path)
    names = [folder] if folder.is_file() else sorted(folder.iterdir())

    def first(*ends: str) -> str | None:
        return next((str(name) for end in ends for name in names if name.name.endswith(end)), None)

    tiktoken = first(".tiktoken", "tiktoken.model")
    candidates = {"hf": first("tokenizer.json"), "gpt2": first("vocab.json"), "tiktoken": tiktoken}
    model = first("tokenizer.model", ".model")
    if model is not None and model != tiktoken:
        candidates["tiktoken" if _is_tiktoken(model) else "sentencepiece"] = model
    if folder.is_file() and kind != "auto":
        return path, kind
    if kind == "auto":
        kind = next((name for name in ("hf", "sentencepiece", "tiktoken", "gpt2") if candidates.get(name)), "auto")
    file = candidates.get(kind)
    if file is None:
        what = "tokenizer.json, tokenizer.model, *.tiktoken, or vocab.json with merges.txt"
        raise TokenizerError(f"{path} has no tokenizer{'' if kind == 'auto' else f' of kind {kind}'}; what is known is {what}")
    return file, kind


def _is_tiktoken(path: str) -> bool:
    """Whether the first line is some base64 and a number: Llama 3's `tokenizer.model` is one, Llama 2's is sentencepiece's."""
    with open(path, "rb") as file:
        parts = file.read(1 << 10).split(b"\n")[0].split()
    return len(parts) == 2 and parts[1].isdigit()


def read_config(folder: str) -> dict[str, Any]:
    """What the files beside a tokenizer say of it; tokens as their text.

    Raises:
        TokenizerError: one of them is damaged, or cannot be read.
    """
    found: dict[str, Any] = {}
    for name in reversed(_CONFIG_FILES):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as file:
                    read = json.load(file)
            except (ValueError, RecursionError) as error:
                raise TokenizerError(f"{path} is no JSON: {error}") from error
            except OSError as error:
                raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error
            if not isinstance(read, dict):
                raise TokenizerError(f"{path} is damaged: it is not an object")
            found.update({key: _text_of(value) for key, value in read.items() if value is not None})
    return found


def _text_of(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) and "content" in token else token


class _Known:
    """What the tokenizers of files have in common."""

    vocab_size: int
    end: int | None = None
    digest: str

    def __init__(self, path: str):
        self.path = path

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, see `TextTokenizer`."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, see `TextTokenizer`."""
        raise NotImplementedError

    def id_of(self, token: str) -> int | None:
        """The id of a special token, or None."""
        raise NotImplementedError

    def named(self, token: Any) -> int | None:
        """The id of a token as a config names it, which may be null; None: there is none. "None" is a word."""
        return self.id_of(token) if isinstance(token, str) else None

    def find_end(self, name: Any, given: bool) -> int | None:
        """The token that ends documents."""
        found = self.named(name)
        if found is None and given:
            raise TokenizerError(f"{self.path} has no token {name}, which is to end documents")
        for other in END_NAMES:
            found = self.id_of(other) if found is None else found
        return found

    def _digest_of(self, *parts: Any) -> str:
        made = xxhash.xxh3_128()
        with open(self.path, "rb") as file:
            while data := file.read(1 << 20):
                made.update(data)
        made.update(repr(parts).encode())
        return made.hexdigest()


class HuggingFace(_Known):
    """A `tokenizer.json`, or GPT-2's two files, by `tokenizers`."""

    def __init__(self, path: str, config: dict[str, Any], special: bool, merges: str | None):
        super().__init__(path)
        library = needed("tokenizers", path)
        try:
            if os.path.basename(path).endswith("vocab.json"):
                merges = merges or os.path.join(os.path.dirname(path), os.path.basename(path).replace("vocab.json", "merges.txt"))
                self._tokenizer = library.Tokenizer(library.models.BPE.from_file(path, merges))
                self._tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
            else:
                self._tokenizer = library.Tokenizer.from_file(path)
        except Exception as error:  # it raises Exception itself
            raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from error
        self._tokenizer.encode_special_tokens = not special
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._front, self._behind = self._around(config)
        self._encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)  # the first ones had none
        self.digest = self._digest_of(special, self._front, self._behind, merges and Path(merges).read_bytes())

    def _around(self, config: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The tokens that are put in front of each text, and behind it."""
        with_them, bare = (self._tokenizer.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        place = next((i for i in range(len(with_them)) if with_them[i : i + len(bare)] == bare), 0) if bare else 0
        front, behind = with_them[:place], with_them[place + len(bare) :]
        if str(config.get("tokenizer_class", "")).startswith(_ADDS_BY_CONFIG):
            for name, old in (("bos", front), ("eos", behind)):
                wanted, token = config.get(f"add_{name}_token"), self.named(config.get(f"{name}_token"))
                if wanted is not None and (token is not None or not wanted):
                    old[:] = [token] if wanted else []
        return front, behind

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, see `TextTokenizer`."""
        found = [encoding.ids for encoding in self._encode(list(texts), add_special_tokens=False)]
        return [[*self._front, *ids, *self._behind] for ids in found] if self._front or self._behind else found

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, see `TextTokenizer`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and the characters that each is made of, without tokens around the text."""
        return [(found.ids, found.offsets) for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self._tokenizer.token_to_id(token)


class _SentencePiece(_Known):
    """A `tokenizer.model` of sentencepiece's; a text can never spell its control tokens."""

    def __init__(self, path: str, config: dict[str, Any], special: bool):
        super().__init__(path)
        if special:
            raise TokenizerError(f"{path}: sentencepiece never finds special tokens in a text; leave --parse-special-tokens out")
        library = needed("sentencepiece", path)
        try:
            self._model = library.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path} cannot be read as sentencepiece's: {error}") from error
        self.vocab_size = self._model.vocab_size()
        llama = str(config.get("tokenizer_class", "")).startswith("Llama")
        self._bos = bool(config.get("add_bos_token", llama)) and self._model.bos_id() >= 0
        self._eos = bool(config.get("add_eos_token", False)) and self._model.eos_id() >= 0
        self.digest = self._digest_of(self._bos, self._eos)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, see `TextTokenizer`."""
        return self._model.encode(list(texts), add_bos=self._bos, add_eos=self._eos, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, see `TextTokenizer`."""
        return self._model.decode([int(x) for x in ids])

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None."""
        found = self._model.piece_to_id(token)
        return None if found == self._model.unk_id() else found

    def find_end(self, name: Any, given: bool) -> int | None:
        """See `_Known`; the model itself knows which it is."""
        if not given and self._model.eos_id() >= 0:
            return self._model.eos_id()
        return super().find_end(name, given)


class _TikToken(_Known):
    """Lines of base64 and rank, by tiktoken."""

    def __init__(self, path: str, config: dict[str, Any], special: bool, pattern: str | None):
        super().__init__(path)
        library = needed("tiktoken", path)
        try:
            with open(path, "rb") as file:
                lines = [line.split() for line in file.read().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{path} is not one of tiktoken's files, lines of base64 and a number: {error}") from error
        pattern = pattern or ("qwen" if "qwen" in os.path.basename(path).lower() else "llama3" if len(ranks) == 128000 else None)
        if pattern not in PATTERNS:
            raise TokenizerError(f"{path} does not say how words are cut: --tiktoken-pattern, one of {', '.join(PATTERNS)}")
        try:
            added = {_text_of(token): int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise TokenizerError(f"added_tokens_decoder in the config beside {path} is damaged: {error}") from error
        self._special = added or _special_tokens(pattern, len(ranks))
        self._encoding = library.Encoding(
            os.path.basename(path), pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=self._special
        )
        self.vocab_size = self._encoding.n_vocab
        self._allowed = "all" if special else set()
        self.digest = self._digest_of(special, pattern, sorted(self._special.items()))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, see `TextTokenizer`."""
        return [self._encoding.encode(text, allowed_special=self._allowed, disallowed_special=()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, see `TextTokenizer`."""
        special = set(self._special.values())
        return self._encoding.decode([int(x) for x in ids if int(x) not in special])

    def id_of(self, token: str) -> int | None:
        """The id of a special token, or None."""
        return self._special.get(token)


def _special_tokens(pattern: str, first: int) -> dict[str, int]:
    """The special tokens, with their ids, of models that ship no list of them beside the file."""
    names = ["<|endoftext|>"]
    if pattern == "qwen":
        names += ["<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    elif pattern == "llama3":
        known = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"]
        known += ["reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
        names = [f"<|{name}|>" for name in (*known, *(f"reserved_special_token_{i}" for i in range(3, 248)))]
    return {name: first + i for i, name in enumerate(names)}


class NullTokenizer:
    """Texts are numbers, with blanks between them, below a given one; that one ends documents. As Megatron's, for trying things.

    Args:
        size: how many numbers there are.

    Raises:
        TokenizerError: it is no whole number above 0, or ids would not fit into the 32 bits that files have for them.
    """

    def __init__(self, size: str):
        if not (size.isascii() and size.isdigit() and len(size) < 11 and 0 < int(size) < 1 << 31):
            raise TokenizerError(
                f"the null tokenizer takes how many ids there are (--vocab-size), up to {(1 << 31) - 1:,}, not {size[:40]!r}"
            )
        self.end: int | None = int(size)
        self.vocab_size = int(size) + 1
        self.digest = f"null-{size}"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, see `TextTokenizer`.

        Raises:
            TokenizerError: a text has something else, or another number.
        """
        try:
            found = [[int(word) for word in text.split()] for text in texts]
        except ValueError as error:
            raise TokenizerError(f"the null tokenizer reads numbers only: {error}") from error
        if any(not 0 <= x < self.vocab_size - 1 for ids in found for x in ids):
            raise TokenizerError(f"the null tokenizer reads numbers below {self.vocab_size - 1} only")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, see `TextTokenizer`."""
        return " ".join(map(str, ids))
