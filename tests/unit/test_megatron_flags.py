"""Scripts of Megatron-LM and ModelLink become settings that mean the same, or an error that says why not."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmtrain_ms.model_center import parameter_count
from bmtrain_ms.train.parts import config_of, families, make_schedule, model_problems
from bmtrain_ms_base.config import Settings, read_settings
from bmtrain_ms_base.config.megatron import MegatronError, settings_of_flags, settings_of_script
from bmtrain_ms_base.config.megatron_flags import FLAGS, MAPPED, REFUSED, WITHOUT_MEANING
from bmtrain_ms_base.config.shell import training_command
from bmtrain_ms_cli.main import main

DOCS = Path(__file__).resolve().parents[2] / "docs"

GROK = r"""#!/bin/bash
# Grok-1, 8 layers, on two hosts
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
MASTER_ADDR=localhost # of the first host
MASTER_PORT=${MASTER_PORT:-6000}
NNODES=2
NODE_RANK=0
WORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))

CKPT_SAVE_DIR="runs/grok"
DATA_PATH="data/alpaca_text_document"
TOKENIZER_MODEL='grok-1'
TP=4
PP=2
EP=2

DISTRIBUTED_ARGS="
    --nproc_per_node $GPUS_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

MOE_ARGS="
    --num-experts 8 \
    --expert-model-parallel-size ${EP} \
    --moe-router-topk 2 \
    --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 1e-2 \
    --moe-permutation-async-comm
"

GPT_ARGS="
    --use-mcore-models \
    --disable-bias-linear \
    --post-norm \
    --seq-length 8192 \
    --max-position-embeddings 8192 \
    --num-layers 8 \
    --hidden-size 6144 \
    --ffn-hidden-size 32768 \
    --num-attention-heads 48 \
    --group-query-attention \
    --num-query-groups 8 \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path ${TOKENIZER_MODEL} \
    --padded-vocab-size 131072 \
    --init-method-std 0.01 \
    --attention-dropout 0.0 \
    --hidden-dropout 0.0 \
    --position-embedding-type rope \
    --normalization RMSNorm \
    --swiglu \
    --input-jitter \
    --embedding-multiplier-scale 78.38367176906169 \
    --output-multiplier-scale 0.5773502691896257 \
    --untie-embeddings-and-output-weights \
    --make-vocab-size-divisible-by 1 \
    --use-flash-attn \
    --use-fused-rmsnorm \
    --use-fused-rotary-pos-emb \
    --use-mc2 \
    --no-masked-softmax-fusion \
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --sequence-parallel \
    --use-distributed-optimizer \
    --overlap-grad-reduce \
    --no-shared-storage \
    --micro-batch-size 1 \
    --global-batch-size 128 \
    --train-iters 2000 \
    --lr 1e-5 \
    --min-lr 1e-6 \
    --lr-decay-style cosine \
    --lr-decay-iters 1280 \
    --lr-warmup-iters 2 \
    --weight-decay 1e-1 \
    --clip-grad 1.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --bf16 \
    --recompute-granularity full --recompute-method block --recompute-num-layers 4
"

DATA_ARGS="--data-path $DATA_PATH --split 99990,8,2"
OUTPUT_ARGS="--log-interval 1 --save-interval 500 --eval-interval 1000 --eval-iters 0 --save $CKPT_SAVE_DIR"

torchrun $DISTRIBUTED_ARGS pretrain_gpt.py \
    $GPT_ARGS $MOE_ARGS \
    $DATA_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend nccl \
    2>&1 | tee logs/train.log
"""

LLAMA = r"""
NPUS_PER_NODE=8
ARGS=(
    --tensor-model-parallel-size 8   # a comment of an array
    --sequence-parallel
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
    --seq-length 4096 --max-position-embeddings 4096
    --micro-batch-size 2 --global-batch-size 32
    --make-vocab-size-divisible-by 1 --vocab-size 32000
    --lr 1.25e-6 --min-lr 1.25e-7 --train-iters 5000 --lr-decay-style cosine --lr-warmup-fraction 0.01
    --untie-embeddings-and-output-weights --disable-bias-linear
    --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.01
    --position-embedding-type rope --normalization RMSNorm --swiglu
    --weight-decay 1e-1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --initial-loss-scale 65536 --fp16
    --data-path 0.3 data/a_text_document 0.7 data/b_text_document
    --reset-position-ids --reset-attention-mask --eod-mask-loss
    --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model
)
exec python -m torch.distributed.launch --nproc-per-node=$NPUS_PER_NODE pretrain_gpt.py "${ARGS[@]}"
"""

GPT2 = r"""
CHECKPOINT_PATH=$1
GPT_ARGS="
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16
    --seq-length 1024 --max-position-embeddings 1024
    --micro-batch-size 8 --global-batch-size 64
    --lr 0.00015 --train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine
    --min-lr 1.0e-5 --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --fp16
"
torchrun --nproc_per_node 8 pretrain_gpt.py $GPT_ARGS --data-path data/a_text_document \
    --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --split 949,50,1 \
    --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10 \
    --distributed-backend nccl --save $CHECKPOINT_PATH --load $CHECKPOINT_PATH $EXTRA
