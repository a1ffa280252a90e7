"""The model that flags of Megatron-LM's and ModelLink's describe: its family, and its sizes."""

from __future__ import annotations

from typing import Any

from .megatron_given import Given, MegatronError

FAMILIES: tuple[str, ...] = ("llama", "gpt2", "qwen2", "qwen3", "qwen3_moe", "mixtral", "grok1", "deepseek_v2")
_ALL: set[str] = set(FAMILIES)
_WITH_EXPERTS = {"mixtral", "qwen3_moe", "grok1", "deepseek_v2"}
_ROPE_SCALING = "--rope-scaling-"
_LATENT_EPS = 1e-6
_LATENT = ("--q-lora-rank", "--kv-lora-rank", "--qk-nope-head-dim", "--qk-rope-head-dim", "--v-head-dim")

# Which families a flag can be said of; of flags that are not here all, or `_requirements` says it.
_ONLY: dict[str, set[str]] = {
    **{f"--{name}": {"grok1"} for name in ("post-norm", "embedding-multiplier-scale", "output-multiplier-scale", "gelu-tanh")},
    "--attn-logit-softcapping": {"grok1"},
    **{name: {"deepseek_v2"} for name in (*_LATENT, "--multi-head-latent-attention")},
    **{f"--{name}": {"deepseek_v2"} for name in ("n-shared-experts", "topk-group", "routed-scaling-factor")},
    "--first-k-dense-replace": {"deepseek_v2"},
    **{f"--{name}": {"qwen3_moe", "deepseek_v2"} for name in ("moe-intermediate-size", "moe-ffn-hidden-size")},
    **{f"--{name}": _WITH_EXPERTS for name in ("num-experts", "moe-router-topk", "moe-router-load-balancing-type")},
    **{f"--{name}": _WITH_EXPERTS for name in ("moe-aux-loss-coeff", "norm-topk-prob", "seq-aux")},
    "--qk-layernorm": {"qwen3", "qwen3_moe", "deepseek_v2"},
    "--add-qkv-bias": {"qwen2"},
    "--group-query-attention": _ALL - {"gpt2", "deepseek_v2"},
    "--kv-channels": _ALL - {"deepseek_v2"},
    "--rotary-base": _ALL - {"gpt2"},
}


def family_of(given: Given) -> str:
    """The family that the flags describe."""
    experts = given.has("--num-experts")
    if given.has("--multi-head-latent-attention"):
        return "deepseek_v2"
    if given.first(("--post-norm", "--embedding-multiplier-scale", "--attn-logit-softcapping")):
        return "grok1"
    if given.has("--qk-layernorm"):
        return "qwen3_moe" if experts else "qwen3"
    if given.has("--add-qkv-bias"):
        return "qwen2"
    if experts:
        return "mixtral"
    return "gpt2" if _norm(given) == "LayerNorm" and _positions(given) == "learned_absolute" else "llama"


def model_section(given: Given, family: str | None) -> dict[str, Any]:
    """The section `model`: family, sizes and dtype; what is wrong is noted.

    Raises:
        MegatronError: there is no such family.
    """
    if family is not None and family not in FAMILIES:
        raise MegatronError(f"--family {family}: there is no such family for flags; there are {', '.join(FAMILIES)}")
    family = family or family_of(given)
    _check(given, family)
    sizes: dict[str, Any] = {"family": family, "dtype": dtype_of(given), **_common(given, family)}
    if family in _WITH_EXPERTS:
        sizes.update(_experts(given, family))
    if family == "grok1":
        sizes.update(
            activation="gelu_tanh" if given.has("--gelu-tanh") else "silu",
            softcap=given.number("--attn-logit-softcapping", 0.0, 0.0),
            embed_scale=given.number("--embedding-multiplier-scale", 1.0),
            output_scale=given.number("--output-multiplier-scale", 1.0),
        )
        for name in ("embed_scale", "output_scale"):
            if sizes[name] == 0:
                given.problems.append(f"model.{name}: a multiplier of 0 leaves nothing of the model")
    if family == "deepseek_v2":
        sizes.update(_latent(given))
    if family == "llama":
        sizes.update(attention_bias=not given.has("--disable-bias-linear"), mlp_bias=not given.has("--disable-bias-linear"))
    given.notes.append(
        "--init-method-std: init_std is that of all matrices; Megatron divides that of projections behind attention and of the "
        "inner layer by sqrt(2 * layers), which is not done here"
    )
    return sizes


def dtype_of(given: Given) -> str:
    """The dtype of the parameters."""
    if given.has("--bf16") and given.has("--fp16"):
        given.problems.append("--bf16 --fp16: only one of them can be: leave one out")
    return "bfloat16" if given.has("--bf16") else "float16" if given.has("--fp16") else "float32"


def _norm(given: Given) -> str:
    return given.flags.get("--normalization", ["LayerNorm"])[0]


def _positions(given: Given) -> str:
    rotary = given.has("--use-rotary-position-embeddings")
    return given.flags.get("--position-embedding-type", ["rope" if rotary else "learned_absolute"])[0]


