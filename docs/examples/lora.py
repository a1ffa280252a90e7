"""Fine-tune adapters of a model in a folder of Hugging Face's, and write them as PEFT reads them.

    bmtrain-ms launch -n 2 docs/examples/lora.py --model Qwen3-0.6B --text letters.txt --save adapters
    bmtrain-ms generate --model Qwen3-0.6B --adapters adapters --prompt "Dear"

The folder may be of any family; everything but the adapters stays as it is in there.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.data import TokenSampler, read_text
from bmtrain_ms.model_center import from_pretrained, save_adapters, spread
from bmtrain_ms_base.data.tokenizing import load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path, required=True, help="a folder with config.json, safetensors files and tokenizer.json")
parser.add_argument("--text", type=Path, required=True, help="UTF-8; documents are separated by blank lines")
parser.add_argument("--save", type=Path, default=Path("adapters"))
parser.add_argument("--layers", default="q_proj|v_proj", help="a regular expression, found in the path of a layer")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8, help="sequences per step, over all ranks")
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--rate", type=float, default=1e-3)


def main(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(str(options.model))
    tokens = np.concatenate([np.array(ids, np.int32) for ids in tokenizer.encode(read_text(options.text))])
    sampler = TokenSampler(tokens, options.length, options.batch)

    model = from_pretrained(options.model)
    adapted = bms.nn.add_lora(model, options.layers, rank=options.rank, alpha=2 * options.rank)  # all else is frozen
    spread(model)
    trained = sum(p.full_size for p in model.trainable_params())
    bms.print_rank(f"{len(adapted)} layers have adapters, of {trained:,} parameters together")

    optimizer = bms.optim.AdamOptimizer(model.trainable_params())
    manager = bms.optim.OptimManager()
    manager.add_optimizer(optimizer, bms.lr_scheduler.Cosine(optimizer, options.rate, max(1, options.steps // 10), options.steps))
    for step in range(options.steps):
        batch = sampler.batch(step, bms.rank(), bms.world_size())
        manager.zero_grad()
        loss = manager.backward(model.loss, Tensor(batch.ids), Tensor(batch.targets))
        norm = manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        manager.step()
        bms.print_rank(f"step {step} | loss: {float(bms.sum_loss(loss).asnumpy()):.3f} | grad norm: {norm:.2f}", flush=True)
    save_adapters(model, options.save, base=str(options.model))


if __name__ == "__main__":
    arguments = parser.parse_args()
    bms.init_distributed(seed=0)
    try:
        main(arguments)
    except (OSError, ValueError, bms.checkpoint.CheckpointError) as error:
        bms.print_rank(f"lora.py: {error}", file=sys.stderr)
        sys.exit(2)