"""

COMMON = (
    "--seq-length 4096 --max-position-embeddings 32768 --micro-batch-size 1 --global-batch-size 64 --train-iters 1000 --lr 1e-4 "
    "--attention-dropout 0 --hidden-dropout 0 --bf16 --data-path data/a_text_document --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear "
)
MIXTRAL = COMMON + (
    "--nproc_per_node 8 --expert-model-parallel-size 4 --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 "
    "--num-attention-heads 32 --group-query-attention --num-query-groups 8 --untie-embeddings-and-output-weights "
    "--padded-vocab-size 32000 --rotary-base 1000000 --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 0.01"
)
QWEN = COMMON + (
    "--worker_num 8 --tensor-model-parallel-size 2 --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 "
    "--num-attention-heads 28 --group-query-attention --num-query-groups 4 --untie-embeddings-and-output-weights "
    "--padded-vocab-size 152064 --rotary-base 1000000 --norm-epsilon 1e-6 --add-qkv-bias"
)
DEEPSEEK = COMMON + (
    "--nproc_per_node 8 --expert-model-parallel-size 8 --num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944 "
    "--num-attention-heads 16 --untie-embeddings-and-output-weights --padded-vocab-size 102400 --norm-epsilon 1e-6 "
    "--multi-head-latent-attention --qk-layernorm --kv-lora-rank 512 --qk-nope-head-dim 128 --qk-rope-head-dim 64 --v-head-dim 128 "
    "--num-experts 64 --moe-router-topk 6 --moe-router-load-balancing-type softmax_topk --moe-intermediate-size 1408 "
    "--n-shared-experts 2 --first-k-dense-replace 1 --moe-layer-freq 1 --routed-scaling-factor 1.0 --seq-aux "
    "--moe-aux-loss-coeff 0.001 --rope-scaling-type yarn --rope-scaling-factor 40 --rope-scaling-beta-fast 32 "
    "--rope-scaling-beta-slow 1 --rope-scaling-mscale 0.707 --rope-scaling-mscale-all-dim 0.707 "
    "--rope-scaling-original-max-position-embeddings 4096"
)
TINY = (  # a llama of the fewest flags
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --micro-batch-size 1 --global-batch-size 8 "
    "--train-iters 100 --lr 1e-3 --data-path data/a_text_document --attention-dropout 0 --hidden-dropout 0.0 "
    "--normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear --nproc_per_node 1"
)
LISTED = """
tensor-model-parallel-size pipeline-model-parallel-size num-layers-per-virtual-pipeline-stage sequence-parallel
context-parallel-size expert-model-parallel-size use-distributed-optimizer overlap-grad-reduce overlap-param-gather
no-delay-grad-reduce delay-param-gather no-overlap-p2p-communication distributed-backend distributed-timeout-minutes
context-parallel-algo num-layer-list no-shared-storage num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels
group-query-attention num-query-groups max-position-embeddings position-embedding-type rotary-percent rotary-base normalization
norm-epsilon swiglu squared-relu openai-gelu disable-bias-linear add-qkv-bias qk-layernorm untie-embeddings-and-output-weights
make-vocab-size-divisible-by init-method-std attention-dropout hidden-dropout embedding-multiplier-scale output-multiplier-scale
post-norm attn-logit-softcapping output-logit-softcapping geglu gelu-tanh use-fused-rmsnorm use-fused-swiglu
use-fused-rotary-pos-emb sliding-window multi-head-latent-attention q-lora-rank kv-lora-rank qk-nope-head-dim qk-rope-head-dim
v-head-dim rope-scaling-type rope-scaling-factor rope-scaling-beta-fast rope-scaling-beta-slow rope-scaling-mscale
rope-scaling-mscale-all-dim rope-scaling-original-max-position-embeddings num-experts moe-router-topk
moe-router-load-balancing-type moe-aux-loss-coeff moe-z-loss-coeff moe-input-jitter-eps moe-token-dispatcher-type moe-grouped-gemm
moe-per-layer-logging moe-expert-capacity-factor moe-token-drop-policy moe-pad-expert-input-to-capacity moe-intermediate-size
n-shared-experts topk-group routed-scaling-factor norm-topk-prob seq-aux first-k-dense-replace moe-layer-freq
moe-device-level-aux-loss-coeff moe-comm-aux-loss-coeff moe-permutation-async-comm micro-batch-size global-batch-size
rampup-batch-size train-iters train-samples lr min-lr lr-decay-style lr-decay-iters lr-warmup-iters lr-warmup-fraction
lr-warmup-samples weight-decay start-weight-decay end-weight-decay clip-grad adam-beta1 adam-beta2 adam-eps optimizer bf16 fp16
loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis seed recompute-granularity recompute-method
recompute-num-layers recompute-activations use-flash-attn exit-interval exit-duration-in-mins exit-signal-handler manual-gc
no-check-for-nan-in-loss-and-grad override-opt_param-scheduler use-checkpoint-opt_param-scheduler reuse-fp32-param swap-attention
use-deter-comp data-path split train-data-path valid-data-path test-data-path data-cache-path mock-data num-workers seq-length
tokenizer-type tokenizer-model vocab-file merge-file reset-position-ids reset-attention-mask eod-mask-loss dataloader-type
no-mmap-bin-files eval-interval eval-iters skip-train tokenizer-name-or-path padded-vocab-size is-instruction-dataset prompt-type
no-shuffle stage lora-r lora-alpha lora-target-modules lora-load save save-interval load finetune no-save-optim no-save-rng
no-load-optim no-load-rng ckpt-step use-checkpoint-args exit-on-missing-checkpoint pretrained-checkpoint use-dist-ckpt
dist-ckpt-format model-type load-model-type save-model-type target-tensor-parallel-size target-pipeline-parallel-size
target-expert-model-parallel-size model-type-hf load-dir save-dir use-mcore-models params-dtype log-interval log-throughput
log-params-norm log-num-zeros-in-grad timing-log-level tensorboard-dir wandb-project input-jitter use-mc2
nproc-per-node nnodes node-rank master-addr master-port worker-num local-worker-num log-dir join cluster-time-out bind-core
"""


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in which the scripts' data are."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "data").mkdir()
    for name in ("alpaca", "a", "b"):
        for end in (".bin", ".idx"):
            (folder / "data" / f"{name}_text_document{end}").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def settings_of(made: dict[str, Any], tuning: bool = False) -> Settings:
    import tomli_w

    path = Path("made.toml")
    path.write_text(tomli_w.dumps(made))
    settings = read_settings(str(path), [], 0, tuning)
    assert not model_problems(settings)
    return settings


def parameters(settings: Settings) -> int:
    kind: Any = families()[str(settings.model.family)]
    return parameter_count(kind, config_of(settings, None))


def flags_of(text: str) -> list[str]:
    return text.split()


def changed(more: str = "", without: str = "", base: str = TINY, family: str | None = None) -> Any:
    words = flags_of(base)
    for name in without.split():
        at = words.index(name)
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[at:end]
    return settings_of_flags([*words, *more.split()], family)


def refused(more: str = "", without: str = "", base: str = TINY, family: str | None = None) -> str:
    with pytest.raises(MegatronError) as caught:
        changed(more, without, base, family)
    return str(caught.value)


def test_grok_40b() -> None:
    """ModelLink's variant: SiLU, untied, the two best renormalised, no cap; 40.97 B parameters."""
    made = settings_of_script(GROK, {})
    settings = settings_of(made.settings)
    assert parameters(settings) == 40_970_557_440
    config = config_of(settings, None)
    assert (config.activation, config.tied, config.renormalise, config.softcap) == ("silu", False, True, 0.0)
    assert (config.top_k, config.num_experts, config.balance, config.balance_coef) == (2, 8, "micro_batch", 0.01)
    assert (config.dim_head, config.num_heads_kv, config.rope_base, config.norm_eps, config.init_std) == (128, 8, 1e4, 1e-5, 0.01)
    assert config.embed_scale == pytest.approx(math.sqrt(6144)) and config.output_scale == pytest.approx(1 / math.sqrt(3))
    layout, batch, optimizer = settings.layout, settings.batch, settings.optimizer
    assert (layout.ranks, layout.tp, layout.pp, layout.ep, layout.recompute) == (16, 4, 2, 2, True)
    assert (batch.size, batch.micro, settings.data.length, settings.train.steps) == (128, 1, 8192, 2000)
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (1e-5, [0.9, 0.95], 1e-8, 0.1)
    schedule = settings.schedule
    assert (schedule.name, schedule.warmup, schedule.end, schedule.min_lr) == ("cosine", 2, 1280, 1e-6)
    assert (settings.data.shared_storage, settings.data.packed, settings.data.split) == (False, False, "99990,0,10")
    assert settings.data.files == ["data/alpaca_text_document"] and settings.tokenizer.path == "grok-1"
    assert (settings.out, settings.save.every, settings.seed, settings.model.dtype) == ("runs/grok", 500, 1234, "bfloat16")
    told = "\n".join(made.notes)
    for line in ("--use-flash-attn: no meaning here", "--input-jitter: no meaning here: in ModelLink it turns the jitter off"):
        assert line in told
    assert "--swiglu: is SiLU" in told and "--use-mc2: no meaning here: ModelLink ignores it" in told


