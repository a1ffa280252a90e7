"""Train a model of Grok-1's shape (sandwich norms, capped scores, eight experts) on any layout of ranks.

    bmtrain-ms launch -n 2 docs/examples/grok1.py --tp 2
    bmtrain-ms launch -n 4 docs/examples/grok1.py --tp 2 --pp 2 --layers 4 --text stories.txt

`Grok1Config()` is Grok-1 itself, of 315,684,820,992 parameters.
"""

import argparse
import sys
from pathlib import Path

from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.comm import world
from bmtrain_ms.data import TokenSampler, encode, python_documentation, read_text, train_tokenizer
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.model import Grok1, Grok1Config

parser = argparse.ArgumentParser()
parser.add_argument("--text", type=Path, help="UTF-8; documents are separated by blank lines (default: Python's help texts)")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8, help="sequences per step, over all data-parallel ranks")
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--tp", type=int, default=1, help="ranks that tensors are divided over")
parser.add_argument("--pp", type=int, default=1, help="stages of the pipeline")
parser.add_argument("--ep", type=int, default=1, help="data-parallel ranks that experts are divided over")


def main(options: argparse.Namespace) -> None:
    bms.init_distributed(seed=0, tp_size=options.tp, pipe_size=options.pp, ep_size=options.ep)
    mesh = world().mesh  # ranks that differ in dp_rank get different rows; those of one pipeline, or of one tensor, the same
    texts = python_documentation() if options.text is None else read_text(options.text)
    tokenizer = train_tokenizer(texts, 1024)
    sampler = TokenSampler(encode(tokenizer, texts), options.length, options.batch)
    config = Grok1Config(
        vocab_size=tokenizer.get_vocab_size(),
        dim_model=128,
        num_heads=4,
        num_heads_kv=2,
        dim_head=32,
        dim_ff=256,
        num_layers=options.layers,
        balance="sequence",
        balance_coef=0.01,
    )
    model = spread(Grok1(config))
    bms.init_parameters(model)
    optimizer = bms.optim.AdamOptimizer(model.trainable_params(), weight_decay=0.1)
    manager = bms.optim.OptimManager()
    manager.add_optimizer(optimizer, bms.lr_scheduler.Cosine(optimizer, 3e-3, max(1, options.steps // 10), options.steps))
    for step in range(options.steps):
        batch = sampler.batch(step, mesh.dp_rank, mesh.dp)
        manager.zero_grad()
        loss = manager.backward(model.loss, Tensor(batch.ids), Tensor(batch.targets))  # in stages, micro-batch by micro-batch
        norm = manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        manager.step()
        bms.print_rank(f"step {step} | loss: {float(bms.sum_loss(loss).asnumpy()):.3f} | grad norm: {norm:.2f}", flush=True)


if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except (OSError, ValueError) as error:
        bms.print_rank(f"grok1.py: {error}", file=sys.stderr)
        sys.exit(2)
