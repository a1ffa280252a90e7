"""Flags of Megatron-LM's and ModelLink's training scripts: what each becomes here, or why not."""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    """What is known of a flag.

    `values`: how many it takes: 0, 1, or -1, which is one or more.  `kind`: `mapped`, `without meaning` or `refused`.  `says`: the
    setting it becomes; why it has no meaning; or why it is refused and what to do.  `harmless`: values with which a refused one
    changes nothing and is taken.
    """

    values: int
    kind: str
    says: str
    harmless: tuple[str, ...] = ()


def _many(kind: str, entries: dict[str, str]) -> dict[str, Flag]:
    """Flags of one kind. A key is names, each followed by how many values it takes: nothing, `=`, or `=*`; and, behind a colon, the
    values that are harmless, with a comma between."""
    made: dict[str, Flag] = {}
    for key, says in entries.items():
        names, _, harmless = key.partition(":")
        for name in names.split():
            bare = name.rstrip("=*")
            values = {"": 0, "=": 1, "=*": -1}[name[len(bare) :]]
            made[f"--{bare}"] = Flag(values, kind, says, tuple(filter(None, harmless.split(","))))
    return made


MAPPED = _many(
    "mapped",
    {
        "nproc-per-node= nnodes= worker-num=": "layout.ranks",
        "tensor-model-parallel-size=": "layout.tp",
        "pipeline-model-parallel-size=": "layout.pp",
        "expert-model-parallel-size=": "layout.ep",
        "num-layers-per-virtual-pipeline-stage=": "layout.chunks, and the schedule interleaved",
        "num-layer-list=": "layout.stages",
        "no-shared-storage": "data.shared_storage = false",
        "num-layers=": "model.num_layers",
        "hidden-size=": "model.dim_model",
        "ffn-hidden-size=": "model.dim_ff; default 4 * hidden, with --swiglu int(8 * hidden / 3 / 64) * 64",
        "num-attention-heads=": "model.num_heads",
        "kv-channels=": "model.dim_head",
        "group-query-attention num-query-groups=": "model.num_heads_kv, if both are given",
        "max-position-embeddings=": "model.max_positions of gpt2; rotary positions have no table",
        "position-embedding-type= use-rotary-position-embeddings": "the family",
        "rotary-base=": "model.rope_base",
        "normalization= swiglu disable-bias-linear add-qkv-bias qk-layernorm multi-head-latent-attention": "the family",
        "norm-epsilon=": "model.norm_eps",
        "untie-embeddings-and-output-weights": "model.tied = false",
        "make-vocab-size-divisible-by= vocab-size= padded-vocab-size=": "model.vocab_size",
        "init-method-std=": "model.init_std",
        "embedding-multiplier-scale=": "model.embed_scale of grok1",
        "output-multiplier-scale=": "model.output_scale of grok1",
        "post-norm": "the family grok1",
        "attn-logit-softcapping=": "model.softcap of grok1",
        "gelu-tanh": 'model.activation = "gelu_tanh" of grok1',
        "q-lora-rank=": "model.q_rank",
        "kv-lora-rank=": "model.kv_rank",
        "qk-nope-head-dim=": "model.dim_nope",
        "qk-rope-head-dim=": "model.dim_rope",
        "v-head-dim=": "model.dim_value",
        "rope-scaling-type= rope-scaling-factor= rope-scaling-beta-fast= rope-scaling-beta-slow= rope-scaling-mscale= "
        "rope-scaling-mscale-all-dim= rope-scaling-original-max-position-embeddings=": "model.rope_scaling",
        "num-experts=": "model.num_experts",
        "moe-router-topk=": "model.top_k",
        "moe-router-load-balancing-type= moe-aux-loss-coeff= seq-aux": "model.balance and balance_coef; model.renormalise",
        "moe-intermediate-size= moe-ffn-hidden-size=": "model.dim_expert",
        "n-shared-experts=": "model.num_shared",
        "topk-group=": "model.keep_groups, and model.groups = the expert-parallel size, as ModelLink",
        "routed-scaling-factor=": "model.routed_scale",
        "norm-topk-prob": "model.renormalise",
        "first-k-dense-replace=": "model.first_dense",
        "micro-batch-size=": "batch.micro",
        "global-batch-size=": "batch.size",
        "rampup-batch-size=*": "batch.ramp_up",
        "train-iters= train-samples=": "train.steps",
        "lr=": "optimizer.lr",
        "min-lr=": "schedule.min_lr",
        "lr-decay-style= lr-wsd-decay-style= lr-wsd-decay-iters=": "schedule.name, schedule.shape, schedule.decay",
        "lr-decay-iters= lr-decay-samples=": "schedule.end",
        "lr-warmup-iters= lr-warmup-fraction= lr-warmup-samples=": "schedule.warmup",
        "weight-decay=": "optimizer.weight_decay",
        "clip-grad=": "optimizer.clip",
        "adam-beta1= adam-beta2=": "optimizer.betas",
        "adam-eps=": "optimizer.eps",
        "bf16 fp16": "model.dtype",
        "initial-loss-scale=": "optimizer.loss_scale",
        "min-loss-scale=": "optimizer.min_loss_scale",
        "loss-scale-window=": "optimizer.loss_scale_steps",
        "hysteresis=": "optimizer.hysteresis",
        "seed=": "seed",
        "recompute-granularity= recompute-activations": "layout.recompute",
        "data-path=*": "data.files; with --is-instruction-dataset data.rows",
        "is-instruction-dataset": "data.rows",
        "split=": "data.split",
        "data-cache-path=": "data.cache",
        "seq-length=": "data.length",
        "tokenizer-name-or-path= tokenizer-model= vocab-file=": "tokenizer.path",
        "reset-position-ids reset-attention-mask eod-mask-loss": "data.packed",
        "eval-interval=": "train.eval_every",
        "eval-iters=": "train.eval_batches",
        "lora-r= lora-alpha= lora-target-modules=*": "lora",
        "save=": "out",
        "save-interval=": "save.every",
        "finetune load=": "--finetune: model.pretrained, a folder of Hugging Face's; --load alone: the same command goes on in out",
        "tensorboard-dir=": "log.tensorboard",
        "wandb-project=": "log.wandb",
    },
)

