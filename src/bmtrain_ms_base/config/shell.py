"""The command of a shell script, without running anything: its assignments are expanded, and that is all that is understood."""

from __future__ import annotations

import ast
import operator
import re
from pathlib import PurePosixPath
from typing import Callable, List, Mapping, NamedTuple, Sequence, Union

from ..shortening import shortened

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_NAME = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?$!]")
_STARTERS = {"torchrun", "msrun", "python", "python3", "deepspeed", "mpirun", "srun"}
_BEFORE = {"exec", "nohup", "time", "sudo", "then", "do", "else", "export", "readonly", "declare", "local"}
_OPENING, _CLOSING = {"if", "for", "while", "until", "case"}, {"fi", "done", "esac"}


class ShellError(ValueError):
    """A script that cannot be read without running it; its message says what to write, or which `--set` to give."""


class _Unknown(NamedTuple):
    """Why a variable's value is not known; said if it is used."""

    why: str


_Value = Union[str, List[str], _Unknown]


class _Part(NamedTuple):
    """A piece of a word; `quoted` text is not split at blanks, `literal` text has nothing to expand."""

    text: str
    quoted: bool
    literal: bool


_Word = List[_Part]
_Elements = List[_Word]


class _Command(NamedTuple):
    """A command as it stands there. `arrays`: the elements of those words that assign one, by their number."""

    words: list[_Word]
    arrays: dict[int, _Elements]
    line: int


def training_command(script: str, given: Mapping[str, str]) -> list[str]:
    """The words of the one command of a script that starts a Python file with flags, all variables expanded.

    Args:
        script: its text.
        given: values of variables, which count more than the script's.

    Raises:
        ShellError: a variable has no value that can be known; there is no such command, or more than one.
    """
    values: dict[str, _Value] = dict(given)
    found: list[tuple[int, list[str]]] = []
    depth = 0
    for command in _Scanner(script).commands():
        head = _raw(command.words[0])
        depth += (head in _OPENING) - (head in _CLOSING)
        rest = _assign(command, values, given, depth)
        if rest and _starts(rest[0], values):
            words = _expanded(rest, values)
            script_at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if script_at is not None and any(word.startswith("--") for word in words[script_at:]):
                found.append((command.line, words))
    if not found:
        raise ShellError(
            "there is no command that starts a Python file with flags, as torchrun pretrain_gpt.py --num-layers 8; give its flags "
            "after --"
        )
    if len(found) > 1:
        lines = ", ".join(str(line) for line, _ in found)
        raise ShellError(f"there are {len(found)} commands with flags, in lines {lines}: keep one, or give its flags after --")
    return found[0][1]


def _raw(word: _Word) -> str:
    return "".join(part.text for part in word)


def _starts(word: _Word, values: Mapping[str, _Value]) -> bool:
    try:
        return any(PurePosixPath(text).name in _STARTERS for text in _fields(word, values))
    except ShellError:
        return False


def _assign(command: _Command, values: dict[str, _Value], given: Mapping[str, str], depth: int) -> list[_Word]:
    """Note what a command assigns; its other words. What stands before a command is that command's alone."""
    number, words = 0, command.words
    made: list[tuple[str, bool, _Value]] = []
    while number < len(words):
        first = words[number][0]
        match = None if first.quoted else _ASSIGNMENT.match(first.text)
        if match is not None:
            if depth:
                value: _Value = _Unknown(f"is set in a branch or loop, in line {command.line}, which is not run")
            else:
                value = _value(command, number, len(match[0]), values)
            made.append((match[1], bool(match[2]), value))
        elif _raw(words[number]) not in _BEFORE and not (made == [] and _raw(words[number]).startswith("-") and number):
            break
        number += 1
    if number == len(words):
        for name, added, value in made:
            if name not in given:
                values[name] = _joined(values.get(name, ""), value) if added else value
    return words[number:]


def _joined(old: _Value, new: _Value) -> _Value:
    if isinstance(old, _Unknown) or isinstance(new, _Unknown):
        return old if isinstance(old, _Unknown) else new
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    return [*(old if isinstance(old, list) else [old]), *(new if isinstance(new, list) else [new])]


def _value(command: _Command, number: int, start: int, values: Mapping[str, _Value]) -> _Value:
    try:
        if number in command.arrays:
            return _expanded(command.arrays[number], values)
        first, *others = command.words[number]
        return "".join(_text(part, values) for part in [first._replace(text=first.text[start:]), *others])
    except ShellError as error:
        return _Unknown(f"is set in line {command.line} to what is not known: {error}")


def _expanded(words: Sequence[_Word], values: Mapping[str, _Value]) -> list[str]:
    return [field for word in words for field in _fields(word, values)]


