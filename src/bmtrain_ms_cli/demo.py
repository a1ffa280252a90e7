"""`bmtrain-ms demo`: the whole way from text to a model that writes, on CPU ranks."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Iterator

from .launch import LaunchError, launch
from .options import REHEARSE_HELP, Commands, number, path, positive, seed, whole
from .places import nearest, takes_files

_LENGTH = 128
_VOCAB = 2048
_RATE = 3e-3  # at its peak
_WARMUP = 20  # steps
_PROMPTS = ("The ", "A class definition", "When an exception")


@dataclass(frozen=True)
class DemoOptions:
    """What the command line says; see `bmtrain-ms demo --help`."""

    ranks: int
    steps: int
    batch: int
    text: Path | None
    out: Path
    resume: bool | str
    fp16: bool
    loss_scale: float | None
    zero: int
    prefetch: int
    gather_dtype: str | None
    shard_size: int | None
    trace: Path | None
    seed: int
    save_interval: int | None = None
    save_minutes: float | None = None
    keep_last: int = 3
    no_shared_storage: bool = False
    rehearse: bool = False


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms demo` understands."""
    parser = commands.add_parser(
        "demo",
        help="train a small Llama on text",
        description="Train a BPE tokenizer and a small Llama on the help texts that every Python ships, with ZeRO-3 on CPU "
        "ranks; evaluate, save, resume, plot the loss and generate text.",
    )
    parser.add_argument("--ranks", type=positive, default=2, help="processes; results do not depend on it (default 2)")
    parser.add_argument("--steps", type=positive, default=360, help="training steps in all, resumed ones included (default 360)")
    parser.add_argument("--batch", type=positive, default=8, help="windows per step over all ranks (default 8)")
    parser.add_argument("--text", type=path, default=None, help="train on this UTF-8 file instead")
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="folder for results (default runs/demo)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from the latest checkpoint in --out, or from this one: a step, or a folder",
    )
    parser.add_argument("--fp16", action="store_true", help="float16 parameters with float32 masters; needs --loss-scale")
    parser.add_argument("--loss-scale", type=number, default=None, help="switch dynamic loss scaling on, from this scale")
    parser.add_argument("--zero", type=whole, choices=(2, 3), default=3, help="ZeRO level (default 3)")
    parser.add_argument("--prefetch", type=whole, default=1, help="blocks gathered ahead; 0 turns overlap off (default 1)")
    parser.add_argument(
        "--gather-dtype", choices=("float16", "bfloat16", "int8"), default=None, help="gather parameters in fewer bits"
    )
    parser.add_argument("--shard-size", type=positive, default=None, help="shard over so many ranks, replicate across the others")
    parser.add_argument(
        "--trace", type=path, default=None, help="write what happens when to this file (chrome://tracing, Perfetto)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of initialisation, data order and sampling (default 0)")
    parser.add_argument("--save-interval", type=positive, default=None, help="save every so many steps, in the background")
    parser.add_argument("--save-minutes", type=number, default=None, help="save every so many minutes, in the background")
    parser.add_argument("--keep-last", type=positive, default=3, help="checkpoints to keep (default 3)")
    parser.add_argument("--no-shared-storage", action="store_true", help="every host keeps what its ranks wrote")
    parser.add_argument("--rehearse", action="store_true", help=REHEARSE_HELP)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        LaunchError: see `demo`.
    """
    return demo(DemoOptions(**{field.name: getattr(arguments, field.name) for field in fields(DemoOptions)}))


def demo(options: DemoOptions) -> int:
    """Start the ranks, or be one of them; returns an exit code.

    Raises:
        LaunchError: options that do not fit together, or ranks that cannot be started.
    """
    _check(options)
    if "BMTRAIN_MS_DEMO" not in os.environ:
        from .text import check_text  # NumPy, which other commands need not wait for

        check_text(options.text, options.batch, _LENGTH, _VOCAB)
        script = [str(Path(__file__).with_name("__main__.py")), *_arguments(options)]
        return launch(script, options.ranks, variables={"BMTRAIN_MS_DEMO": "rank"}, rehearse=options.rehearse)
    return _run(options)


def _arguments(options: DemoOptions) -> list[str]:
    """The command line that says the same."""
    words = ["demo"]
    for field in fields(options):
        value = getattr(options, field.name)
        name = "--" + field.name.replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words += [name, str(value)]
    return words


def _check(options: DemoOptions) -> None:
    if options.batch % options.ranks:
        raise LaunchError(f"--batch {options.batch} is not a multiple of --ranks {options.ranks}")
    if options.fp16 and options.loss_scale is None:
        raise LaunchError("--fp16 needs --loss-scale (try 1024): without it small gradients become zero")
    if options.loss_scale is not None and not 0 < options.loss_scale < float("inf"):
        raise LaunchError(f"--loss-scale must be positive and finite, not {options.loss_scale}")
    if options.prefetch < 0:
        raise LaunchError(f"--prefetch must be 0 or more, not {options.prefetch}")
    if options.shard_size is not None and options.ranks % options.shard_size:
        raise LaunchError(f"--shard-size {options.shard_size} does not divide --ranks {options.ranks}")
    if options.trace is not None and not options.trace.resolve().parent.is_dir():
        raise LaunchError(f"--trace {options.trace}: there is no folder {options.trace.resolve().parent}")
    if options.save_minutes is not None and not 0 < options.save_minutes < float("inf"):
        raise LaunchError(f"--save-minutes must be positive, not {options.save_minutes}")
    _check_out(options)
    saved = sorted((options.out / "checkpoints").glob("step-*"))
    if saved and not options.resume and "BMTRAIN_MS_DEMO" not in os.environ:  # later, ranks may have begun to save
        raise LaunchError(
            f"there is a run in {options.out} already ({saved[-1].name}); go on with --resume, choose another --out, or delete it"
        )
    if options.resume and not (options.out / "checkpoints").is_dir():
        raise LaunchError(f"--resume: there is no folder checkpoints in {options.out}; run without --resume first")
    named = _named(options)
    if named is not None and not (named / "index.json").is_file():
        there = ", ".join(path.name for path in saved) or "none"
        raise LaunchError(f"--resume {options.resume}: there is no checkpoint {named}; in {options.out} there are: {there}")


def _check_out(options: DemoOptions) -> None:
    """Refuse places that cannot be written, and results that a run would replace whose checkpoints are gone."""
    out = options.out
    for folder in (nearest(out), out / "checkpoints"):
        if os.path.lexists(folder) and not takes_files(folder):
            raise LaunchError(f"--out {out}: {folder} is not a folder that can be written to")
    result = out / "model.safetensors"
    if os.path.lexists(result) and not any((out / "checkpoints").glob("step-*")) and not options.resume:
        raise LaunchError(f"{result} is there, of a run whose checkpoints are gone; choose another --out, or move it")


def _named(options: DemoOptions) -> Path | None:
    """The checkpoint to go on from, if it is not the latest."""
    if not isinstance(options.resume, str):
        return None
    folder, word = options.out / "checkpoints", options.resume
    if word.isascii() and word.isdigit():
        return folder / f"step-{int(word):08}"
    return folder / word if (folder / word).exists() else Path(word)


def _run(options: DemoOptions) -> int:
    import bmtrain_ms as bms

    failures = bms.train.TrainingError, bms.optim.GradientOverflowError
    try:
        _train(options)
    except bms.train.Stopped as stopped:
        if bms.rank() == 0:
            print(f"{stopped}; go on with --resume")
        return bms.train.EXIT_STOPPED
    except (LaunchError, bms.checkpoint.CheckpointError, *failures) as error:  # on every rank alike
        if bms.rank() == getattr(error, "speaker", 0):
            sys.stderr.write(f"bmtrain-ms: {error}\n")
        bms.synchronize()  # the first rank that ends with an error ends the others
        return 1 if isinstance(error, failures) else 2
    return 0


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Turn a ValueError, which the user can mend, into a line of the command's."""
    try:
        yield
    except ValueError as error:
        raise LaunchError(str(error)) from error