def test_llama_7b() -> None:
    made = settings_of_script(LLAMA, {})
    settings = settings_of(made.settings)
    assert settings.model.family == "llama" and parameters(settings) == 6_738_415_616
    assert (settings.layout.ranks, settings.layout.tp, settings.layout.recompute) == (8, 8, False)
    assert settings.data.files == [0.3, "data/a_text_document", 0.7, "data/b_text_document"] and settings.data.packed
    assert (settings.optimizer.loss_scale, settings.optimizer.loss_scale_steps, settings.optimizer.hysteresis) == (65536, 1000, 2)
    assert (settings.schedule.warmup, settings.schedule.end, settings.data.split) == (50, 5000, "969,30,1")
    assert (settings.train.eval_every, settings.train.eval_batches) == (1000, 100)


def test_gpt2_345m_and_its_dropout() -> None:
    """The script of Megatron's examples leaves dropout at 0.1, which is not computed here."""
    with pytest.raises(MegatronError) as caught:
        settings_of_script(GPT2, {"1": "runs/gpt2", "EXTRA": ""})
    assert str(caught.value).count("which is Megatron's default 0.1") == 2
    extra = "--attention-dropout 0 --hidden-dropout 0 --vocab-size 50257"
    settings = settings_of(settings_of_script(GPT2, {"1": "runs/gpt2", "EXTRA": extra}).settings)
    assert settings.model.family == "gpt2" and parameters(settings) == 354_871_296
    assert config_of(settings, None).dim_ff == 4096 and config_of(settings, None).max_positions == 1024
    assert (settings.schedule.warmup, settings.optimizer.loss_scale, settings.tokenizer.path) == (
        3200,
        2.0**32,
        "data/gpt2-vocab.json",
    )
    assert (settings.out, settings.optimizer.betas, settings.layout.ranks) == ("runs/gpt2", [0.9, 0.999], 8)