def _fields(word: _Word, values: Mapping[str, _Value]) -> list[str]:
    """What becomes of a word: quoted parts stay whole, what others expand to is split at blanks, arrays are their elements."""
    fields: list[str] = []
    current: str | None = None
    for part in word:
        elements = _array(part, values)
        if part.quoted and elements is None:
            pieces = [_text(part, values)]
        elif elements is not None:
            pieces = elements if part.quoted else [x for element in elements for x in element.split()]
        else:
            text = _text(part, values)
            pieces = text.split()
            if current is not None and text[:1].isspace():
                fields.append(current)
                current = None
            if pieces and text[-1:].isspace():
                pieces.append("")  # what follows is another word
        if pieces:
            *done, last = [(current or "") + pieces[0], *pieces[1:]]
            fields.extend(done)
            current = last if last or part.quoted or not done else None
    return fields if current is None else [*fields, current]


def _array(part: _Part, values: Mapping[str, _Value]) -> list[str] | None:
    match = None if part.literal else re.fullmatch(r"\$\{(\w+)\[[@*]\]\}|\$([@*])", part.text)
    if match is None:
        return None
    value = [] if match[2] else _known(match[1], values)  # a script without arguments of its own
    return [value] if isinstance(value, str) else value


def _known(name: str, values: Mapping[str, _Value]) -> str | list[str]:
    value = values.get(name)
    if value is None or isinstance(value, _Unknown):
        why = "is not set in the script" if value is None else value.why
        raise ShellError(f"${name} {why}: give it, as --set {name}=VALUE")
    return value


def _text(part: _Part, values: Mapping[str, _Value]) -> str:
    if part.literal:
        return part.text
    text, made, at = part.text, "", 0
    while at < len(text):
        if text[at] == "\\" and text[at + 1 : at + 2] in ("$", "`", '"', "\\"):
            made, at = made + text[at + 1], at + 2
        elif text[at] == "`":
            raise ShellError(f"{text[at:]} is a command, and none is run")
        elif text[at] != "$":
            made, at = made + text[at], at + 1
        else:
            end = _end_of_expansion(text, at)
            made, at = made + _expansion(text[at:end], values), end
    return made


def _end_of_expansion(text: str, at: int) -> int:
    """The place behind `$NAME`, `${...}`, `$(...)` or `$((...))`."""
    opening = text[at + 1 : at + 2]
    if opening not in ("{", "("):
        match = _NAME.match(text, at + 1)
        return at + 1 if match is None else match.end()
    closing, depth = {"{": "}", "(": ")"}[opening], 0
    for place in range(at + 1, len(text)):
        depth += (text[place] == opening) - (text[place] == closing)
        if depth == 0:
            return place + 1
    raise ShellError(f"{text[at:]} has no end: {closing} is missing")


def _expansion(text: str, values: Mapping[str, _Value]) -> str:
    if text == "$":
        return text
    if text.startswith("$(("):
        return str(_arithmetic(text[3:-2], values))
    if text.startswith("$("):
        raise ShellError(f"{text} is a command, and none is run")
    if not text.startswith("${"):
        return _scalar(text[1:], values)
    match = re.fullmatch(r"(\w+)(?:(:?[-=])(.*))?", text[2:-1], re.DOTALL)
    if match is None:
        raise ShellError(f"{text} is understood only as ${{NAME}}, ${{NAME:-default}} or ${{NAME[@]}}")
    name, sign, default = match.groups()
    if sign is not None and (name not in values or (sign[0] == ":" and values[name] == "")):
        return _text(_Part(default.strip("\"'"), True, False), values)
    return _scalar(name, values)


def _scalar(name: str, values: Mapping[str, _Value]) -> str:
    if name in "@*":
        return ""
    value = _known(name, values)
    return value if isinstance(value, str) else (value[0] if value else "")  # as a shell: the first element


_OPERATIONS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: int(a / b),  # towards zero, as a shell
    ast.Mod: lambda a, b: a - int(a / b) * b,
    ast.Pow: lambda a, b: _power(a, b),
}
_BITS = 63  # of a shell's numbers, without the sign


def _power(a: int, b: int) -> int:
    if b < 0 or (abs(a) > 1 and b > _BITS):  # else it may take longer than anybody waits
        raise ValueError
    return operator.pow(a, b)


