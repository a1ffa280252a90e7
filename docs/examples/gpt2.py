"""A GPT-2 of one's own layers, as in BMTrain's README: parameters, Blocks, a list of them, an optimizer, a loop.

    bmtrain-ms launch -n 2 docs/examples/gpt2.py --steps 100
    bmtrain-ms launch -n 2 docs/examples/gpt2.py --zero-level 2 --no-recompute --text stories.txt

`bms.model_center.model.GPT2` is the same with Hugging Face's files, and over tensor-parallel ranks and stages.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from mindspore import Tensor, nn

import bmtrain_ms as bms
from bmtrain_ms.data import TokenSampler, encode, python_documentation, read_text, train_tokenizer
from bmtrain_ms.model_center.layer import Attention, DecoderLayer, Embedding, LayerNorm, Positions
from bmtrain_ms.model_center.model.gpt2 import GeluFeedForward

parser = argparse.ArgumentParser()
parser.add_argument("--text", type=Path, help="UTF-8; documents are separated by blank lines (default: Python's help texts)")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=8, help="sequences per step, over all ranks")
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--zero-level", type=int, choices=(2, 3), default=3)
parser.add_argument("--no-recompute", action="store_true", help="keep activations for the backward pass")


class GPT(nn.Cell):
    """Token ids (batch, length) -> logits (batch * length, vocab)."""

    def __init__(self, layers: int, vocab: int, length: int, dim: int = 128, heads: int = 4, **how: Any):
        super().__init__()
        self.word, self.position = Embedding(vocab, dim), Embedding(length, dim)

        def layer() -> nn.Cell:
            attention = Attention(dim, heads, dim // heads, bias=True)
            return DecoderLayer(attention, GeluFeedForward(dim, 4 * dim), lambda: LayerNorm(dim))

        self.layers = bms.TransformerBlockList([bms.Block(layer(), **how) for _ in range(layers)])
        self.norm = LayerNorm(dim)

    def construct(self, ids: Tensor) -> Tensor:
        positions = Positions.of(ids)
        places = Tensor(positions.places().reshape(-1).astype("int32"))
        hidden = self.word(ids.reshape(-1)) + self.position(places)
        for layer in self.layers:
            hidden = layer(hidden, positions)
        return self.word.projection(self.norm(hidden))  # tied


def main(options: argparse.Namespace) -> None:
    texts = python_documentation() if options.text is None else read_text(options.text)
    tokenizer = train_tokenizer(texts, 1024)
    sampler = TokenSampler(encode(tokenizer, texts), options.length, options.batch)
    how = {"use_checkpoint": not options.no_recompute, "zero_level": options.zero_level}
    model = GPT(options.layers, tokenizer.get_vocab_size(), options.length, **how)
    bms.init_parameters(model)
    optimizer = bms.optim.AdamOptimizer(model.trainable_params(), weight_decay=1e-2)
    manager = bms.optim.OptimManager()
    manager.add_optimizer(optimizer, bms.lr_scheduler.Noam(optimizer, 3e-3, warmup_iter=max(1, options.steps // 10), end_iter=-1))
    loss_func = bms.loss.FusedCrossEntropy()
    for step in range(options.steps):
        batch = sampler.batch(step, bms.rank(), bms.world_size())
        manager.zero_grad()
        loss = manager.backward(lambda ids, y: loss_func(model(ids), y), Tensor(batch.ids), Tensor(batch.targets.reshape(-1)))
        norm = manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        manager.step()
        bms.print_rank(f"step {step} | loss: {float(bms.sum_loss(loss).asnumpy()):.3f} | grad norm: {norm:.2f}", flush=True)


if __name__ == "__main__":
    arguments = parser.parse_args()
    bms.init_distributed(seed=0)
    try:
        main(arguments)
    except (OSError, ValueError) as error:
        bms.print_rank(f"gpt2.py: {error}", file=sys.stderr)
        sys.exit(2)
