"""Run a recipe with tiny widths on CPU ranks, in its own layout: `python docs/recipes/twin.py NAME [FOLDER]`.

In the folder (default: runs/twins/NAME) it makes text out of what ships with Python, a tokenizer and files of tokens, and gives the
recipe, with the changes below, to `bmtrain-ms`. Grok-1's twin is grok1_40b/small.toml, which grok1_40b/rehearse.sh runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
SIZES = "--model.vocab_size=512 --model.dim_model=32 --model.num_heads=4 --model.num_layers=2 --model.dtype=float32"
RUN = "--data.length=32 --train.steps=4 --save.every=2 --schedule.warmup=1"
EVALUATED = "--train.eval_every=2 --train.eval_batches=1"
TWINS = {
    "llama2_7b": f"{SIZES} --model.dim_ff=48 --batch.size=16",
    "minicpm5_1b": f"{SIZES} --model.dim_ff=48 --model.num_heads_kv=2 --model.dim_head=16 --batch.size=8 --schedule.decay=2",
    "minicpm4_0.5b": f"{SIZES} --model.dim_ff=48 --model.num_heads_kv=2 --batch.size=32 --batch.micro=1 --batch.ramp_up.start=8 "
    "--batch.ramp_up.increment=8 --batch.ramp_up.samples=64 --schedule.end=4 --schedule.decay=2",
    "deepseek_v2_lite": f"{SIZES} --model.dim_ff=48 --model.kv_rank=16 --model.dim_nope=8 --model.dim_rope=4 --model.dim_value=8 "
    "--model.num_experts=8 --model.top_k=2 --model.dim_expert=16 --batch.size=16",
    "gpt2": f"{SIZES} --model.dtype=float16 --model.dim_ff=128 --model.max_positions=32 --batch.size=8 --batch.micro=2",
    "qwen3_0.6b_lora": "--model.pretrained=base/model --data.length=256 --batch.size=8 --batch.micro=2",
}
BASE = f"{SIZES} {RUN} --model.family=qwen3 --model.dim_ff=48 --model.num_heads_kv=2 --model.dim_head=8 --batch.size=4 --out=base"


def bmtrain_ms(folder: Path, words: str) -> None:
    """The command, in the folder; ends with its exit code if that is not 0."""
    command = [sys.executable, "-m", "bmtrain_ms_cli", *words.split()]
    sys.stdout.write(f"bmtrain-ms {words}\n")
    sys.stdout.flush()
    done = subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.returncode)


def main(name: str, folder: Path) -> None:
    """Everything from the text to the trained model."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(RECIPES / "alpaca.py"), "train-00000-of-00001.parquet", "400"], cwd=folder, check=True)
    tokenizer = ["llama2-tokenizer", "minicpm5-tokenizer", "minicpm4-tokenizer", "deepseek-tokenizer", "gpt2", "tokenizer"]
    asked = (RECIPES / f"{name}.toml").read_text()
    path = next(word for word in tokenizer if f'path = "{word}"' in asked or word == "tokenizer")
    source = "train-00000-of-00001.parquet --json-keys text"
    if not (folder / path).exists():
        bmtrain_ms(folder, f"tokenizer --input {source} --vocab-size 512 --output {path}")
    options = f"--tokenizer-name-or-path {path} --append-eod --overwrite"
    bmtrain_ms(folder, f"prepare --input {source} {options} --output-prefix data/corpus")
    if "[lora]" in asked:
        if not (folder / "base" / "model").exists():
            bmtrain_ms(folder, f'pretrain {BASE} --tokenizer.path={path} --data.files=["data/corpus_text_document"]')
        bmtrain_ms(folder, f"finetune {RECIPES / name}.toml {RUN} {TWINS[name]}")
    else:
        bmtrain_ms(folder, f"pretrain {RECIPES / name}.toml {RUN} {EVALUATED} {TWINS[name]}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in TWINS:
        raise SystemExit(f"{__doc__}\nNAME is one of {', '.join(TWINS)}")
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) == 3 else f"runs/twins/{sys.argv[1]}").resolve())