def _check(given: Given, family: str) -> None:
    """Flags that the family cannot express, and those that it cannot be without."""
    for name, families in _ONLY.items():
        if given.has(name) and family not in families:
            given.problems.append(
                f"{name}: {family} has no such thing, only {', '.join(sorted(families))}: leave it out, or give --family"
            )
    if family == "gpt2" and (scaling := [name for name in given.flags if name.startswith(_ROPE_SCALING)]):
        given.problems.append(f"{min(scaling)}: gpt2 has no rotary positions: leave it out")
    wanted_norm, wanted_positions = ("LayerNorm", "learned_absolute") if family == "gpt2" else ("RMSNorm", "rope")
    for name, found, wanted in (
        ("--normalization", _norm(given), wanted_norm),
        ("--position-embedding-type", _positions(given), wanted_positions),
    ):
        if found != wanted:
            what = f"{name} {found}" + ("" if given.has(name) else f", Megatron's default where {name} is not given")
            given.problems.append(f"{what}: {family} has {wanted}; give {name} {wanted}, or another --family")
    needed = {
        "--swiglu": family not in ("gpt2", "grok1"),
        "--disable-bias-linear": family not in ("gpt2", "llama"),
        "--add-qkv-bias": family == "qwen2",
        "--qk-layernorm": family in ("qwen3", "qwen3_moe", "deepseek_v2"),
        "--num-experts": family in _WITH_EXPERTS,
        "--multi-head-latent-attention": family == "deepseek_v2",
        "--post-norm": family == "grok1",
    }
    for name in (name for name, needs in needed.items() if needs and not given.has(name)):
        given.problems.append(f"{name}: is not given, and {family} cannot be without it: give it, or another --family")
    for name in ("--swiglu", "--disable-bias-linear"):
        if family == "gpt2" and given.has(name):
            given.problems.append(f"{name}: gpt2 cannot be with it: leave it out, or give --family llama")
    if family == "grok1":
        _check_grok(given)
    if given.has("--num-query-groups") and not given.has("--group-query-attention"):
        given.notes.append("--num-query-groups: no meaning without --group-query-attention, as in Megatron")


def _check_grok(given: Given) -> None:
    if given.has("--swiglu") == given.has("--gelu-tanh"):
        given.problems.append("--swiglu --gelu-tanh: give one of them: the experts of grok1 have a gate of SiLU or of tanh GELU")
    elif given.has("--swiglu"):
        given.notes.append("--swiglu: is SiLU, as in ModelLink; Grok-1 itself has the tanh form of GELU, which is --gelu-tanh")


def _common(given: Given, family: str) -> dict[str, Any]:
    hidden, heads = given.whole("--hidden-size"), given.whole("--num-attention-heads")
    sizes: dict[str, Any] = {
        "num_layers": given.whole("--num-layers"),
        "dim_model": hidden,
        "num_heads": heads,
        "dim_ff": _inner(given, hidden, family),
        "norm_eps": given.number("--norm-epsilon", 1e-5, 0.0),
        "init_std": given.number("--init-method-std", 0.02, 0.0),
        "tied": not given.has("--untie-embeddings-and-output-weights"),
    }
    if family != "deepseek_v2":
        grouped = given.has("--group-query-attention")
        sizes["num_heads_kv"] = given.whole("--num-query-groups", 1) if grouped else heads
        sizes["dim_head"] = given.whole("--kv-channels") if given.has("--kv-channels") else hidden // heads
        if not given.has("--kv-channels") and hidden % heads:
            given.problems.append(f"--hidden-size {hidden}: is not a multiple of --num-attention-heads {heads}: give --kv-channels")
    if family == "gpt2":
        sizes["max_positions"] = given.whole("--max-position-embeddings")
    else:
        sizes["rope_base"] = given.number("--rotary-base", 10000.0)
        sizes.update(_scaling(given))
    sizes.update(_vocabulary(given))
    return sizes


def _inner(given: Given, hidden: int, family: str) -> int:
    if given.has("--ffn-hidden-size"):
        return given.whole("--ffn-hidden-size")
    gated = given.has("--swiglu") or given.has("--gelu-tanh")
    size = int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden
    given.notes.append(f"--ffn-hidden-size: not given; Megatron's default counts: {size}")
    return size