def _train(options: DemoOptions) -> None:
    started = time.time()
    import bmtrain_ms as bms

    world = bms.init_distributed(
        seed=options.seed,
        prefetch=options.prefetch,
        gather_dtype=options.gather_dtype,
        shard_size=options.shard_size,
        trace=options.trace is not None,
    )
    chief = world.everyone.rank == 0
    say = print if chief else _silent
    out = options.out
    stop = bms.train.StopSignals()  # from the first step to the last, for both trainers
    lock = bms.checkpoint.lock_folder(out)  # until the process ends, and before anything is written
    _check_again(options)
    if chief and not options.resume:
        (out / "log.jsonl").unlink(missing_ok=True)
    with _told_in_one_line():
        tokenizer, train, held_out = _prepare(options, chief)
    entropy = bms.data.unigram_entropy(held_out)
    say(
        f"{world.everyone.size} rank(s), ZeRO-{options.zero}, {len(train):,} training and {len(held_out):,} held-out tokens, "
        f"vocabulary {tokenizer.get_vocab_size()}"
    )

    curve: dict[int, float] = {}
    with _told_in_one_line():
        trainer = _trainer(options, train, tokenizer, stop)
    if options.resume:
        _resume(options, trainer)
        say(f"resumed at step {trainer.done}" + (", which is the last" if trainer.done == options.steps else ""))
    else:
        before = _first_part(options, trainer, held_out, curve)
        # Go on as a new process would: with a new model and optimizer, from the checkpoint.
        trainer = _trainer(options, train, tokenizer, stop)
        trainer.resume()
        again = trainer.evaluate(held_out, _LENGTH)
        say(f"saved and resumed at step {trainer.done}: held-out loss {before:.6f} before, {again:.6f} after")
    trainer.fit()
    curve[trainer.done] = final = trainer.evaluate(held_out, _LENGTH)
    trainer.save()
    trainer.close()
    stop.release()
    bms.save(trainer.model, out / "model.safetensors")
    say(f"held-out loss {final:.4f} nats per token; unigram entropy of the same text {entropy:.4f}")
    _write_samples(trainer.model, tokenizer, options.seed, say)
    if options.trace is not None and world.trace is not None:
        bms.comm.write_trace(options.trace, world.trace, world.everyone)
        say(f"trace of {world.everyone.size} rank(s) written to {options.trace}")
    if chief:
        bms.train.plot_log(out / "log.jsonl", out / "loss.png", curve, entropy)
        say(f"log.jsonl, loss.png, model.safetensors, tokenizer.json, config.json and checkpoints are in {out}")
        say(f"{time.time() - started:.0f} s in all")
    if lock is not None:
        lock.release()


