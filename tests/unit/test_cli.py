"""The commands without ranks: options, errors, which launcher with which words, exit codes. tests/ranks/test_demo.py runs them."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from bmtrain_ms_base import board as boards
from bmtrain_ms_base import system
from bmtrain_ms_base.launchers import Launch, detect
from bmtrain_ms_cli import demo as demo_module
from bmtrain_ms_cli import launch as launch_module
from bmtrain_ms_cli.demo import DemoOptions
from bmtrain_ms_cli.launch import LaunchError, launch
from bmtrain_ms_cli.main import main


def exit_code(*words: Any) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as error:  # argparse
        return error.code


@pytest.fixture
def parent(monkeypatch, tmp_path):
    """This process is not a rank of the demo, and in a folder that has no run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BMTRAIN_MS_DEMO", raising=False)


@pytest.fixture
def started(monkeypatch) -> list[tuple[list[str], int]]:
    """What `demo` launched."""
    calls: list[tuple[list[str], int]] = []

    def launch(script: list[str], ranks: int, variables: dict[str, str], rehearse: bool) -> int:
        assert variables == {"BMTRAIN_MS_DEMO": "rank"}
        calls.append((script, ranks))
        return 7

    monkeypatch.setattr(demo_module, "launch", launch)
    return calls


# Options #


def test_demo_defaults(parent, started, monkeypatch):
    assert exit_code("demo") == 7
    (script, ranks), *others = started
    assert ranks == 2 and not others
    assert Path(script[0]).name == "__main__.py" and script[1] == "demo"


ALL_OPTIONS = {
    "ranks": 3,
    "steps": 5,
    "batch": 6,
    "out": Path("some where"),
    "resume": True,
    "fp16": True,
    "loss_scale": 512.5,
    "zero": 2,
    "prefetch": 0,
    "gather_dtype": "int8",
    "shard_size": 1,
    "trace": Path("trace.json"),
    "seed": 4,
    "rehearse": True,
}


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS, {"ranks": 1, "fp16": False, "loss_scale": 2.0}], ids=["none", "all", "some"])
def test_the_ranks_get_the_options_of_the_user(parent, started, monkeypatch, tmp_path, options):
    """What `demo` passes on says to the ranks what the user said to it."""
    monkeypatch.chdir(tmp_path)
    Path("some where").mkdir()
    Path("some where/checkpoints").mkdir()
    Path("text.txt").write_text("Some words. " * 5000)
    words: list[Any] = ["demo", "--text", "text.txt"]
    for name, value in options.items():
        if value is not False:
            words += ["--" + name.replace("_", "-"), *([] if value is True else [value])]
    assert exit_code(*words) == 7
    seen: list[DemoOptions] = []
    monkeypatch.setattr(demo_module, "_run", lambda options: seen.append(options) or 0)
    assert "BMTRAIN_MS_DEMO" not in os.environ
    monkeypatch.setenv("BMTRAIN_MS_DEMO", "rank")
    assert exit_code(*started[0][0][1:]) == 0  # as one of the ranks
    (options_of_rank,) = seen
    for name, value in {**options, "text": Path("text.txt")}.items():
        assert getattr(options_of_rank, name) == value, name


