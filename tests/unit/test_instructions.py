"""Conversations: rows, chat templates, what is learnt, packing, batches. No MindSpore here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmtrain_ms_base.data import tools, train_tokenizer
from bmtrain_ms_base.data.chat import ALPACA_KEYS, TEMPLATES, ChatTemplate, load_template, of_alpaca, of_messages
from bmtrain_ms_base.data.extras import DataError
from bmtrain_ms_base.data.indexed import IndexedError, IndexedFile, IndexedWriter
from bmtrain_ms_base.data.instruction_batches import InstructionBatches
from bmtrain_ms_base.data.instructions import OUTPUTS, packed
from bmtrain_ms_base.data.rows import MISSING, Problem
from bmtrain_ms_cli.main import main

TALK = [
    {"role": "user", "content": "Say one"},
    {"role": "assistant", "content": " one\n two"},
    {"role": "user", "content": "And\nmore?"},
    {"role": "assistant", "content": "no"},
]
LLAMA = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"  # noqa: E501


def exit_code(*words: Any) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as error:  # argparse
        return error.code


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """A folder with a template that begins with `<s>`, which the tokenizer would put in front of each text too."""
    from tokenizers import processors

    folder = tmp_path / "tok"
    folder.mkdir()
    made = train_tokenizer(["one two more no say and user assistant"] * 9, 320)
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"])
    bos = made.token_to_id("<s>")
    byte_level = processors.ByteLevel(trim_offsets=True)  # as GPT-2's: offsets without blanks
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    made.post_processor = processors.Sequence([byte_level, template])
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "chat_template": LLAMA}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def read(prefix: Path) -> list[list[list[int]]]:
    """ids, mask and labels of each row."""
    files = [IndexedFile(f"{prefix}_{output}_document") for output in OUTPUTS]
    assert all(file.dtype == np.int32 for file in files)
    return [[file.read(i).tolist() for file in files] for i in range(len(files[0]))]


def prepared(folder: Path, tokenizer: Path, rows: list[Any], kind: str, *words: Any) -> list[list[list[int]]]:
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["prepare", "--input", folder / "x.jsonl", "--tokenizer-name-or-path", tokenizer, "--output-prefix", folder / "x"]
    handler = f"{kind}StyleInstructionHandler"
    assert exit_code(*command, "--handler-name", handler, "--seq-length", 60, "--overwrite", "--log-interval", 99, *words) == 0
    return read(folder / "x")


# Rows #


def alpaca(**row: Any) -> Any:
    return of_alpaca({name: row.get(column, MISSING) for name, column in ALPACA_KEYS.items()})


def test_rows_of_alpaca():
    assert alpaca(instruction="a", input="b", output="c") == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
    ]
    for empty in ("", None, MISSING):  # ModelLink wrote "None" into the prompt
        assert alpaca(instruction="a", input=empty, output="c")[0]["content"] == "a"
    talk = alpaca(instruction="a", output="c", system="s", history=[["q", "r"]])
    assert [message["role"] for message in talk] == ["system", "user", "assistant", "user", "assistant"]
    for row, kind in (
        ({"instruction": "a"}, "missing"),
        ({"instruction": "a", "output": ""}, "empty"),
        ({"instruction": 3, "output": "c"}, "not-text"),
        ({"instruction": "a", "output": 3}, "not-text"),
        ({"instruction": "a", "output": "\ud800"}, "invalid"),
        ({"instruction": "a", "output": "c", "history": ["q"]}, "not-text"),
    ):
        assert alpaca(**row).kind == kind, row


def test_rows_of_messages():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    turns += [{"from": "observation", "value": "c"}, {"from": "function_call", "value": "d"}]
    found = of_messages(turns)
    assert not isinstance(found, Problem)
    assert [(m["role"], m["content"]) for m in found] == list(zip(["system", "user", "assistant", "tool", "assistant"], "sabcd"))
    assert of_messages(TALK) == TALK
    for turns, kind in (
        (MISSING, "missing"),
        (None, "missing"),
        ("x", "not-text"),
        ([3], "not-text"),
        ([{"role": "user"}], "not-text"),
    ):
        assert of_messages(turns).kind == kind
    assert of_messages([{"role": "user", "content": "a"}]).kind == "empty"


# Templates #


@pytest.mark.parametrize("text", [*TEMPLATES.values(), LLAMA], ids=[*TEMPLATES, "llama"])
def test_what_is_learnt_is_what_the_assistant_says(text):
    """With the token that closes it."""
    close = "<|im_end|>" if "im_end" in text else "</s>"
    rendered = ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}).render(TALK)
    assert not isinstance(rendered, Problem)
    found = [rendered.text[begin:end] for begin, end in rendered.spans]
    assert [x.strip() for x in found] == [f"one\n two{close}", f"no{close}"]


def test_templates_that_refuse_or_change_what_was_said():
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    assert refusing.render(TALK) == Problem("broken", "the chat template refuses it: roles must alternate")
    silent = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", {})
    assert silent.render(TALK) == Problem("broken", "nothing of it would be learnt with this chat template")
    # the first answer is cut once there is a second
    last = ChatTemplate("{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}|{% endfor %}", {}).render(
        TALK
    )
    assert not isinstance(last, Problem) and [last.text[a:b] for a, b in last.spans] == ["no|"]
    with pytest.raises(DataError, match="the chat template cannot be read: "):
        ChatTemplate("{% for %}", {})
    unsafe = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    assert isinstance(unsafe.render(TALK), Problem)  # a sandbox


def test_where_a_template_comes_from(tmp_path):
    with pytest.raises(DataError, match=r"the tokenizer in .* has no chat template: --prompt-type takes chatml, alpaca, or a file"):
        load_template(None, str(tmp_path), {})
    with pytest.raises(DataError, match="there is no chat template odd: --prompt-type takes chatml, alpaca, or a file"):
        load_template("odd", str(tmp_path), {"chat_template": "x"})
    for odd in (5, [5], [{"name": "default"}]):
        with pytest.raises(DataError, match="has no chat template: write one"):
            load_template(None, str(tmp_path), {"chat_template": odd}, "write one")
    with pytest.raises(DataError, match="the chat template refuses it: division by zero"):
        ChatTemplate("{{ 1 / 0 }}", {}).text([])
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    assert load_template(None, str(tmp_path), {"chat_template": named}).text([]) == "y"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_template(None, str(tmp_path), {"chat_template": "x"}).text([]) == "file"
    assert load_template(str(tmp_path / "chat_template.jinja"), "", {}).text([]) == "file"


# Tokens #


def test_a_conversation(tmp_path, tokenizer):
    """One begin, the prompt masked, the closing token learnt; the same by every kind of rows."""
    from tokenizers import Tokenizer

    ((ids, mask, labels),) = prepared(tmp_path, tokenizer, [{"messages": TALK}], "OpenAI")
    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    bos, end = made.token_to_id("<s>"), made.token_to_id("</s>")
    assert ids[0] == bos and ids.count(bos) == 1 and set(mask) == {1}
    assert made.decode(ids, skip_special_tokens=False) == (
        "<s>[INST] Say one [/INST]  one\n two</s>[INST] And\nmore? [/INST] no</s>"
    )
    learnt = [x for x in labels if x != -100]
    assert made.decode(learnt, skip_special_tokens=False) == "  one\n two</s> no</s>" and learnt.count(end) == 2
    assert all(label in (-100, token) for label, token in zip(labels, ids))
    turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK]
    assert prepared(tmp_path, tokenizer, [{"conversations": turns}], "Sharegpt") == [[ids, mask, labels]]
    row = {"instruction": "And\nmore?", "input": "", "output": "no", "history": [["Say one", " one\n two"]]}
    assert prepared(tmp_path, tokenizer, [row], "Alpaca") == [[ids, mask, labels]]
    other = {"q": "And\nmore?", "a": "no", "history": [["Say one", " one\n two"]]}
    keys = json.dumps({"prompt": "q", "response": "a"})
    assert prepared(tmp_path, tokenizer, [other], "Alpaca", "--map-keys", keys) == [[ids, mask, labels]]


def test_packing_does_not_change_a_conversation(tmp_path, tokenizer, capsys):
    """Rows are full of whole ones, numbered; what is too long is counted."""
    rows = [{"instruction": "a" * (i % 7), "input": "", "output": "b" * (i % 5 + 1)} for i in range(40)]
    rows.append({"instruction": "a", "input": "", "output": "x y " * 60})
    words = ["--prompt-type", "chatml"]
    alone = [[ids, labels] for ids, _, labels in prepared(tmp_path, tokenizer, rows, "Alpaca", *words)]
    assert len(alone) == 40 and "1 left out where it does not fit into a row" in capsys.readouterr().out
    found = []
    rows_of_files = prepared(tmp_path, tokenizer, rows, "Alpaca", *words, "--pack")
    for ids, mask, labels in rows_of_files:
        assert len(ids) == 60
        for number in range(1, max(mask) + 1):
            chosen = [i for i, x in enumerate(mask) if x == number]
            assert chosen == list(range(chosen[0], chosen[-1] + 1))
            found.append([[ids[i] for i in chosen], [labels[i] for i in chosen]])
        assert all(label == -100 for label, number in zip(labels, mask) if number == 0)
    assert sorted(found) == sorted(alone) and len(rows_of_files) < 40
    for output, known in zip(OUTPUTS, ("all below", "not known", "not known")):
        assert known in tools.verify(f"{tmp_path}/x_{output}_document")
    assert "no ids but masks or labels" in tools.inspect(f"{tmp_path}/x_{OUTPUTS[2]}_document")


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_packed(lengths):
    groups = packed(lengths, 20)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= 20 for group in groups)
    assert len(groups) <= 2 * -(-sum(lengths) // 20) + 1


@pytest.mark.parametrize(
    "words, text",
    [
        (["--pack"], "--pack is for conversations: name their --handler-name, AlpacaStyleInstructionHandler"),
        (["--handler-name", "AlpacaStyleInstructionHandler"], "conversations need --seq-length, the longest that is kept"),
        (["--handler-name", "AlpacaStyleInstructionHandler", "--seq-length", 9, "--append-eod"], "leave --append-eod out"),
        (
            ["--handler-name", "AlpacaStyleInstructionHandler", "--seq-length", 9, "--map-keys", '{"turns": "x"}'],
            "--map-keys is an object of JSON with some of prompt, query, response, system, history, and columns for them",
        ),
        (
            [
                "--handler-name",
                "OpenAIStyleInstructionHandler",
                "--seq-length",
                9,
                "--tokenizer-type",
                "NullTokenizer",
                "--vocab-size",
                9,
            ],
            "9: conversations need a tokenizer.json, which says where in the text a token is",
        ),
    ],
)
def test_what_is_refused(tmp_path, tokenizer, capsys, words, text):
    (tmp_path / "x.jsonl").write_text("{}")
    command = ["prepare", "--input", tmp_path / "x.jsonl", "--tokenizer-name-or-path", tokenizer, "--output-prefix", tmp_path / "x"]
    assert exit_code(*command, *words) == 2
    assert text in capsys.readouterr().err


# Batches #


def write(folder: Path, rows: list[tuple[list[int], list[int], list[int]]]) -> Path:
    for output, column in zip(OUTPUTS, zip(*rows)):
        with IndexedWriter(folder / f"x_{output}_document", "int32") as out:
            for ids in column:
                out.add(ids)
    return folder / "x"


def test_batches_of_conversations(tmp_path):
    rows = [([5, 6, 7, 8, 9, 0], [1, 1, 1, 2, 2, 0], [-100, 6, 7, -100, 9, -100]), ([3, 4], [1, 1], [-100, 4])]
    batches = InstructionBatches(write(tmp_path, rows), 8, 2)
    batch = batches.batch(0)
    order = batch.ids[:, 0].argsort()[::-1]
    assert batch.documents is not None
    assert batch.ids[order].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0, 0]]
    assert batch.targets[order].tolist() == [[6, 7, -100, 9, *[-100] * 4], [4, *[-100] * 7]]
    assert batch.documents[order].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, *[1] * 6]]
    parts = [batches.batch(3, rank, 2).ids.tolist() for rank in range(2)]
    assert parts[0] + parts[1] == batches.batch(3).ids.tolist()
    assert json.loads(json.dumps(batches.described)) == batches.described
    assert batches.described != InstructionBatches(tmp_path / "x", 8, 2, seed=1).described
    with pytest.raises(IndexedError, match="has a row of 6 tokens, longer than 5: give a larger length"):
        InstructionBatches(tmp_path / "x", 5, 2)
    with pytest.raises(ValueError, match="has 2 rows, a step needs 3: use a smaller batch"):
        InstructionBatches(tmp_path / "x", 8, 3)
    with pytest.raises(ValueError, match="a global batch of 2 cannot be split evenly over 3 ranks"):
        batches.batch(0, 0, 3)


def test_files_that_do_not_belong_together(tmp_path):
    write(tmp_path, [([1, 2], [1, 1], [-100, 2])])
    for end in ("bin", "idx"):
        (tmp_path / f"x_packed_labels_document.{end}").unlink()
    with IndexedWriter(tmp_path / "x_packed_labels_document", "int32") as out:
        out.add([1, 2, 3])
    with pytest.raises(IndexedError, match=r"x_packed_labels_document has other rows than .*: prepare them together"):
        InstructionBatches(tmp_path / "x", 8, 1)


def test_rows_that_memory_cannot_hold_are_refused(tmp_path, tokenizer, capsys):
    """Where they are filled up to their length; else it is only the longest that is kept."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"instruction": "one", "input": "", "output": "two"}) + "\n")
    words = ["prepare", "--input", tmp_path / "x.jsonl", "--tokenizer-name-or-path", tokenizer, "--output-prefix", tmp_path / "x"]
    words += ["--handler-name", "AlpacaStyleInstructionHandler", "--seq-length", 10**12]
    assert exit_code(*words, "--pack") == 2
    error = capsys.readouterr().err
    assert error.startswith("bmtrain-ms: a row of 1,000,000,000,000 tokens takes 37,253 GiB") and error.count("\n") == 1
    assert exit_code(*words) == 0
    with pytest.raises(DataError, match="a row of 1,000,000,000,000 tokens takes"):
        InstructionBatches(tmp_path / "x", 10**12, 1)