def _first_part(options: DemoOptions, trainer: Any, held_out: Any, curve: dict[int, float]) -> float:
    """Three quarters of the steps, evaluated before and after, and saved; returns the held-out loss then."""
    with _told_in_one_line():
        curve[0] = trainer.evaluate(held_out, _LENGTH)
    trainer.fit(until=max(1, options.steps * 3 // 4))
    curve[trainer.done] = after = trainer.evaluate(held_out, _LENGTH)
    trainer.save()
    trainer.close()
    return after


def _check_again(options: DemoOptions) -> None:
    """What may have changed until this job had `--out` for itself; on every rank alike."""
    from bmtrain_ms.checkpoint.folder import steps_in

    folder = options.out / "checkpoints"
    steps = steps_in(folder)
    if steps and not options.resume:
        raise LaunchError(f"there is a run in {options.out} already ({len(steps)} checkpoints); go on with --resume")
    if not options.resume:
        return
    if not steps:
        raise LaunchError(f"--resume: there is no checkpoint in {folder} yet; run without --resume")
    done = _step_to_resume(options)
    if done is not None and done > options.steps:
        raise LaunchError(
            f"--steps {options.steps}: {done} steps are done already in {options.out}; ask for more, or go on from an earlier "
            "one: --resume STEP"
        )


def _step_to_resume(options: DemoOptions) -> int | None:
    """The step of the checkpoint to resume from; None: it is not one of this run, under its own name."""
    from bmtrain_ms.checkpoint.folder import checkpoint_name, latest_in

    folder = options.out / "checkpoints"
    found = _named(options) or latest_in(folder)
    word = "" if found is None or found.parent.resolve() != folder.resolve() else found.name.rpartition("-")[2]
    return int(word) if word.isdigit() and found is not None and found.name == checkpoint_name(int(word)) else None


def _resume(options: DemoOptions, trainer: Any) -> None:
    """Resume from a checkpoint; where it is damaged the error says which older one is not."""
    import bmtrain_ms as bms
    from bmtrain_ms.checkpoint import tools
    from bmtrain_ms.checkpoint.folder import checkpoint_name

    try:
        with _told_in_one_line():
            trainer.resume(_named(options))
    except bms.checkpoint.CheckpointError as error:
        folder, step = options.out / "checkpoints", _step_to_resume(options)
        if bms.rank() != error.speaker or step is None:
            raise
        try:
            tools.verify(folder / checkpoint_name(step))
        except bms.checkpoint.CheckpointError:
            sound = tools.newest_sound(folder, step)
            advice = "no older one is sound: begin in another --out"
            if sound is not None:
                advice = f"{sound.name} is sound: go on from it with --resume {int(sound.name.rpartition('-')[2])}"
            advised = bms.checkpoint.CheckpointError(f"{error}; {advice}")
            advised.speaker = error.speaker
            raise advised from error
        raise


def _silent(*args: Any) -> None:
    """Ranks other than 0 print nothing."""


def _prepare(options: DemoOptions, chief: bool) -> tuple[Any, Any, Any]:
    """Tokenizer, training tokens, held-out tokens. Rank 0 trains the tokenizer, all read its file."""
    from tokenizers import Tokenizer

    import bmtrain_ms as bms

    documents = bms.data.python_documentation() if options.text is None else bms.data.read_text(options.text)
    training, held_out = bms.data.split_held_out(documents)
    path = options.out / "tokenizer.json"
    if chief and not options.resume:
        bms.data.train_tokenizer(training, _VOCAB).save(str(path))
    bms.synchronize()
    tokenizer = Tokenizer.from_file(str(path))
    return tokenizer, bms.data.encode(tokenizer, training), bms.data.encode(tokenizer, held_out)


def _trainer(options: DemoOptions, tokens: Any, tokenizer: Any, stop: Any) -> Any:
    import bmtrain_ms as bms
    from bmtrain_ms.model_center import Spread, spread
    from bmtrain_ms.model_center.model import Llama, LlamaConfig

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        dim_model=192,
        num_heads=4,
        num_heads_kv=2,
        dim_ff=512,
        num_layers=4,
        dtype="float16" if options.fp16 else "float32",
    )
    if bms.rank() == 0:
        config.to_json_file(options.out / "config.json")
    model = spread(Llama(config), Spread(zero_level=options.zero))
    bms.init_parameters(model)
    sampler = bms.data.TokenSampler(tokens, _LENGTH, options.batch, options.seed, tokenizer)
    optimizer = bms.optim.AdamOptimizer(model.trainable_params(), _RATE, betas=(0.9, 0.95), weight_decay=0.1)
    manager = bms.optim.OptimManager(loss_scale=options.loss_scale)
    manager.add_optimizer(optimizer, bms.lr_scheduler.Cosine(optimizer, _RATE, min(_WARMUP, options.steps), options.steps))
    settings = bms.train.TrainSettings(
        steps=options.steps,
        log=options.out / "log.jsonl",
        save_every=options.save_interval,
        save_minutes=options.save_minutes,
        keep_last=options.keep_last,
        shared_storage=not options.no_shared_storage,
    )
    task = bms.train.Pretrain(model)
    return bms.train.Trainer(task, sampler, manager, settings, options.out / "checkpoints", signals=stop)


def _write_samples(model: Any, tokenizer: Any, seed: int, say: Any) -> None:
    from bmtrain_ms.model_center.generation import generate

    prompts = [tokenizer.encode(text).ids for text in _PROMPTS]
    written = generate(model, prompts, 48, temperature=0.8, top_k=50, top_p=0.95, seed=seed)
    for prompt, tokens in zip(_PROMPTS, written):
        say(f"> {prompt}|{tokenizer.decode(tokens)}\n")
