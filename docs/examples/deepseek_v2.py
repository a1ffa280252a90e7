"""Train a model of DeepSeek-V2-Lite's shape: latent attention, a dense layer, then layers of routed and shared experts.

    bmtrain-ms launch -n 2 docs/examples/deepseek_v2.py --steps 100
    bmtrain-ms launch -n 2 docs/examples/deepseek_v2.py --ep 2 --text stories.txt      # experts divided over two ranks

`DeepseekV2Config()` with dim_model=2048, num_heads=16, dim_ff=10944, num_layers=27 is V2-Lite itself.
"""

import argparse
import sys
from pathlib import Path

from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.data import TokenSampler, encode, python_documentation, read_text, train_tokenizer
from bmtrain_ms.model_center import parameter_count, spread
from bmtrain_ms.model_center.model import DeepseekV2, DeepseekV2Config

parser = argparse.ArgumentParser()
parser.add_argument("--text", type=Path, help="UTF-8; documents are separated by blank lines (default: Python's help texts)")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8, help="sequences per step, over all ranks")
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--layers", type=int, default=3)
parser.add_argument("--experts", type=int, default=8, help="routed ones in each layer, of which a token uses two")
parser.add_argument("--ep", type=int, default=1, help="ranks that experts are divided over")
parser.add_argument("--save", type=Path, help="a folder, for transformers too")


def main(options: argparse.Namespace) -> None:
    bms.init_distributed(seed=0, ep_size=options.ep)
    texts = python_documentation() if options.text is None else read_text(options.text)
    tokenizer = train_tokenizer(texts, 1024)
    sampler = TokenSampler(encode(tokenizer, texts), options.length, options.batch)
    config = DeepseekV2Config(
        vocab_size=tokenizer.get_vocab_size(),
        dim_model=128,
        num_heads=4,
        dim_ff=256,
        num_layers=options.layers,
        kv_rank=32,
        dim_nope=32,
        dim_rope=16,
        dim_value=32,
        num_experts=options.experts,
        top_k=2,
        num_shared=1,
        dim_expert=64,
        balance="sequence",  # V2's own loss, per sequence
        balance_coef=0.001,
    )
    model = spread(DeepseekV2(config))
    bms.init_parameters(model)
    total, active = (parameter_count(DeepseekV2, config, active=used) for used in (False, True))
    bms.print_rank(f"{total:,} parameters, of which a token uses {active:,}")
    optimizer = bms.optim.AdamOptimizer(model.trainable_params(), weight_decay=0.1)
    manager = bms.optim.OptimManager()
    manager.add_optimizer(optimizer, bms.lr_scheduler.Cosine(optimizer, 3e-3, max(1, options.steps // 10), options.steps))
    for step in range(options.steps):
        batch = sampler.batch(step, bms.rank(), bms.world_size())
        manager.zero_grad()
        loss = manager.backward(model.loss, Tensor(batch.ids), Tensor(batch.targets))
        norm = manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        manager.step()
        bms.print_rank(f"step {step} | loss: {float(bms.sum_loss(loss).asnumpy()):.3f} | grad norm: {norm:.2f}", flush=True)
    if options.save is not None:
        model.save_pretrained(options.save)


if __name__ == "__main__":
    try:
        main(parser.parse_args())
    except (OSError, ValueError) as error:
        bms.print_rank(f"deepseek_v2.py: {error}", file=sys.stderr)
        sys.exit(2)