@pytest.mark.parametrize(
    "words, text",
    [
        ([], "the following arguments are required: command"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--ranks", "0"], "argument --ranks: must be at least 1, not 0"),
        (["demo", "--batch", "-8"], "argument --batch: must be at least 1, not -8"),
        (["demo", "--steps", "many"], "argument --steps: must be a whole number, not 'many'"),
        (["demo", "--steps", "2.5"], "argument --steps: must be a whole number, not '2.5'"),
        (["demo", "--steps", ""], "argument --steps: must be a whole number, not ''"),
        (["demo", "--zero", "1"], "argument --zero: invalid choice: 1"),
        (["demo", "--zero", "x"], "argument --zero: must be a whole number, not 'x'"),
        (["demo", "--loss-scale", "big"], "argument --loss-scale: must be a number, not 'big'"),
        (["demo", "--save-minutes", "1m"], "argument --save-minutes: must be a number, not '1m'"),
        (["demo", "--seed", "-1"], "argument --seed: must be between 0 and 4294967295, not -1"),
        (["demo", "--text", ""], "argument --text: must be a path, not ''"),
        (["demo", "--step", "5"], "unrecognized arguments: --step 5; --step: did you mean --steps?"),
        (["demo", "--res"], "unrecognized arguments: --res; --res: did you mean --resume?"),
        (["demo", "--save", "5"], "--save: did you mean --save-interval or --save-minutes?"),
        (["demo", "--prefech=2"], "unrecognized arguments: --prefech=2; --prefech: did you mean --prefetch?"),
        (["demo", "--frobnicate"], "bmtrain-ms demo: unrecognized arguments: --frobnicate (see bmtrain-ms demo --help)"),
        (["launch", "--rank", "2", "script.py"], "--rank: did you mean --ranks?"),
        (["ckpt", "consolidate", "a", "b", "--every"], "--every: did you mean --everything?"),
        (["ckpt", "reshard", "a", "b", "--rank=2"], "--rank: did you mean --ranks?"),
        (["launch", "script.py"], "the following arguments are required: -n/--ranks"),
        (["launch", "-n", "2"], "the following arguments are required: script"),
        (["launch", "-n", "2", "--with", "ssh", "script.py"], "argument --with: invalid choice: 'ssh'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_argparse_refuses(parent, started, words, text, capsys):
    assert exit_code(*words) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and error.startswith("bmtrain-ms") and not started


def test_options_of_the_script_are_its_own(planned, script):
    assert exit_code("launch", "-n", 1, script, "--step", "5", "--rank") == 5
    assert planned[0][0]["command"][-3:] == ["--step", "5", "--rank"]


@pytest.mark.parametrize(
    "words, text",
    [
        (["--batch", "8", "--ranks", "3"], "--batch 8 is not a multiple of --ranks 3"),
        (["--fp16"], "--fp16 needs --loss-scale (try 1024): without it small gradients become zero"),
        (["--loss-scale", "0"], "--loss-scale must be positive and finite, not 0.0"),
        (["--loss-scale", "inf"], "--loss-scale must be positive and finite, not inf"),
        (["--loss-scale", "nan"], "--loss-scale must be positive and finite, not nan"),
        (["--prefetch", "-1"], "--prefetch must be 0 or more, not -1"),
        (["--text", "missing.txt"], "--text missing.txt does not exist"),
        (["--text", "."], "--text . is a folder; give one UTF-8 file (cat joins several)"),
        (["--text", "/dev/null/x"], "--text /dev/null/x cannot be read: Not a directory"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: /dev/null is not a folder that can be written to"),
        (["--save-minutes", "-1"], "--save-minutes must be positive, not -1.0"),
        (["--save-minutes", "nan"], "--save-minutes must be positive, not nan"),
        (["--resume", "--out", "empty"], "--resume: there is no folder checkpoints in empty; run without --resume first"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_demo_refuses(parent, started, words, text, capsys, tmp_path, monkeypatch):
    """One line, before anything is started."""
    monkeypatch.chdir(tmp_path)
    assert exit_code("demo", *words) == 2
    assert capsys.readouterr().err == f"bmtrain-ms: {text}\n"
    assert not started and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "text.txt contains no text"),
        (b"\xef\xbb\xbf\n", "text.txt contains no text"),
        ("abc".encode("utf-16"), "text.txt is UTF-16, by its byte-order mark; convert it first: iconv -f UTF-16 -t UTF-8"),
        (b"abc\xff", "text.txt is not UTF-8 text: byte 3 is 0xff; convert it first"),
        (b"abc\0", "text.txt is not text: byte 3 is 0; it is a binary file, or UTF-16 (then convert it first)"),
    ],
    ids=["empty", "mark", "UTF-16", "Latin-1", "binary"],
)
def test_a_text_that_is_none_starts_no_rank(parent, started, content, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(content)
    assert exit_code("demo", "--text", "text.txt") == 2 and not started
    assert capsys.readouterr().err == f"bmtrain-ms: --text {text}\n"


@pytest.mark.parametrize("text", ["Some words. " * 40, "ab " * 700, "天地" * 800], ids=["words", "short words", "Chinese"])
def test_a_text_that_is_too_short_says_how_long_it_must_be(parent, started, text, capsys, tmp_path):
    """And so long a one will do."""
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert exit_code("demo", "--text", path) == 2 and not started
    error = capsys.readouterr().err
    assert error.startswith(f"bmtrain-ms: --text {path} is too short: {len(text):,} characters make ") and error.count("\n") == 1
    assert "--batch 8 needs 1,025 and 129; give " in error
    wanted = int(error.split("; give ")[1].split(" characters or more, or a smaller --batch")[0].replace(",", ""))
    path.write_text((text * 1000)[:wanted])
    assert exit_code("demo", "--text", path) == 7


def test_a_batch_that_the_help_texts_cannot_fill(parent, started, capsys):
    assert exit_code("demo", "--batch", 4096) == 2 and not started
    error = capsys.readouterr().err
    assert error.startswith("bmtrain-ms: the help texts of Python are too short: ") and "batch 4096 needs 524,289 and 129" in error


def test_paths_may_begin_at_home(parent, started, tmp_path, monkeypatch):
    """A shell leaves the `~` of `--out=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("Some words. " * 5000)
    assert exit_code("demo", "--text=~/text.txt", "--out=~/run", "--trace=~/trace.json") == 7
    words = started[0][0]
    for option, name in (("--text", "text.txt"), ("--out", "run"), ("--trace", "trace.json")):
        assert words[words.index(option) + 1] == str(tmp_path / name)


def test_demo_does_not_write_over_a_run(parent, started, capsys, tmp_path):
    """Which a run that dies before its first save would go on from, with another tokenizer."""
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert exit_code("demo", "--out", str(tmp_path)) == 2 and not started
    text = f"there is a run in {tmp_path} already (step-00000004); go on with --resume, choose another --out, or delete it"
    assert capsys.readouterr().err == f"bmtrain-ms: {text}\n"


def test_help(capsys):
    assert exit_code("--help") == 0 and exit_code("demo", "--help") == 0
    out = capsys.readouterr().out
    assert "usage: bmtrain-ms" in out and "--loss-scale" in out and "(default 2)" in out


def test_the_command_is_installed():
    found = entry_points()
    scripts = found.select(group="console_scripts") if hasattr(found, "select") else found["console_scripts"]
    assert {e.value for e in scripts if e.name == "bmtrain-ms"} == {"bmtrain_ms_cli.main:main"}  # 3.9 finds it twice


# Which launcher #


@pytest.fixture
def planned(monkeypatch) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Plan and environment of what `launch` would have started; nothing is."""
    calls: list[tuple[dict[str, Any], dict[str, str]]] = []

    def attend(plan: dict[str, Any], env: dict[str, str]) -> int:
        calls.append((plan, env))
        return 5

    monkeypatch.setattr(launch_module, "_attend", attend)
    for name in [name for name in os.environ if name.startswith(("HYDRA_", "UCX_"))]:
        monkeypatch.delenv(name)
    return calls


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "train.py").touch()
    return str(tmp_path / "train.py")


RUNNER = [sys.executable, str(Path(launch_module.__file__).with_name("rank.py"))]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_of_one_host_need_no_mpi(planned, script, monkeypatch, ranks):
    monkeypatch.setattr(launch_module, "has_ascend", lambda: False)
    assert launch([script, "--a", "b"], ranks) == 5
    plan, _ = planned[0]
    assert (plan["kind"], plan["ranks"], plan["scheduler"]) == ("launch", ranks, None)
    assert plan["command"] == [*RUNNER, script, "--a", "b"]


def test_mpiexec_where_it_is_asked_for(planned, script, monkeypatch):
    """Of this host only, unless Hydra's variables say where."""
    launch([script, "a"], 3, "mpi")
    (program, *words), env = planned[0][0]["command"], planned[0][1]
    assert words[-len(RUNNER) - 4 :] == ["-n", "3", *RUNNER, script, "a"]
    assert Path(program).name == "mpiexec.gforker" or words[:6] == ["-launcher", "fork", "-rmk", "user", "-iface", "lo"]
    assert env["UCX_NET_DEVICES"] == "lo"
    monkeypatch.setenv("HYDRA_HOST_FILE", "hosts")
    monkeypatch.setenv("PMI_RANK", "0")
    launch([script], 3, "mpi")
    (program, *words), env = planned[1][0]["command"], planned[1][1]
    assert Path(program).name == "mpiexec" and words[:2] == ["-n", "3"]
    assert env["HYDRA_HOST_FILE"] == "hosts" and not {"UCX_NET_DEVICES", "PMI_RANK"} & set(env)


def test_mpiexec_of_an_mpich_without_gforker(planned, script, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(launch_module.shutil, "which", lambda name: f"/opt/{name}")
    launch([script], 2, "mpi")
    assert planned[0][0]["command"][:9] == ["/opt/mpiexec", "-launcher", "fork", "-rmk", "user", "-iface", "lo", "-n", "2"]


def test_msrun_on_ascend(planned, script, monkeypatch):
    """The same Python on every rank, and the variables of msrun."""
    monkeypatch.setattr(launch_module, "has_ascend", lambda: True)
    assert exit_code("launch", "-n", 2, script, "-n", "x") == 5
    plan, _ = planned[0]
    assert (plan["kind"], plan["command"]) == ("msrun", [*RUNNER, script, "-n", "x"])
    first, second = plan["variables"]
    port = first["MS_SCHED_PORT"]
    assert 1024 <= int(port) < 65536 and {**first, "MS_NODE_ID": "1", "RANK_ID": "1", "DEVICE_ID": "1"} == second
    assert detect({**second, "BMTRAIN_MS_LOCAL_SIZE": "2"}) == Launch("msrun", 1, 2, 1, 2)
    command, variables = plan["scheduler"]
    assert command[0] == sys.executable and (variables["MS_ROLE"], variables["MS_SCHED_PORT"]) == ("MS_SCHED", port)


@pytest.mark.parametrize("ascend", [False, True])
def test_the_user_may_choose(planned, script, monkeypatch, capsys, ascend):
    monkeypatch.setattr(launch_module, "has_ascend", lambda: ascend)
    exit_code("launch", "-n", 2, "--with", "mpi", script)
    code = exit_code("launch", "-n", 2, "--with", "msrun", script)
    assert code == (5 if ascend else 2)
    assert [plan["kind"] for plan, _ in planned] == (["mpi", "msrun"] if ascend else ["mpi"])
    told = f"this host has no Ascend device; start CPU ranks with: bmtrain-ms launch -n 2 {script}"
    assert capsys.readouterr().err == ("" if ascend else f"bmtrain-ms: --with msrun starts Ascend ranks, and {told}\n")


def test_environment_of_the_ranks(planned, script, monkeypatch):
    """Each rank gets its share of the cores, unless the user said something else; nothing of other launchers."""
    for name in ("GLOG_v", "OMP_NUM_THREADS", "BMTRAIN_MS_LOCAL_SIZE", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OTHER", "kept")
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_SIZE", "MS_ROLE", "WORLD_SIZE", "SLURM_PROCID", "BMTRAIN_MS_BOARD"):
        monkeypatch.setenv(name, "1")
    for ranks in (1, 3, 16):
        launch([script], ranks, "launch", {"MORE": "said"})
    assert [env["OMP_NUM_THREADS"] for _, env in planned] == ["8", "2", "1"]
    assert [env["BMTRAIN_MS_LOCAL_SIZE"] for _, env in planned] == ["1", "3", "16"]
    assert all((env["GLOG_v"], env["OTHER"], env["MORE"]) == ("3", "kept", "said") for _, env in planned)
    assert all(env["GLIBC_TUNABLES"] == "glibc.cpu.x86_non_temporal_threshold=0x400000" for _, env in planned)
    others = {"PMI_RANK", "OMPI_COMM_WORLD_SIZE", "MS_ROLE", "WORLD_SIZE", "SLURM_PROCID", boards.ADDRESS}
    assert not any(others & set(env) for _, env in planned)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GLOG_v", "0")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
    launch([script], 4, "mpi")
    assert (planned[-1][1]["OMP_NUM_THREADS"], planned[-1][1]["GLOG_v"]) == ("5", "0")
    assert planned[-1][1]["GLIBC_TUNABLES"] == "glibc.malloc.perturb=0"


def test_a_module_by_its_name(planned, monkeypatch):
    """What follows the name is the module's, options too."""
    monkeypatch.setattr(launch_module, "has_ascend", lambda: False)
    for words in (["-n", 2, "-m"], ["-m", "-n", 1], ["-n", 2, "--with", "auto", "--module"]):
        assert exit_code("launch", *words, "some.module", "-m", "--plot", "x") == 5
    assert all(plan["command"] == [*RUNNER, "-m", "some.module", "-m", "--plot", "x"] for plan, _ in planned)


def test_a_script_runs_as_with_python(tmp_path, capfd, monkeypatch):
    """As `__main__`, with its own folder on the path, which the objects that it defines can be pickled from."""
    (tmp_path / "beside.py").write_text("value = 4")
    (tmp_path / "job.py").write_text(
        "import sys, pickle, beside\nclass A: pass\npickle.loads(pickle.dumps(A()))\n"
        "print(__name__, __file__, sys.argv, sys.path[0], beside.value, sys.modules['__main__'].A is A)\nsys.exit('text')"
    )
    monkeypatch.chdir(tmp_path)
    assert exit_code("launch", "-n", 1, "job.py", "a", "--b") == 1
    out, err = capfd.readouterr()
    assert out == f"__main__ job.py ['job.py', 'a', '--b'] {tmp_path} 4 True\n"
    assert re.fullmatch(r"text\nbmtrain-ms: rank 0 \(pid \d+\) failed: text; exit code 1\n", err)


def test_a_module_runs_as_with_python(tmp_path, capfd, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "job.py").write_text(
        "import sys\nfrom . import __name__ as n\nprint(__name__, n, sys.argv[1:])\nsys.exit(3)"
    )
    monkeypatch.chdir(tmp_path)
    assert exit_code("launch", "-n", 1, "-m", "package.job", "a", "--b") == 3
    assert capfd.readouterr().out == "__main__ package ['a', '--b']\n"
    assert exit_code("launch", "-n", 1, "-m", "package.nothing") == 1
    assert "No module named package.nothing" in capfd.readouterr().err


@pytest.mark.parametrize("devices, found", [([], False), (["davinci_manager"], False), (["davinci0"], True), (["davinci12"], True)])
def test_has_ascend(monkeypatch, tmp_path, devices, found):
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(system, "Path", lambda path: tmp_path if path == "/dev" else Path(path))
    assert system.has_ascend() is found


def test_mpiexec_is_not_installed(script, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(launch_module.shutil, "which", lambda name: None)
    with pytest.raises(LaunchError, match=r"mpiexec was not found; pip install 'bmtrain-ms\[cpu\]'"):
        launch([script], 2, "mpi")


def test_missing_script(capsys, tmp_path):
    assert exit_code("launch", "-n", 2, tmp_path / "none.py") == 2
    assert capsys.readouterr().err == f"bmtrain-ms: {tmp_path}/none.py does not exist\n"
    assert exit_code("launch", "-n", 2, tmp_path) == 2
    assert capsys.readouterr().err == f"bmtrain-ms: {tmp_path} is a folder: name a script, or a module with -m\n"


# Processes #


def written(tmp_path: Path, body: str) -> str:
    path = tmp_path / "script.py"
    path.write_text("import os, signal, subprocess, sys, time\n" + textwrap.dedent(body))
    return str(path)


@pytest.mark.parametrize("body, code", [("", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_exit_codes(tmp_path, body, code):
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    assert launch([written(tmp_path, body)], 1) == code
    assert {s: signal.getsignal(s) for s in before} == before  # the caller's handlers are back


def alive(pid: int) -> bool:
    """Zombies are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_is_left_behind(tmp_path):
    """A rank that ends leaves a process of its own; the launcher ends it."""
    body = "print(subprocess.Popen(['sleep', '60']).pid, file=open(sys.argv[1], 'w'), flush=True)"
    assert launch([written(tmp_path, body), str(tmp_path / "pid")], 1) == 0
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not alive(pid))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_nothing_stays(tmp_path, signum):
    """To a process that ignores them too: it is killed."""
    body = """
    child = subprocess.Popen([sys.executable, '-c', 'import signal, time\\n'
                              'for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\\n'
                              'print(1, flush=True); time.sleep(60)'], stdout=subprocess.PIPE)
    child.stdout.readline()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open(sys.argv[1] + '.new', 'w') as file:
        file.write(f'{os.getpid()} {child.pid}')
    os.rename(sys.argv[1] + '.new', sys.argv[1])
    time.sleep(60)
    """
    program = "import sys; from bmtrain_ms_cli.launch import launch; sys.exit(launch(sys.argv[1:], 1))"
    pids = tmp_path / "pids"
    launcher = subprocess.Popen([sys.executable, "-c", program, written(tmp_path, body), str(pids)])
    try:
        wait_until(pids.exists, 60)
        ranks = [int(word) for word in pids.read_text().split()]
        assert all(map(alive, ranks))
        launcher.send_signal(signum)
        assert launcher.wait(20) == 128 + signum
        wait_until(lambda: not any(map(alive, ranks)))
    finally:
        launcher.kill()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_whose_folder_is_a_file_is_refused_before_it_begins(tmp_path, capsys, command):
    (tmp_path / "out").write_text("")
    (tmp_path / "text.txt").write_text("a text\n")
    (tmp_path / "config.json").write_text("{}")
    model = "--model.family=llama" if command == "pretrain" else f"--model.pretrained={tmp_path}"
    words = [
        model,
        "--train.steps=1",
        "--tokenizer.path=x",
        f"--data.text=['{tmp_path / 'text.txt'}']",
        f"--out={tmp_path / 'out'}",
    ]
    assert main([command, *words]) == 2
    assert (
        capsys.readouterr().err == f"bmtrain-ms: out: {tmp_path / 'out'} is not a folder: name one, it is made if it is not there\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        "demo --out={}",
        "demo --trace={}/x",
        "launch -n 1 {}",
        "generate --model {} --prompt x",
        "ckpt inspect {}",
        "ckpt verify {}",
        "ckpt diff {} {}",
        "ckpt reshard --ranks 1 {} out",
        "convert hf2ms {} out",
        "convert hf2ms . {}",
        "ckpt inspect ~nosuchuser/x",
    ],
)
def test_what_the_system_has_against_a_path_is_one_line(parent, words, capsys):
    name = "x" * 300
    assert exit_code(*words.format(name, name).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("bmtrain-ms: ") and error.count("\n") == 1


def test_a_folder_that_may_not_be_looked_into_is_one_line(parent, capsys, monkeypatch):
    def refuse(path: Path, *words: Any, **named: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert exit_code("generate", "--model", "closed/model", "--prompt", "x") == 2
    assert capsys.readouterr().err == "bmtrain-ms: closed/model: Permission denied\n"


def test_the_demo_does_not_begin_again_over_its_results(parent, started, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    assert exit_code("demo", "--out", "run") == 2
    advice = "choose another --out, or move it"
    text = f"bmtrain-ms: run/model.safetensors is there, of a run whose checkpoints are gone; {advice}\n"
    assert capsys.readouterr().err == text and not started
    (tmp_path / "run" / "checkpoints").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: "checkpoints" not in str(path))
    assert exit_code("demo", "--out", "run", "--resume") == 2
    assert capsys.readouterr().err == "bmtrain-ms: --out run: run/checkpoints is not a folder that can be written to\n"