@pytest.mark.parametrize(
    ("flags", "family", "count"),
    [
        (MIXTRAL, "mixtral", 46_702_792_704),
        (QWEN, "qwen2", 7_615_616_512),
        (DEEPSEEK, "deepseek_v2", 15_706_484_224),
    ],
)
def test_other_families(flags: str, family: str, count: int) -> None:
    """Counts are those of the published models."""
    settings = settings_of(settings_of_flags(flags_of(flags)).settings)
    assert (settings.model.family, parameters(settings)) == (family, count)


def test_deepseeks_router_and_positions() -> None:
    config = config_of(settings_of(settings_of_flags(flags_of(DEEPSEEK)).settings), None)
    assert (config.renormalise, config.groups, config.balance, config.balance_coef) == (False, 1, "sequence", 0.001)
    scaling = config.rope_scaling
    assert (scaling.rope_type, scaling.factor, scaling.original, scaling.mscale) == ("yarn", 40.0, 4096, 0.707)


@pytest.mark.parametrize(
    ("more", "without", "family"),
    [
        ("--qk-layernorm", "", "qwen3"),
        ("--qk-layernorm --num-experts 4 --moe-intermediate-size 32 --moe-router-topk 2", "", "qwen3_moe"),
        ("--post-norm --num-experts 4 --attn-logit-softcapping 30 --gelu-tanh", "--swiglu", "grok1"),
        ("", "--position-embedding-type --normalization --swiglu --disable-bias-linear", "gpt2"),
        ("", "", "llama"),
    ],
)
def test_the_family_is_found_of_the_flags(more: str, without: str, family: str) -> None:
    more += " --max-position-embeddings 128"
    settings = settings_of(changed(more, without).settings)
    assert settings.model.family == family
    parameters(settings)


def test_faithful_grok() -> None:
    """Weights of the softmax over all experts, tanh GELU, a cap."""
    more = "--post-norm --num-experts 4 --attn-logit-softcapping 30 --gelu-tanh --moe-router-load-balancing-type softmax_topk"
    config = config_of(settings_of(changed(more, "--swiglu").settings), None)
    assert (config.activation, config.softcap, config.renormalise, config.balance) == ("gelu_tanh", 30.0, False, None)
    assert (config.embed_scale, config.output_scale, config.tied) == (1.0, 1.0, True)


def test_defaults_of_megatron_are_written_out_and_told() -> None:
    made = changed()
    wanted = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0}
    assert {name: made.settings["optimizer"][name] for name in wanted} == wanted
    assert (made.settings["seed"], made.settings["data"]["split"], made.settings["data"]["packed"]) == (1234, "969,30,1", False)
    assert made.settings["schedule"] == {"name": "linear", "warmup": 0, "end": 100, "min_lr": 0.0}
    assert made.settings["model"]["dim_ff"] == 128 and made.settings["model"]["dtype"] == "float32"  # int(8 * 64 / 3 / 64) * 64
    told = "\n".join(made.notes)
    for name in ("--weight-decay", "--adam-eps", "--seed", "--split", "--ffn-hidden-size", "--lr-decay-style", "--min-lr"):
        assert f"{name}: not given; Megatron's default counts" in told


def test_every_listed_flag_is_known_and_in_one_table() -> None:
    assert not [name for name in LISTED.split() if f"--{name}" not in FLAGS]
    assert len(FLAGS) == len(MAPPED) + len(WITHOUT_MEANING) + len(REFUSED)


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_a_mapped_flag_is_read(name: str) -> None:
    """None is only listed: the code asks for each, by its whole name or by its stem."""
    folder = Path(sys.modules[settings_of_flags.__module__].__file__ or "").parent
    code = "".join((folder / f"megatron{end}.py").read_text() for end in ("", "_given", "_model"))
    stems = ("--lr-decay", "--lr-warmup", "--rope-scaling-type")
    quoted = f'"{name}"' in code or f'"{name[2:]}"' in code
    assert quoted or any(name in (f"{stem}-iters", f"{stem}-samples") for stem in stems)


@pytest.mark.parametrize("name", sorted(WITHOUT_MEANING))
def test_a_flag_without_meaning_changes_nothing_and_is_told(name: str) -> None:
    made = changed(f"{name} {'1' if FLAGS[name].values else ''}")
    assert made.settings == changed().settings
    assert f"{name}: no meaning here: {WITHOUT_MEANING[name].says}" in made.notes


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_flag_is_refused(name: str) -> None:
    value = "odd" if FLAGS[name].values else ""
    assert f"{f'{name} {value}'.strip()}: refused: {REFUSED[name].says}" in refused(f"{name} {value}")
    for harmless in REFUSED[name].harmless:
        assert changed(f"{name} {harmless}").settings == changed().settings