def _vocabulary(given: Given) -> dict[str, int]:
    multiple = given.whole("--make-vocab-size-divisible-by", 128) * given.whole("--tensor-model-parallel-size", 1)
    if given.has("--padded-vocab-size"):
        return {"vocab_size": given.whole("--padded-vocab-size")}
    if given.has("--vocab-size"):
        size = -(-given.whole("--vocab-size") // multiple) * multiple
        given.notes.append(f"--vocab-size: padded to a multiple of {multiple}, as in Megatron: {size}")
        return {"vocab_size": size}
    given.notes.append(
        "--make-vocab-size-divisible-by: the flags do not say the size of the vocabulary. Megatron pads the tokenizer's to a "
        "multiple "
        f"of {multiple}; here it becomes a multiple of 128, of the size that the prepared files say (without one: the family's "
        "own): "
        "give --padded-vocab-size, or write model.vocab_size"
    )
    return {}


def _scaling(given: Given) -> dict[str, Any]:
    flags = [name for name in given.flags if name.startswith(_ROPE_SCALING)]
    if not flags:
        return {}
    if not given.has("--rope-scaling-type"):
        given.problems.append(f"{min(flags)}: has no meaning without --rope-scaling-type: give it, as yarn, or leave it out")
        return {}
    kind = given.text("--rope-scaling-type", "", ("yarn", "linear"))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": given.number("--rope-scaling-factor", None, 1.0)}
    if kind == "yarn":
        scaling.update(
            original=given.whole("--rope-scaling-original-max-position-embeddings"),
            beta_fast=given.number("--rope-scaling-beta-fast", 32.0),
            beta_slow=given.number("--rope-scaling-beta-slow", 1.0),
            mscale=given.number("--rope-scaling-mscale"),
            mscale_all_dim=given.number("--rope-scaling-mscale-all-dim"),
        )
    return {"rope_scaling": scaling}


def _experts(given: Given, family: str) -> dict[str, Any]:
    kinds = ("aux_loss", "none", "softmax_topk", *(("group_limited_greedy",) if family == "deepseek_v2" else ()))
    kind = given.text("--moe-router-load-balancing-type", "aux_loss", kinds)
    sizes: dict[str, Any] = {"num_experts": given.whole("--num-experts"), "top_k": given.whole("--moe-router-topk", 2)}
    renormalise = kind in ("aux_loss", "none") or given.has("--norm-topk-prob")
    if family != "mixtral":
        sizes["renormalise"] = renormalise
    elif not renormalise:
        given.problems.append(
            f"--moe-router-load-balancing-type {kind}: without --norm-topk-prob the weights do not sum to 1, and those of "
            "mixtral do: "
            "give it, or aux_loss"
        )
    coefficient = given.number("--moe-aux-loss-coeff", 0.0, 0.0)
    if coefficient and kind != "none":
        sizes.update(balance="sequence" if given.has("--seq-aux") else "micro_batch", balance_coef=coefficient)
        if not given.has("--seq-aux"):
            given.notes.append(
                "--moe-aux-loss-coeff: balanced over each micro-batch, as in Megatron, which depends on the layout of ranks; "
                'model.balance = "sequence" does not'
            )
    elif coefficient:
        given.notes.append("--moe-aux-loss-coeff: no meaning with --moe-router-load-balancing-type none, as in Megatron")
    if family in ("qwen3_moe", "deepseek_v2"):
        name = given.first(("--moe-intermediate-size", "--moe-ffn-hidden-size"))
        sizes["dim_expert"] = given.whole(name or "--moe-intermediate-size")
    if family == "deepseek_v2":
        sizes.update(_shared(given, kind, renormalise))
    return sizes


def _shared(given: Given, kind: str, renormalise: bool) -> dict[str, Any]:
    scale = given.number("--routed-scaling-factor", 1.0)
    if renormalise and scale != 1.0:
        given.problems.append(f"--routed-scaling-factor {scale:g}: weights that sum to 1 are not scaled here: set it to 1")
    sizes: dict[str, Any] = {
        "num_shared": given.whole("--n-shared-experts", 0, 0),
        "first_dense": given.whole("--first-k-dense-replace", 0, 0),
        "routed_scale": scale,
    }
    if kind == "group_limited_greedy":
        sizes["groups"] = given.whole("--expert-model-parallel-size", 1)
        sizes["keep_groups"] = given.whole("--topk-group")
        if sizes["keep_groups"] > sizes["groups"]:
            given.problems.append(
                f"--topk-group {sizes['keep_groups']}: is more than the {sizes['groups']} groups: make it smaller"
            )
        given.notes.append(
            f"--topk-group: ModelLink has as many groups as --expert-model-parallel-size, {sizes['groups']}; DeepSeek-V2 itself "
            "has 8, "
            "whatever the layout: model.groups"
        )
    elif given.has("--topk-group"):
        given.problems.append("--topk-group: only group_limited_greedy has groups: leave it out")
    return sizes


def _latent(given: Given) -> dict[str, Any]:
    if given.number("--norm-epsilon", 1e-5) != _LATENT_EPS:
        given.problems.append(
            f"--norm-epsilon: the norms of latent vectors have {_LATENT_EPS:g} here, and in ModelLink this one: make it that"
        )
    sizes = {
        "kv_rank": given.whole("--kv-lora-rank"),
        "dim_nope": given.whole("--qk-nope-head-dim"),
        "dim_rope": given.whole("--qk-rope-head-dim"),
        "dim_value": given.whole("--v-head-dim"),
    }
    return {**sizes, **({"q_rank": given.whole("--q-lora-rank")} if given.has("--q-lora-rank") else {})}