def _arithmetic(text: str, values: Mapping[str, _Value]) -> int:
    named = re.sub(r"\$\{?(\w+)\}?", r"\1", text)

    def of(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return int(_scalar(node.id, values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            result = _OPERATIONS[type(node.op)](of(node.left), of(node.right))
            if result.bit_length() <= _BITS:
                return result
        raise ValueError

    try:
        return of(ast.parse(named.strip(), mode="eval").body)
    except ShellError:
        raise
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ShellError(
            f"$(({shortened(text)})) is understood only with whole numbers of 64 bits, + - * / % and brackets"
        ) from error


class _Scanner:
    """Commands of a script, as they stand there."""

    def __init__(self, script: str):
        self.text = script.replace("\r\n", "\n")
        self.at, self.line = 0, 1

    def commands(self) -> list[_Command]:
        """All commands of the text, in order."""
        found: list[_Command] = []
        while self.at < len(self.text):
            command = self._command()
            if command.words:
                found.append(command)
        return found

    def _command(self) -> _Command:
        """Up to a line's end, or ; | &. What is redirected is left out."""
        words: list[_Word] = []
        arrays: dict[int, _Elements] = {}
        line, skip = self.line, False
        while self.at < len(self.text):
            self._blanks()
            char = self.text[self.at : self.at + 1]
            if char == "#":
                while self.at < len(self.text) and self.text[self.at] != "\n":
                    self.at += 1
            elif char in ("<", ">"):
                self.at += 1
                if words and _raw(words[-1]).isdigit() and self.text[self.at - 2].isdigit():
                    words.pop()
                while self.text[self.at : self.at + 1] in ("<", ">", "&") and self.at < len(self.text):
                    self.at += 1
                skip = True
            elif char in ("\n", ";", "|", "&", "(", ")", ""):
                self._forward()
                break
            else:
                line = line if words else self.line
                word = self._word()
                if not skip:
                    words.append(word)
                skip = False
                if self.text[self.at : self.at + 1] == "(" and _ASSIGNMENT.fullmatch(_raw(word)) and words:
                    self.at += 1
                    arrays[len(words) - 1] = self._elements()
        return _Command(words, arrays, line)

    def _forward(self) -> None:
        self.line += self.text[self.at : self.at + 1] == "\n"
        self.at += 1

    def _blanks(self) -> None:
        while self.at < len(self.text):
            if self.text.startswith("\\\n", self.at):
                self.at, self.line = self.at + 2, self.line + 1
            elif self.text[self.at] in " \t":
                self.at += 1
            else:
                return

    def _elements(self) -> _Elements:
        line, found = self.line, []
        while True:
            self._blanks()
            char = self.text[self.at : self.at + 1]
            if char == "":
                raise ShellError(f"line {line}: the array has no end: ) is missing")
            if char == ")":
                self.at += 1
                return found
            if char == "\n":
                self._forward()
            elif char == "#":
                while self.text[self.at : self.at + 1] not in ("\n", ""):
                    self.at += 1
            elif char in ";|&<>(":
                raise ShellError(f"line {self.line}: {char} in an array is not understood")
            else:
                found.append(self._word())

    def _word(self) -> _Word:
        """Up to a blank or what ends a command."""
        parts: _Word = []
        bare = ""

        def leave_bare() -> None:
            nonlocal bare
            if bare:
                parts.append(_Part(bare, False, "$" not in bare and "`" not in bare))
            bare = ""

        while self.at < len(self.text) and self.text[self.at] not in " \t\n;|&<>()":
            char = self.text[self.at]
            if char in "'\"":
                leave_bare()
                parts.extend(self._quoted(char))
            elif char == "\\":
                if self.text.startswith("\\\n", self.at):
                    self.line += 1
                else:
                    leave_bare()
                    parts.append(_Part(self.text[self.at + 1 : self.at + 2], True, True))
                self.at += 2
            elif char == "$" or char == "`":
                if not _ASSIGNMENT.match(bare):
                    leave_bare()
                end = self._end(char)
                bare += self.text[self.at : end]
                self.line += self.text.count("\n", self.at, end)
                self.at = end
                if not _ASSIGNMENT.match(bare):
                    leave_bare()
            else:
                bare += char
                self.at += 1
        leave_bare()
        return parts

    def _end(self, char: str) -> int:
        if char == "$":
            return _end_of_expansion(self.text, self.at)
        end = self.text.find("`", self.at + 1)
        if end < 0:
            raise ShellError(f"line {self.line}: ` has no second one")
        return end + 1

    def _quoted(self, quote: str) -> list[_Part]:
        """What stands in quotes; a part for each expansion, as an array's becomes several words."""
        line, end = self.line, self.at + 1
        while end < len(self.text) and self.text[end] != quote:
            if quote == '"' and self.text[end] == "\\":
                end += 2
            elif quote == '"' and self.text[end] == "$":
                end = _end_of_expansion(self.text, end)
            else:
                end += 1
        if end >= len(self.text):
            raise ShellError(f"line {line}: {quote} has no second one")
        inner = self.text[self.at + 1 : end]
        self.at, self.line = end + 1, self.line + inner.count("\n")
        if quote == "'":
            return [_Part(inner, True, True)]
        inner = inner.replace("\\\n", "")
        pieces = re.split(r"(\$\{\w+\[[@*]\]\}|(?<!\\)\$[@*])", inner) if "$" in inner else [inner]
        return [_Part(piece, True, False) for piece in pieces if piece or len(pieces) == 1]