@pytest.mark.parametrize(
    ("more", "without", "told"),
    [
        ("--num-layer 4", "", "--num-layer: there is no such flag; did you mean --num-layers?"),
        ("--zzzzzz", "", "--zzzzzz: there is no such flag; leave it out"),
        ("--swiglu yes", "", "yes: is no flag"),
        ("--swiglu=yes", "", "--swiglu: takes no value, not yes"),
        ("--seed", "", "--seed: takes one value, not none"),
        ("--seed x", "", "--seed x: must be a whole number"),
        ("--norm-epsilon nan", "", "--norm-epsilon nan: must be finite"),
        ("--tensor-model-parallel-size 0", "", "--tensor-model-parallel-size 0: must be at least 1"),
        ("", "--num-layers", "--num-layers: is missing, and has no default: give it"),
        ("", "--lr", "--lr: is missing"),
        ("", "--data-path", "--data-path: is missing"),
        ("", "--hidden-dropout", "--hidden-dropout: not given, which is Megatron's default 0.1"),
        ("--hidden-dropout 0.1", "--hidden-dropout", "--hidden-dropout 0.1: refused"),
        (
            "",
            "--normalization",
            "--normalization LayerNorm, Megatron's default where --normalization is not given: llama has RMSNorm",
        ),
        ("--position-embedding-type alibi", "--position-embedding-type", "--position-embedding-type alibi: llama has rope"),
        ("--fp16 --bf16", "", "--bf16 --fp16: only one of them can be"),
        ("--moe-router-load-balancing-type sinkhorn --num-experts 4", "", "sinkhorn: is not computed here; aux_loss, none"),
        ("--lr-decay-style polynomial", "", "--lr-decay-style polynomial: is not computed here; constant, linear, cosine"),
        ("--optimizer sgd", "", "--optimizer sgd: refused: AdamW is the only optimizer"),
        ("--context-parallel-size 2", "", "--context-parallel-size 2: refused"),
        ("--clip-grad 0", "", "--clip-grad 0: gradients are always clipped: give a large number"),
        ("--adam-beta2 1", "", "--adam-beta2 1: must be below 1"),
        ("--min-lr 1", "", "--min-lr 1: is above --lr 0.001"),
        ("--lr-warmup-fraction 0.015", "", "of 100 steps is 1.5, not a whole number: give --lr-warmup-iters 2"),
        ("--lr-warmup-samples 12", "", "--lr-warmup-samples 12: is not a multiple of the 8 samples of a step"),
        ("--lr-warmup-iters 1 --lr-warmup-samples 8", "", "--lr-warmup-iters --lr-warmup-samples: give one of them"),
        ("--lr-warmup-iters 100", "", "a warm-up of 100 steps does not fit into the 100"),
        ("--train-samples 800", "", "--train-iters --train-samples: give one of them"),
        ("--train-samples 4", "--train-iters", "--train-samples 4: are not enough for a step of 8"),
        ("--rampup-batch-size 2 2 80", "", "--rampup-batch-size: goes with --train-samples only"),
        ("--rampup-batch-size 2 4 80 --train-samples 800", "--train-iters", "does not come to --global-batch-size 8"),
        (
            "--rampup-batch-size 2 2 80 --train-samples 800",
            "--train-iters",
            "Megatron's rate follows samples and ours follows steps",
        ),
        ("--rampup-batch-size 2 2", "", "--rampup-batch-size 2 2: must be three whole numbers"),
        (
            "--lr-decay-style inverse-square-root --min-lr 9e-4 --lr-warmup-iters 2",
            "",
            "inverse-square-root: the rate would come down",
        ),
        ("--reset-attention-mask", "", "--reset-position-ids: is not given, and its twin is"),
        ("--eod-mask-loss", "", "--eod-mask-loss: is not computed here without --reset-position-ids"),
        ("--split 0,1,1", "", "--split 0,1,1: must be up to three whole numbers, the first not 0"),
        ("--data-path a b", "", "--data-path a b: must be one prefix, or weights and prefixes in turn"),
        ("--nproc_per_node 3 --tensor-model-parallel-size 2", "", "does not divide 3 ranks"),
        (
            "--global-batch-size 9 --nproc_per_node 2",
            "",
            "--global-batch-size 9: is not a multiple of --micro-batch-size 1 times 2",
        ),
        ("", "--global-batch-size --nproc_per_node", "--global-batch-size: is not given, and without the number of ranks"),
        ("--num-layers-per-virtual-pipeline-stage 1", "", "is of a pipeline: give --pipeline-model-parallel-size"),
        (
            "--num-layers-per-virtual-pipeline-stage 3 --pipeline-model-parallel-size 2 --nproc_per_node 2",
            "",
            "4 layers are not a multiple of it times 2 stages",
        ),
        ("--num-layer-list 1,2,1", "", "--num-layer-list 1,2,1: must be a number of layers for each of the 1 stages"),
        (
            "--num-layer-list 1,2 --pipeline-model-parallel-size 2 --nproc_per_node 2",
            "",
            "--num-layer-list 1,2: is 3 layers, and --num-layers says another number",
        ),
        ("--post-norm", "", "--num-experts: is not given, and grok1 cannot be without it"),
        (
            "--add-qkv-bias --num-experts 4",
            "",
            "--num-experts: qwen2 has no such thing, only deepseek_v2, grok1, mixtral, qwen3_moe",
        ),
        ("--num-experts 4 --moe-intermediate-size 32", "", "--moe-intermediate-size: mixtral has no such thing"),
        (
            "--num-experts 4 --moe-router-load-balancing-type softmax_topk",
            "",
            "without --norm-topk-prob the weights do not sum to 1",
        ),
        ("--rope-scaling-factor 4", "", "--rope-scaling-factor: has no meaning without --rope-scaling-type"),
        ("--rope-scaling-type ntk", "", "--rope-scaling-type ntk: is not computed here; yarn, linear"),
        ("--lora-r 8 --lora-target-modules linear_qkv", "", "--lora-r: adapters are trained on a model that is there"),
        ("--finetune", "", "--finetune: of what is said by --load FOLDER"),
        ("--finetune --load x --lora-r 8 --lora-target-modules qkv", "", "--lora-target-modules qkv: which layers get adapters"),
        ("", "--swiglu", "--swiglu: is not given, and llama cannot be without it"),
        ("--num-attention-heads 5", "", "--hidden-size 64: is not a multiple of --num-attention-heads 5: give --kv-channels"),
    ],
)
def test_what_cannot_be_taken_over_is_said_with_what_to_do(more: str, without: str, told: str) -> None:
    assert told in refused(more, without)


