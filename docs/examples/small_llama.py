"""Train a small Llama on text, look at its held-out loss, and let it write.

What `examples/train-small-llama/pretrain.py` of bmtrain_mindspore does; docs/migration.md goes through it line by line.

    bmtrain-ms launch -n 2 docs/examples/small_llama.py --text stories.txt --steps 200
    bmtrain-ms launch -n 2 docs/examples/small_llama.py --text hf:roneneldan/TinyStories:TinyStoriesV2-GPT4-valid.txt

A name on a hub is fetched from where HF_ENDPOINT says, and needs `pip install bmtrain-ms[data]`.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from mindspore import Tensor

import bmtrain_ms as bms
from bmtrain_ms.data import TokenSampler, encode, read_text, split_held_out, train_tokenizer
from bmtrain_ms.model_center import generation, spread
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms_base.data.sources import find_sources

parser = argparse.ArgumentParser()
parser.add_argument("--text", required=True, help="a file or a folder of .txt files, UTF-8, or hf:owner/name:file on a hub")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=8, help="sequences per step, over all ranks")
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--fp16", action="store_true")
parser.add_argument("--save", type=Path, default=Path("model.safetensors"))
options = parser.parse_args()

bms.init_distributed(seed=0)
try:
    parts = [part for source in find_sources([options.text])[0] for part in read_text(source.path)]
    training, held_out = split_held_out([story for part in parts for story in part.split("<|endoftext|>") if story.strip()])
    tokenizer = train_tokenizer(training, 2048)  # every rank trains the same one
    sampler = TokenSampler(encode(tokenizer, training), options.length, options.batch, seed=0)
    sampler.batch(0, bms.rank(), bms.world_size())  # which says what does not fit the ranks
except (OSError, ValueError) as error:
    bms.print_rank(f"small_llama.py: {error}", file=sys.stderr)
    sys.exit(2)

config = LlamaConfig(
    vocab_size=tokenizer.get_vocab_size(),
    dim_model=192,
    num_heads=4,
    dim_ff=512,
    num_layers=4,
    dtype="float16" if options.fp16 else "float32",
)
model = spread(Llama(config))
bms.init_parameters(model)
loss_func = bms.loss.FusedCrossEntropy()  # float32, whatever the logits are

optimizer = bms.optim.AdamOptimizer(model.trainable_params(), eps=1e-5)
decay = options.steps * 8 // 10
scheduler = bms.lr_scheduler.WSD(optimizer, 1e-3, min(100, decay), options.steps, decay_iter=decay)
manager = bms.optim.OptimManager(loss_scale=2.0**16 if options.fp16 else None)
manager.add_optimizer(optimizer, scheduler)


def forward(input_ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids)
    return loss_func(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def train() -> None:
    model.set_train(True)
    for step in range(options.steps):
        start = time.time()
        batch = sampler.batch(step, bms.rank(), bms.world_size())
        manager.zero_grad()
        loss = manager.backward(forward, Tensor(batch.ids), Tensor(batch.targets))
        grad_norm = manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
        rate = scheduler.current_lr
        result = manager.step()
        mean = float(bms.sum_loss(loss).asnumpy())  # all ranks call it, one prints
        bms.print_rank(
            f"step {step} | lr: {rate:.1e} | loss: {mean:.3f} | grad norm: {grad_norm:.2f} | "
            f"scale: {result.loss_scale:g} | time: {time.time() - start:.2f}s",
            flush=True,
        )
    bms.save(model, options.save)


def valid() -> None:
    bms.load(model, options.save)
    model.set_train(False)
    tokens = encode(tokenizer, held_out)
    windows = (len(tokens) - 1) // options.length
    ids = tokens[: windows * options.length + 1].astype(np.int32)
    rows = slice(0, 8)  # every rank looks at the same ones
    inputs, labels = ids[:-1].reshape(windows, -1)[rows], ids[1:].reshape(windows, -1)[rows]
    bms.print_rank(f"held-out loss: {float(forward(Tensor(inputs), Tensor(labels)).asnumpy()):.3f}")


def generate() -> None:
    """On any number of ranks: the weights stay sharded."""
    written = generation.generate(model, [tokenizer.encode("The ").ids], 40, temperature=0.7)
    bms.print_rank("The " + tokenizer.decode(written[0]))


train()
valid()
generate()
bms.see_memory("memory")
