"""Settings of a run: read, checked all at once, and written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmtrain_ms_base.config import ConfigError, Settings, passes_of, read_settings, schema, to_toml
from bmtrain_ms_base.config.fitting import skipped
from tests.helpers.settings_table import rows

GOOD = ["model.family=llama", "data.text=['corpus']", "tokenizer.train=500"]


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    return tmp_path


def wrong(*overrides: str, ranks: int = 0, tuning: bool = False, good: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_settings(None, [*(GOOD if good else []), *overrides], ranks, tuning)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", ["run.toml", "run.yaml", "run.json"])
def test_files_of_each_kind_say_the_same(corpus: Path, name: str) -> None:
    texts = {
        "run.toml": '[model]\nfamily = "llama"\ndim_model = 64\n[data]\ntext = ["corpus"]\n[tokenizer]\ntrain = 500\n'
        "[optimizer]\nlr = 1e-3\n[layout]\nrecompute = false",
        "run.yaml": "model: {family: llama, dim_model: 64}\ndata: {text: [corpus]}\ntokenizer: {train: 500}\n"
        "optimizer: {lr: 1e-3}\nlayout: {recompute: false}",
        "run.json": json.dumps(
            {
                "model": {"family": "llama", "dim_model": 64},
                "data": {"text": ["corpus"]},
                "tokenizer": {"train": 500},
                "optimizer": {"lr": 1e-3},
                "layout": {"recompute": False},
            }
        ),
    }
    (corpus / name).write_text(texts[name])
    settings = read_settings(name, [], 0)
    assert settings.model.sizes == {"dim_model": 64}
    assert settings.optimizer.lr == 1e-3
    assert not settings.layout.recompute


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("run.json", '{"train": {"steps": 5, "steps": 500}}', "'steps' is there twice: leave one of them out"),
        ("run.yaml", "train:\n  steps: 5\n  steps: 500\n", "'steps' is there twice: leave one of them out"),
        ("run.yaml", "train: {steps: 5}\ntrain: {steps: 6}\n", "'train' is there twice: leave one of them out"),
        ("run.toml", "[train]\nsteps = 5\nsteps = 500\n", "verwrite"),
        ("run.json", '{"train": ' + "[" * 100_000, "its brackets are nested too deep to be settings"),
        ("run.toml", "train = " + "[" * 5_000, "its brackets are nested too deep to be settings"),
        ("run.yaml", "train: " + "[" * 5_000, "its brackets are nested too deep to be settings"),
        ("run.ini", "", "the name ends neither in .toml nor in .yaml nor in .json"),
    ],
    ids=lambda x: x[:20],
)
def test_files_that_are_none(corpus: Path, name: str, text: str, told: str) -> None:
    (corpus / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(name, GOOD, 0)
    assert str(caught.value).startswith(f"{name}: ") and told in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_yaml_may_take_over_names_from_another_section(corpus: Path) -> None:
    """With names of its own that count more, also where the other section has taken over some itself."""
    (corpus / "run.yaml").write_text(
        "train: {steps: 5, <<: &c {<<: &b {eval_batches: 2, steps: 7}, eval_batches: 3}}\n"
        "faults: {skip: [1], <<: &s {<<: {spike: 4.0}, spike: 3.0}}\nlog: {}\n"
    )
    assert read_settings("run.yaml", GOOD, 0).faults.spike == 3.0
    assert read_settings("run.yaml", GOOD, 0).train.model_dump(exclude_defaults=True) == {"steps": 5, "eval_batches": 3}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["nan", "c"], "a weight is a positive number, not nan"),
        (["-1", "c"], "a weight is a positive number, not -1"),
        ([0.0, "c"], "a weight is a positive number, not 0.0"),
        (["inf", "c"], "a weight is a positive number, not inf"),
        (["1e308", "c", "1e308", "c"], "the weights are too large to be added up"),
        (["0.3"], "several are weights and prefixes in turn"),
        (["c", "c"], "several are weights and prefixes in turn"),
        (["0.3", "c", "0.7"], "several are weights and prefixes in turn"),
        ([0.3, 0.7], "several are weights and prefixes in turn"),
        (["0.3", "c", "0.7", "d"], "there is no d.bin with its .idx"),
        (["0.3", "c", 0.7, "c"], ""),
        (["c"], ""),
    ],
)
def test_weights_of_files(corpus: Path, files: list[Any], told: str) -> None:
    for end in (".bin", ".idx"):
        (corpus / f"c{end}").write_text("")
    words = ["data.text=[]", f"data.files={json.dumps(files)}", "tokenizer.train=null"]
    if not told:
        read_settings(None, [*GOOD, *words], 0)
        return
    lines = wrong(*words)
    assert len(lines) == 1 and lines[0].startswith(f"data.files: {told}")


@pytest.mark.parametrize("split", ["1", "1,0,1", "1/0"])
def test_an_evaluation_needs_validation_data(split: str) -> None:
    assert wrong("train.eval_every=2", f"data.split='{split}'") == [
        "train.eval_every: there are no validation data: data.split has none, or data are conversations"
    ]


def test_a_file_may_begin_with_a_mark_of_its_encoding(corpus: Path) -> None:
    (corpus / "run.toml").write_text("[train]\nsteps = 5\n", encoding="utf-8-sig")
    assert read_settings("run.toml", GOOD, 0).train.steps == 5


def test_the_command_line_counts_more_than_the_file(corpus: Path) -> None:
    (corpus / "run.toml").write_text('[model]\nfamily = "llama"\n[data]\ntext = ["corpus"]\n[tokenizer]\ntrain = 500\n')
    settings = read_settings("run.toml", ["model.family=qwen3", "train.steps=7", "out=runs/x y", "model.dim_model=32"], 0)
    assert (settings.model.family, settings.train.steps, settings.out) == ("qwen3", 7, "runs/x y")
    assert settings.model.sizes == {"dim_model": 32}


def test_what_is_printed_says_the_same_when_it_is_read(corpus: Path) -> None:
    more = ["batch.ramp_up={start = 2, increment = 2, samples = 100}", "layout.stages=[1, 2]", "layout.pp=2", "layout.ranks=2"]
    settings = read_settings(None, [*GOOD, *more], 0)
    (corpus / "again.toml").write_text(to_toml(settings))
    assert read_settings("again.toml", [], 0) == settings


def test_all_that_is_wrong_is_said_at_once() -> None:
    lines = wrong(
        "train.stepz=3",
        "optimizer.lr=-1",
        "train.steps=true",
        "layout.zero_level=4",
        "model.famly=llama",
        "bacth.size=3",
        good=False,
    )
    told = "\n".join(lines)
    assert "train.stepz: there is no such setting; did you mean steps?" in told
    assert "bacth: there is no such setting; did you mean batch?" in told
    assert "optimizer.lr: must be greater than 0, not -1" in told
    assert "train.steps: must be a valid integer, not True" in told
    assert "layout.zero_level: must be 2 or 3, not 4" in told


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["layout.tp=2", "layout.ranks=3"], "layout: tp=2 times pp=1 does not divide 3 rank(s)"),
        (["layout.ranks=4", "layout.ep=3"], "layout.ep: 3 does not divide the 4 data-parallel rank(s)"),
        (["layout.ranks=4", "batch.size=6"], "batch.size: 6 is not a multiple of 4 data-parallel rank(s); 4 or 8 are"),
        (["batch.micro=3"], "batch.size: 8 is not a multiple of 1 data-parallel rank(s) times batch.micro=3; 6 or 9 are"),
        (["batch.ramp_up={start = 2, increment = 4, samples = 9}"], "the batch does not come to 8"),
        (["layout.stages=[2, 2]"], "layout: stages, schedule and chunks are of a pipeline: set pp"),
        (["schedule.warmup=2000"], "schedule.warmup: 2000 steps are more than the 1000 of the whole schedule"),
        (["schedule.name=wsd", "schedule.decay=990", "schedule.warmup=20"], "does not fit into 1000 steps"),
        (["schedule.min_lr=1.0"], "schedule.min_lr: 1.0 is above optimizer.lr=0.0003"),
        (["schedule.name=constant", "schedule.min_lr=1e-5"], "linear, cosine and wsd have one, constant has not"),
        (["schedule.gamma=0.5"], "schedule.gamma: only exponential has one, cosine has not"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas: must be at least 0 and below 1"),
        (["model.dtype=float16"], "optimizer.loss_scale: float16 needs one"),
        (["save.best=true"], "save.best: it is chosen by evaluations during training: set train.eval_every"),
        (["faults.skip=['9-3']"], "faults.skip: '9-3' is neither a number nor a range"),
        (["lora.rank=4"], "lora: adapters are for finetune"),
        (["model.like=nowhere"], "model: give one of family, like, pretrained, not family and like"),
        (["data.files=['x']"], "data: give one of text, files, rows, not text and files"),
        (["data.text=['nowhere']"], "data.text: there is no nowhere"),
        (["tokenizer.path=corpus"], "tokenizer: give path, or train, not both"),
        *(
            ([f"data.split='{x}'"], f"data.split: a split is up to three numbers that are not all zero, e.g. 969,30,1; not '{x}'")
            for x in ("9,x", "nan,inf,0", "0,0,0", "-5,10,0", "1,2,3,4")
        ),
        (["model.vocab_size=100"], "model.vocab_size: 100 is less than tokenizer.train=500: the table would lack ids"),
        (["faults.skip=['0-99999999999']"], "faults.skip: '0-99999999999' leaves out 100,000,000,000 batches; at most 1,000,000"),
        (
            ["model.pretrained=corpus"],
            "tokenizer.train: model.pretrained has a tokenizer, which its weights belong to; leave train out",
        ),
        (["data.template=chatml"], "data.template: it is for conversations; name their data.handler"),
    ],
)
def test_what_does_not_fit_together_is_said_with_what_to_change(overrides: list[str], told: str) -> None:
    assert told in "\n".join(wrong(*overrides))


def test_finetune_needs_a_model_that_is_there() -> None:
    assert "finetune goes on from a model that is there" in wrong(tuning=True)[0]


def test_another_number_of_ranks_than_the_launchers_is_refused() -> None:
    assert wrong("layout.ranks=2", ranks=4) == ["layout.ranks: 2 are asked for, and a launcher has started 4"]


@pytest.mark.parametrize(
    ("text", "told"),
    [("a = [", "run.toml: "), ("", "must be"), ("model = 3\ndata = {text = ['corpus']}", "model: is a section")],
)
def test_files_that_are_no_settings(corpus: Path, text: str, told: str) -> None:
    (corpus / "run.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings("run.toml", [] if text else ["train.steps=x"], 0)
    assert told in str(caught.value)


def test_files_that_are_not_there(corpus: Path) -> None:
    (corpus / "run.ini").write_text("")
    for name, told in (("nowhere.toml", "cannot be read"), ("run.ini", "ends neither in .toml nor in .yaml")):
        with pytest.raises(ConfigError, match=told):
            read_settings(name, [], 0)


@given(st.sets(st.integers(0, 60)))
def test_ranges_of_batches_to_skip(numbers: set[int]) -> None:
    assert skipped([*map(str, sorted(numbers)), *numbers]) == sorted(numbers)
    assert skipped(["3-5", 9]) == [3, 4, 5, 9]


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 3)
)
def test_a_step_is_a_whole_number_of_passes(dp: int, pp: int, micro: int, start: int, more: int, told: bool, phases: int) -> None:
    unit = dp * micro
    ramp = {"start": start * unit, "increment": more * unit, "samples": 10} if phases else None
    batch: dict[str, Any] = {"size": (start + more * phases) * unit, "ramp_up": ramp, "micro": micro if told else None}
    settings = Settings.model_validate({"layout": {"pp": pp}, "batch": batch})
    rows, pieces = passes_of(settings, dp * pp)
    for size in [start * unit + i * more * unit for i in range(phases + 1)]:
        assert size // dp % rows == 0
    assert rows % pieces == 0
    if told:
        assert rows // pieces == micro


def test_the_schema_is_strict_and_knows_each_setting() -> None:
    made = schema({"dim_model": {"type": "integer"}})
    assert made["$defs"]["ModelSection"]["properties"]["dim_model"] == {"type": "integer"}
    for section in made["$defs"].values():
        assert section["additionalProperties"] is False
    assert made["properties"]["seed"]["maximum" if "maximum" in made["properties"]["seed"] else "exclusiveMaximum"] == 1 << 32


def test_no_mindspore_is_needed() -> None:
    import subprocess

    program = "import sys; sys.modules['mindspore'] = None; import bmtrain_ms_base.config"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_docs_have_each_setting() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    missing = [row for row in rows() if row not in page]
    assert not missing, "python -m tests.helpers.settings_table writes the table of docs/training.md"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[2] / "docs" / "recipes").rglob("*.toml")), ids=lambda p: p.stem
)
def test_recipes_are_right(path: Path) -> None:
    """But for the files that they name, which are the user's."""
    try:
        read_settings(str(path), [], 0, tuning="lora" in path.name)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith(
                ("data.files: there is no ", "data.text: there is no ", "model.pretrained: there is no config")
            ), line
