"""What the command line understands, and how it says that it does not: in one line."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NoReturn, Sequence

from bmtrain_ms_base.shortening import shortened

if TYPE_CHECKING:  # what `add` of each command is given; generic for type checkers only
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction


REHEARSE_HELP = "run on CPU what Ascend devices would run, as far as that is possible without one: slower, for finding faults"


FOLDERS_HELP = "rehearse several hosts on this one: ranks are divided among these folders, each as if it were a host's, e.g. a,b"


class Parser(argparse.ArgumentParser):
    """Takes whole names of options only, and asks whether another was meant; complaints are one line, without the usage."""

    _words: Sequence[str] = ()

    def __init__(self, *args: Any, allow_unknown: bool = False, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._allow_unknown = allow_unknown

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but leave nothing unknown over: that is an error, or for who asks for it in `unknown`."""
        self._words = sys.argv[1:] if args is None else list(args)
        parsed, unknown = super().parse_known_args(args, namespace)
        if self._allow_unknown:
            parsed.unknown, unknown = unknown, []
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """End the program with one line and exit code 2."""
        hint = self._meant() if "arguments" in message else ""
        self.exit(2, f"{self.prog}: {shortened(message, 1000)}{shortened(hint)} (see {self.prog} --help)\n")

    def _meant(self) -> str:
        """The option that looks most like one that is none."""
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for name in [word.split("=")[0] for word in self._words if word.startswith("--") and word != "--"]:
            begun = [] if name in known else [x for x in known if x.startswith(name)]
            near = begun or ([] if name in known else difflib.get_close_matches(name, known, 1))
            if near:
                return f"; {name}: did you mean {' or '.join(near)}?"
        return ""


def folders(text: str) -> list[str]:
    """Paths between commas."""
    return [str(path(part)) for part in text.split(",")]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def seed(text: str) -> int:
    """What NumPy's and MindSpore's generators take."""
    value = whole(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"must be between 0 and {(1 << 32) - 1}, not {value}")
    return value


def number(text: str) -> float:
    """A number, perhaps with a fraction."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def number_from(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """What reads a number of at least `least`, or above it, and at most `most`; infinity and NaN are none."""
    limits = [f"above {least:g}" if above else f"at least {least:g}", *([f"at most {most:g}"] if most < math.inf else [])]

    def read(text: str) -> float:
        value = number(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        if not (least < value if above else least <= value) or value > most:
            raise argparse.ArgumentTypeError(f"must be {' and '.join(limits)}, not {text}")
        return value

    return read


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def some_text(text: str) -> str:
    """A text that is not empty, and can be written as UTF-8."""
    if not text:
        raise argparse.ArgumentTypeError("must be a text that is not empty")
    return utf8(text)


def utf8(text: str) -> str:
    """A text that can be written as UTF-8; the shell hands over whatever bytes it was given."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8, not {text!r}") from None
    return text


def path(text: str) -> Path:
    """A path; a shell leaves the `~` of `--out=~/x` to us."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, not {text!r}")
    return Path(os.path.expanduser(text))