@pytest.mark.parametrize(
    ("more", "without", "told"),
    [
        ("--routed-scaling-factor 16 --norm-topk-prob", "", "weights that sum to 1 are not scaled here"),
        ("--topk-group 3", "", "--topk-group: only group_limited_greedy has groups"),
        ("--moe-router-load-balancing-type group_limited_greedy --topk-group 9", "", "--topk-group 9: is more than the 8 groups"),
        ("", "--rope-scaling-mscale", "--rope-scaling-mscale: is missing"),
        ("--group-query-attention", "", "--group-query-attention: deepseek_v2 has no such thing"),
        ("--norm-epsilon 1e-5", "", "--norm-epsilon: the norms of latent vectors have 1e-06 here"),
        ("--moe-device-level-aux-loss-coeff 0.05", "", "its loss depends on the layout of ranks: set it to 0"),
    ],
)
def test_what_deepseek_cannot_be(more: str, without: str, told: str) -> None:
    assert told in refused(more, without, DEEPSEEK)


def test_groups_of_experts_are_modellinks() -> None:
    made = changed("--moe-router-load-balancing-type group_limited_greedy --topk-group 3", "", DEEPSEEK)
    assert (made.settings["model"]["groups"], made.settings["model"]["keep_groups"]) == (8, 3)
    assert "as many groups as --expert-model-parallel-size, 8" in "\n".join(made.notes)


def test_a_family_that_is_given_has_to_fit() -> None:
    assert "--add-qkv-bias: is not given, and qwen2 cannot be without it" in refused(family="qwen2")
    assert "--family lama: there is no such family for flags; there are llama" in refused(family="lama")
    assert "--swiglu: gpt2 cannot be with it" in refused(family="gpt2")


@pytest.mark.parametrize("warmup", [0, 4, 10])
def test_inverse_square_root_is_megatrons(warmup: int) -> None:
    """lr * sqrt(warm-up) / sqrt(n), and a straight warm-up."""
    made = changed(f"--lr-decay-style inverse-square-root --lr-warmup-iters {warmup}")
    settings = settings_of(made.settings)
    noam = make_schedule(settings, _Rates())
    for n in range(100):
        wanted = 1e-3 * n / warmup if n < warmup else 1e-3 * math.sqrt(max(warmup, 1)) / math.sqrt(max(n, 1))
        noam.step(n)
        assert noam.current_lr == pytest.approx(wanted)


