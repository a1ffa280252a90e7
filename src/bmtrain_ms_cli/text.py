"""Whether a text will do for the demo, before ranks are started."""

from __future__ import annotations

import math
from pathlib import Path

from bmtrain_ms_base.data import text

from .launch import LaunchError


def check_text(path: Path | None, windows: int, length: int, vocab_size: int) -> None:
    """Read the text, and where it is not long beyond doubt count the tokens that the ranks would get.

    Args:
        path: of the text; None: the help texts of Python.
        windows: that a step needs.
        length: of a window.
        vocab_size: of the tokenizer.

    Raises:
        LaunchError: it cannot be read, or is too short.
    """
    try:
        documents = text.python_documentation() if path is None else text.read_text(path)
    except FileNotFoundError:
        raise LaunchError(f"--text {path} does not exist") from None
    except IsADirectoryError:
        raise LaunchError(f"--text {path} is a folder; give one UTF-8 file (cat joins several)") from None
    except OSError as error:
        raise LaunchError(f"--text {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LaunchError(f"--text {error}") from error
    training, held_out = text.split_held_out(documents)
    needed = windows * length + 1, length + 1
    characters = [sum(map(len, part)) for part in (training, held_out)]
    if all(count >= text.LONGEST_TOKEN * tokens for count, tokens in zip(characters, needed)):
        return
    tokenizer = text.train_tokenizer(training, vocab_size)
    counts = [len(text.encode(tokenizer, part)) for part in (training, held_out)]
    if all(count >= tokens for count, tokens in zip(counts, needed)):
        return
    # longer texts make longer tokens: twice as many characters are enough for what is in between
    more = math.ceil(sum(characters) * 2 * max(tokens / count for count, tokens in zip(counts, needed)) / 1000) * 1000
    raise LaunchError(
        f"{'the help texts of Python are' if path is None else f'--text {path} is'} too short: {sum(characters):,} characters make "
        f"{counts[0]:,} training and {counts[1]:,} held-out tokens, --batch {windows} needs {needed[0]:,} and {needed[1]:,}; give "
        f"{more:,} characters or more, or a smaller --batch"
    )
