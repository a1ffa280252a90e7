"""The flags of a command line of Megatron-LM's, by name, and their values."""

from __future__ import annotations

import difflib
import math
from typing import Iterable, Sequence

from .megatron_flags import FLAGS, REFUSED, WITHOUT_MEANING


class MegatronError(ValueError):
    """Flags that cannot be taken over; its message is a line for each of them."""


class Given:
    """Flags that were given, what is to be told about them, and what is wrong with them.

    Args:
        words: of a command line; what stands before a Python file is the launcher's.

    Attributes:
        flags: values by name.
        notes: lines to be told.
        problems: lines that say which flag is wrong, and what to do.
    """

    def __init__(self, words: Sequence[str]):
        self.flags: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []
        self._told: set[str] = set()
        script = next((i for i, word in enumerate(words) if word.endswith(".py") and not _follows_flag(words, i)), None)
        if script is not None:
            self._read(words[:script], launcher=True)
        self._read(words[0 if script is None else script + 1 :], launcher=False)
        self._judge()

    def _read(self, words: Sequence[str], launcher: bool) -> None:
        at = 0
        while at < len(words):
            word = words[at]
            at += 1
            if not word.startswith("--"):
                if not launcher:
                    self.problems.append(
                        f"{word}: is no flag, and no flag before it takes it as a value; one with blanks needs quotes"
                    )
                continue
            name, equals, value = word.partition("=")
            name = _spelt(name)
            values = [value] if equals else []
            takes = FLAGS[name].values if name in FLAGS else -1
            while not equals and at < len(words) and not words[at].startswith("--") and (takes < 0 or len(values) < takes):
                values.append(words[at])
                at += 1
            self._note(name, values, takes, launcher)

    def _note(self, name: str, values: list[str], takes: int, launcher: bool) -> None:
        if name not in FLAGS:
            if not launcher:
                near = difflib.get_close_matches(name, FLAGS, 1)
                hint = f"did you mean {near[0]}?" if near else "leave it out if it changes no result"
                self.problems.append(f"{name}: there is no such flag; {hint}")
        elif (takes == 0 and values) or (takes == 1 and len(values) != 1) or (takes < 0 and not values):
            wanted = {0: "no value", 1: "one value"}.get(takes, "one value or more")
            self.problems.append(f"{name}: takes {wanted}, not {' '.join(values) or 'none'}")
        else:
            if self.flags.get(name, values) != values:
                self.notes.append(f"{name}: given more than once; the last one counts, as in Megatron: {' '.join(values)}")
            self.flags[name] = values

    def _judge(self) -> None:
        """What has no meaning, and what is refused, in the order of the tables."""
        for name in (name for name in WITHOUT_MEANING if name in self.flags):
            self.notes.append(f"{name}: no meaning here: {WITHOUT_MEANING[name].says}")
        for name in (name for name in REFUSED if name in self.flags):
            values = self.flags[name]
            if not (values and all(_is_one_of(value, REFUSED[name].harmless) for value in values)):
                self.problems.append(f"{' '.join([name, *values])}: refused: {REFUSED[name].says}")

    def has(self, name: str) -> bool:
        """Whether a flag was given."""
        return name in self.flags

    def first(self, names: Iterable[str]) -> str | None:
        """Which of several was given, the first of them, or None."""
        return next((name for name in names if name in self.flags), None)

    def text(self, name: str, default: str = "", choices: Sequence[str] = ()) -> str:
        """The value of a flag, one of `choices` if there are any."""
        value = self.flags[name][0] if name in self.flags else default
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.problems.append(f"{name} {value}: is not computed here; {', '.join(choices)} can be taken over{hint}")
            return choices[0]
        return value

    def number(self, name: str, default: float | None = None, least: float = -math.inf) -> float:
        """A flag's number; `default`: Megatron's, which is told where it counts. None: the flag must be there."""
        value = self._parsed(name, default, float, "a number")
        if not math.isfinite(value) or value < least:
            self.problems.append(f"{name} {value}: must be finite" + ("" if math.isinf(least) else f" and at least {least:g}"))
        return value

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A flag's whole number; see `number`."""
        value = self._parsed(name, default, int, "a whole number")
        if value < least:
            self.problems.append(f"{name} {value}: must be at least {least}")
            return max(1, least)
        return value

    def _parsed(self, name: str, default, kind, what):  # type: ignore[no-untyped-def]
        if name not in self.flags:
            if default is None:
                self._problem_once(f"{name}: is missing, and has no default: give it")
                return kind(1)
            note = f"{name}: not given; Megatron's default counts: {default:g}"
            if note not in self._told:
                self._told.add(note)
                self.notes.append(note)
            return default
        text = self.flags[name][0]
        try:
            return kind(text)
        except ValueError:
            self._problem_once(f"{name} {text}: must be {what}")
            return kind(1)

    def _problem_once(self, line: str) -> None:
        if line not in self.problems:
            self.problems.append(line)


def _spelt(name: str) -> str:
    """A flag as the tables have it: launchers take `_` and `-`."""
    dashed = name.replace("_", "-")
    return dashed if name not in FLAGS and dashed in FLAGS else name


def _follows_flag(words: Sequence[str], at: int) -> bool:
    before = _spelt(words[at - 1]) if at else ""
    return before in FLAGS and FLAGS[before].values != 0


def _is_one_of(value: str, known: Sequence[str]) -> bool:
    if value in known:
        return True
    try:
        return any(float(value) == float(text) for text in known)
    except ValueError:
        return False