_ALWAYS_CHECKED = "values that are not finite are always looked for, and such a step is skipped by all ranks"
_KERNEL = "it chooses a kernel, and the result is the same"
_SAVED = "checkpoints always hold everything that a run needs to go on"
_LAUNCH = "bmtrain-ms launch and msrun have options of their own for it"
_LOGGED = "out/log.jsonl has a line for each step"

WITHOUT_MEANING = _many(
    "without meaning",
    {
        "sequence-parallel": "always on with tp",
        "use-distributed-optimizer": "optimizer states are always sharded",
        "overlap-grad-reduce no-delay-grad-reduce": "gradients are always reduced during the backward pass",
        "overlap-param-gather delay-param-gather": "parameters are always gathered ahead (layout.prefetch)",
        "no-overlap-p2p-communication": "messages of the pipeline always overlap",
        "distributed-backend=": "the device decides: HCCL, or the engine of CPU ranks",
        "distributed-timeout-minutes=": "waiting for ranks has a limit of its own",
        "context-parallel-algo=": "there is no context parallelism, so there is nothing to choose",
        "use-mcore-models use-legacy-models transformer-impl= spec=*": "there is one implementation of each family",
        "DDP-impl= mlp-layer-fusion shape-order= output-layer-slice-num=": _KERNEL,
        "use-flash-attn use-fused-rmsnorm use-fused-swiglu use-fused-rotary-pos-emb": _KERNEL,
        "no-masked-softmax-fusion no-bias-swiglu-fusion no-rope-fusion no-bias-dropout-fusion "
        "no-gradient-accumulation-fusion jit-compile": _KERNEL,
        "attention-softmax-in-fp32 accumulate-allreduce-grads-in-fp32": "that is always done in float32",
        "openai-gelu": "the GELU of gpt2 is the tanh form already",
        "input-jitter": "in ModelLink it turns the jitter off, against its name; there is none here",
        "use-mc2": "ModelLink ignores it; nothing is fused with communication here",
        "moe-token-dispatcher-type=": "tokens travel all-to-all; the result is the same",
        "moe-grouped-gemm": "experts are always computed together",
        "moe-permutation-async-comm": "communication of experts is not permuted in parts; the result is the same",
        "moe-per-layer-logging": "not logged for each layer",
        "moe-token-drop-policy= moe-pad-expert-input-to-capacity": "no token is dropped, so there is no capacity",
        "recompute-method= recompute-num-layers=": "it saves memory only: layout.recompute is for all layers or none",
        "exit-interval= exit-duration-in-mins=": "a run is ended by SIGTERM, which saves; the same command goes on",
        "exit-signal-handler": "SIGTERM always saves and ends",
        "manual-gc": "Python's collector is left alone",
        "no-check-for-nan-in-loss-and-grad": _ALWAYS_CHECKED,
        "override-opt_param-scheduler use-checkpoint-opt_param-scheduler": "the schedule is the one of the file of settings",
        "reuse-fp32-param": "it saves memory only",
        "swap-attention": "it saves memory only: layout.recompute does",
        "use-deter-comp": "CPU ranks always compute the same; on devices it is up to the environment",
        "num-workers=": "rows are read from memory maps, in the background",
        "no-mmap-bin-files": "files are always memory maps",
        "tokenizer-type=": "the tokenizer's files say it",
        "tokenizer-not-use-fast": "the tokenizer's files say it",
        "merge-file=": "it is looked for beside the file of the vocabulary",
        "prompt-type=": "prepared rows have their prompts already",
        "stage=": "data.rows say what is trained on",
        "no-save-optim no-save-rng no-load-optim no-load-rng": _SAVED,
        "exit-on-missing-checkpoint": "a run without a checkpoint begins at step 0, and says so",
        "use-dist-ckpt dist-ckpt-format= ckpt-format=": "checkpoints have one format, for any layout",
        "log-interval= log-throughput timing-log-level=": _LOGGED,
        "log-params-norm log-num-zeros-in-grad": "not logged",
        "node-rank= master-addr= master-port= local-worker-num= log-dir= join= cluster-time-out= bind-core=": _LAUNCH,
    },
)