class _Rates:
    """What a schedule writes rates into."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 1.0}]


def test_samples_become_steps() -> None:
    made = changed("--train-samples 800 --lr-warmup-samples 80 --lr-decay-samples 400 --lr-decay-style cosine", "--train-iters")
    assert made.settings["train"]["steps"] == 100
    assert made.settings["schedule"] == {"name": "cosine", "warmup": 10, "end": 50, "min_lr": 0.0}


def test_a_ramp_up_counts_steps_as_megatron() -> None:
    made = changed("--rampup-batch-size 2 2 90 --train-samples 1000 --lr-decay-style constant", "--train-iters")
    consumed = steps = 0
    while consumed <= 90:  # Megatron's update_train_iters
        size = 2 + 2 * int(consumed / (90 / 3))
        consumed, steps = consumed + min(size, 8), steps + 1
    assert made.settings["train"]["steps"] == steps + (1000 - consumed) // 8
    assert settings_of(made.settings).batch.ramp_up is not None


def test_pipelines() -> None:
    base = "--pipeline-model-parallel-size 2 --nproc_per_node 2"
    layout = settings_of(changed(f"{base} --num-layers-per-virtual-pipeline-stage 1").settings).layout
    assert (layout.chunks, layout.schedule) == (2, "interleaved")
    assert settings_of(changed(f"{base} --num-layer-list 1,3").settings).layout.stages == [1, 3]


def test_wsd() -> None:
    made = changed("--lr-decay-style WSD --lr-wsd-decay-iters 20 --lr-warmup-iters 5 --min-lr 1e-5")
    wanted = {"name": "wsd", "warmup": 5, "end": 100, "min_lr": 1e-5, "decay": 20, "shape": "exponential"}
    assert made.settings["schedule"] == wanted
    settings_of(made.settings)


def test_adapters_go_on_from_a_folder(files: Path) -> None:
    (files / "hf").mkdir(exist_ok=True)
    (files / "hf" / "config.json").write_text("{}")
    made = changed("--finetune --load hf --is-instruction-dataset --lora-r 8 --lora-target-modules linear_qkv linear_proj --bf16")
    settings = settings_of(made.settings, tuning=True)
    assert made.tuning and settings.model.pretrained == "hf" and settings.data.rows == "data/a_text_document"
    assert settings.lora is not None and (settings.lora.rank, settings.lora.alpha) == (8, 32.0)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert re.fullmatch(settings.lora.pattern, name)


def test_what_is_told() -> None:
    assert "--load elsewhere: is another folder than --save, and is not read" in "\n".join(changed("--load elsewhere").notes)
    assert "padded to a multiple of 256, as in Megatron: 1024" in "\n".join(
        changed("--vocab-size 1000 --tensor-model-parallel-size 2 --nproc_per_node 2").notes
    )
    assert "Megatron pads the tokenizer's to a multiple of 128" in "\n".join(changed().notes)
    told = "\n".join(changed("--reset-position-ids --reset-attention-mask").notes)
    assert "which the data need not have; the last token of each has no target here" in told
    made = changed("--split 100")
    assert "--split 100,0,0: has no validation data, and nothing is evaluated" in made.notes
    assert "eval_every" not in settings_of(made.settings).model_dump(exclude_none=True)["train"]
    assert "--seed: given more than once; the last one counts, as in Megatron: 2" in changed("--seed 1 --seed 2").notes
    assert "layout.ranks: no flag of a launcher says" in "\n".join(changed("", "--nproc_per_node").notes)


def _groups(words: list[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


@given(st.permutations(_groups(flags_of(DEEPSEEK))))
def test_the_order_of_flags_does_not_matter(groups: list[list[str]]) -> None:
    made = settings_of_flags([word for group in groups for word in group])
    assert made == settings_of_flags(flags_of(DEEPSEEK))


@given(st.data())
def test_quoting_styles_do_not_matter(data: st.DataObject) -> None:
    """Each word plain, in quotes of either kind, escaped, or by way of a variable or an array."""
    lines, words = [], []
    for number, word in enumerate(flags_of(TINY)):
        style = data.draw(
            st.sampled_from(["plain", "single", "double", "escaped", "name", "braces", "quoted name", "default", "array"])
        )
        if style in ("name", "braces", "quoted name"):
            lines.append(data.draw(st.sampled_from([f"V{number}={word}", f'export V{number}="{word}"', f"V{number}='{word}' # x"])))
        if style == "array":
            lines.append(f"V{number}=({word})")
        words.append(
            {
                "plain": word,
                "single": f"'{word}'",
                "double": f'"{word}"',
                "escaped": "".join(f"\\{char}" for char in word),
                "name": f"$V{number}",
                "braces": f"${{V{number}}}",
                "quoted name": f'"$V{number}"',
                "default": f"${{NOT_SET:-{word}}}",
                "array": f'"${{V{number}[@]}}"',
            }[style]
        )
        words.append(data.draw(st.sampled_from([" ", "  \\\n  ", "\t"])))
    script = "\n".join([*lines, "python pretrain_gpt.py " + "".join(words)])
    assert training_command(script, {}) == ["python", "pretrain_gpt.py", *flags_of(TINY)]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1), min_size=1, max_size=4))
def test_what_shlex_quotes_is_read_as_it_was(values: list[str]) -> None:
    words = ["torchrun", "pretrain.py", "--data-path", *values]
    found = training_command(shlex.join(words), {})
    assert found == words


SHELL_CASES = [
    ("A=2\nB=$A\nA=3\npython x.py --seed $B$A", ["--seed", "23"]),
    ("A=2; B=3\npython x.py --seed $(( ($A + B) * 2 - 7 / 2 ))", ["--seed", "7"]),
    ("A='a b'\npython x.py --data-path $A", ["--data-path", "a", "b"]),
    ("A='a b'\npython x.py --data-path \"$A\"", ["--data-path", "a b"]),
    ("A=a\nA+=b\npython x.py --save $A/c.$A", ["--save", "ab/c.ab"]),
    ("A=(1 2)\nA+=(3)\npython x.py --rampup-batch-size ${A[@]}", ["--rampup-batch-size", "1", "2", "3"]),
    ("E=\npython x.py --save ${E:-d} --load ${E-d}x", ["--save", "d", "--load", "x"]),
    ("X=1 Y=2 python x.py --seed 1 $@", ["--seed", "1"]),
    ("python x.py --seed 1 >log 2>&1 &", ["--seed", "1"]),
    ("nohup python x.py --seed 1 | tee log # --bf16", ["--seed", "1"]),
    ("echo $NOT_SET $(date)\nT=$(date)\npython x.py --seed 1", ["--seed", "1"]),
    ("if [ -d x ]; then\n  A=1\nfi\nA=2\npython x.py --seed $A", ["--seed", "2"]),
    ("python x.py --seed 1#2", ["--seed", "1#2"]),
    ('A="x  y"\npython x.py --save "a  $A"\'$A\'"\\$A"', ["--save", "a  x  y$A$A"]),
]


@pytest.mark.parametrize(("script", "words"), SHELL_CASES)
def test_what_a_shell_would_make_of_it(script: str, words: list[str]) -> None:
    assert training_command(script, {})[2:] == words


@pytest.mark.parametrize("script", [script for script, _ in SHELL_CASES] + [GROK, LLAMA, GPT2])
def test_bash_makes_the_same_of_it(script: str, tmp_path: Path) -> None:
    """Bash runs the script with programs that write down their arguments."""
    (tmp_path / "logs").mkdir()
    for name in ("python", "torchrun"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >"{tmp_path}/words"\n')
        program.chmod(0o755)
    given = ["one"] if "$1" in script else []
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "EXTRA": "--bf16"}
    subprocess.run(["bash", "-c", f"{script}\nwait", "script", *given], env=variables, cwd=tmp_path, check=True, timeout=20)
    for _ in range(100):  # a command in the background may be later, and so is what a pipe's end does not wait for
        if (tmp_path / "words").exists() and (tmp_path / "words").read_bytes().endswith(b"\0"):
            break
        time.sleep(0.05)
    found = (tmp_path / "words").read_bytes().decode().split("\0")[:-1]
    assert training_command(script, {"1": "one", "EXTRA": "--bf16"}) == found


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("python x.py --seed $SEED", "$SEED is not set in the script: give it, as --set SEED=VALUE"),
        ("S=$(date)\npython x.py --seed $S", "$S is set in line 1 to what is not known: $(date) is a command, and none is run"),
        ("S=`date`\npython x.py --seed $S", "`date` is a command, and none is run"),
        ("if [ $A ]; then\nS=1\nfi\npython x.py --seed $S", "$S is set in a branch or loop, in line 2, which is not run"),
        ("python x.py --seed ${S%%x}", "${S%%x} is understood only as ${NAME}"),
        ("A=1\npython x.py --seed $((A<<2))", "is understood only with whole numbers"),
        ("python x.py --seed $((9**9**9))", "is understood only with whole numbers"),
        ("python x.py --seed $((9**-9))", "is understood only with whole numbers"),
        ("A=9223372036854775807\npython x.py --seed $((A*A))", "is understood only with whole numbers"),
        ("python x.py --seed 'a", "line 1: ' has no second one"),
        ("A=(1\npython x.py --seed 1", "the array has no end"),
        ("A=(1 $(ls))\npython x.py --seed ${A[@]}", "$(ls) is a command"),
        ("python x.py --seed ${S", "has no end: } is missing"),
        ("echo --seed 1", "there is no command that starts a Python file with flags"),
        ("python x.py --seed 1\n\npython y.py --seed 2", "there are 2 commands with flags, in lines 1, 3: keep one"),
    ],
)
def test_what_cannot_be_read_without_running_it(script: str, told: str) -> None:
    with pytest.raises(MegatronError, match=re.escape(told)):
        settings_of_script(script, {})


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "grok.sh").write_text(GROK)
    assert main(["megatron-flags", "grok.sh", "--output", "grok.toml", "--set", "TP=8", "--set", "EP=1"]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "--use-flash-attn: no meaning here: it chooses a kernel" in told.err
    settings = read_settings("grok.toml", [], 0)
    assert (settings.layout.tp, settings.layout.ep, settings.layout.ranks) == (8, 1, 16)
    assert main(["megatron-flags", "grok.sh", "--output", "grok.toml"]) == 2
    assert "grok.toml: is there already" in capsys.readouterr().err
    assert main(["megatron-flags", "--", *flags_of(TINY)]) == 0
    (files / "tiny.toml").write_text(capsys.readouterr().out)
    assert read_settings("tiny.toml", [], 0).model.family == "llama"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give a script, or flags after --"),
        (["nowhere.sh"], "nowhere.sh cannot be read"),
        (["a.sh", "b.sh"], "a.sh b.sh: give one script, or flags after --"),
        (["a.sh", "--set", "TP"], "--set TP: write NAME=VALUE, as --set TP=4"),
        (["--set", "TP=1", "--", "--num-layers", "1"], "--set: is of variables of a script"),
        (["--", "--bf17"], "--bf17: there is no such flag; did you mean --bf16?"),
    ],
)
def test_the_command_is_told_what_to_do(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["megatron-flags", *words]) == 2
    assert told in capsys.readouterr().err


def test_each_flag_is_in_the_documentation_with_what_it_becomes() -> None:
    lines = (DOCS / "training-megatron.md").read_text(encoding="utf-8").splitlines()
    for name, flag in FLAGS.items():
        assert any(f"`{name}`" in line and flag.says in line for line in lines), name