_CONVERTER = "it is of convert_ckpt.py, which does not train: bmtrain-ms convert does that"
_DROPOUT = "pretraining has no dropout here (Megatron's default is 0.1): write it with 0"

REFUSED = _many(
    "refused",
    {
        "context-parallel-size=:1": "there is no context parallelism: set it to 1, and give the ranks to tp",
        "optimizer=:adam": "AdamW is the only optimizer of a file of settings: write --optimizer adam",
        "attention-dropout= hidden-dropout=:0": _DROPOUT,
        "squared-relu": "no family has it: leave it out",
        "geglu": "it is the erf form of GELU in a gate, which no family has: --gelu-tanh is the tanh form, of grok1",
        "no-bias-gelu-fusion": "without the fusion Megatron's GELU is the erf form, and gpt2's is the tanh form: leave it out",
        "output-logit-softcapping=": "no family caps its logits: leave it out",
        "sliding-window=": "who counts as in a window was not compared: leave it out, and write family mistral and model.window",
        "rotary-percent=:1": "heads are turned as a whole: leave it out",
        "apply-query-key-layer-scaling": "it changes how scores are rounded: leave it out",
        "moe-z-loss-coeff=:0": "families have no z-loss as a size: leave it out",
        "moe-input-jitter-eps=:0": "routers have no noise: leave it out",
        "moe-expert-capacity-factor=": "it drops tokens, and none is dropped here: leave it out",
        "moe-layer-freq=:1": "experts are in each layer behind the first dense ones: set it to 1",
        "moe-device-level-aux-loss-coeff= moe-comm-aux-loss-coeff=:0": "its loss depends on the layout of ranks: set it to 0",
        "lr-warmup-init=:0": "a warm-up begins at 0: leave it out",
        "weight-decay-incr-style=:constant": "weight decay stays the same: leave it out",
        "start-weight-decay= end-weight-decay=": "weight decay stays the same: leave it out, and set --weight-decay",
        "loss-scale=": "the loss scale is dynamic: leave it out, and set --initial-loss-scale",
        "train-data-path=* valid-data-path=* test-data-path=*": "data are divided by --split: give them as --data-path",
        "mock-data": "there are no made-up data: give --data-path",
        "dataloader-type=:single": "samples come in the order of their index: set it to single",
        "skip-train": "it trains nothing: take bmtrain-ms data or generate for what is to be looked at",
        "no-shuffle": "rows are always shuffled: leave it out",
        "lora-load=": "adapters of ModelLink's are not read: begin with new ones, without it",
        "ckpt-step=": "a run goes on from its last checkpoint: leave it out",
        "use-checkpoint-args": "sizes are to be in the script, not in a checkpoint: write them out",
        "pretrained-checkpoint=": "it is of Megatron's format: convert it to Hugging Face's, and give --finetune --load FOLDER",
        "model-type= load-model-type= save-model-type= target-tensor-parallel-size= target-pipeline-parallel-size= "
        "target-expert-model-parallel-size= model-type-hf= load-dir= save-dir= params-dtype=": _CONVERTER,
    },
)

FLAGS: dict[str, Flag] = {**MAPPED, **WITHOUT_MEANING, **REFUSED}
