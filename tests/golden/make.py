"""Write what transformers computes: `python -m tests.golden.make`, in an environment with transformers and PyTorch.

The files beside this one are of transformers 5.24.0 and PyTorch 2.14.1, on CPU, in float32.
"""

from __future__ import annotations

import sys
from typing import Any, Iterator

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from .models import CASES, FOLDER, NEW_TOKENS, PROMPTS, SEARCHES, batches, counted, weight


def files_names(kind: str, name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """A tensor in memory -> names in files, and their parts of it."""
    layer, _, last = name.rpartition(".mlp.experts.")
    if last not in ("gate_up_proj", "down_proj"):
        yield (name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if kind == "mixtral" else name), tensor
        return
    for e, matrix in enumerate(tensor):
        there = f"{layer}.block_sparse_moe.experts.{e}" if kind == "mixtral" else f"{layer}.mlp.experts.{e}"
        names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        if last == "down_proj":
            yield f"{there}.{names[2]}.weight", matrix
        else:
            half = matrix.shape[0] // 2
            yield f"{there}.{names[0]}.weight", matrix[:half]
            yield f"{there}.{names[1]}.weight", matrix[half:]


def model_of(kind: str, fields: dict[str, Any]) -> Any:
    """The model, with the weights that its names say."""
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for there, part in files_names(kind, name, parameter):
                part.copy_(torch.from_numpy(weight(there, tuple(part.shape))))
    return model


def inputs_of(batch: dict[str, np.ndarray], config: Any) -> dict[str, Any]:
    """Arguments of the model: documents as positions and a mask of (batch, 1, length, length), of each kind of layer."""
    given: dict[str, Any] = {"input_ids": torch.from_numpy(batch["ids"].astype(np.int64))}
    if "padding" in batch:
        real = batch["padding"]
        given["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        given["position_ids"] = torch.from_numpy(np.maximum(real.cumsum(1) - 1, 0))
    if "documents" in batch:
        numbers = batch["documents"]
        seen = np.tril(numbers[:, :, None] == numbers[:, None, :])
        window = getattr(config, "sliding_window", None)
        near = seen if window is None else seen & np.triu(np.ones(seen.shape, bool), 1 - window)
        whole, close = (torch.from_numpy(np.where(x, 0.0, -1e30).astype(np.float32)[:, None]) for x in (seen, near))
        mixed = {"full_attention": whole, "sliding_attention": close}
        given["attention_mask"] = close if window is None or not hasattr(config, "layer_types") else mixed
        given["position_ids"] = torch.from_numpy(seen.sum(-1) - 1)
    return given


def main() -> None:
    """The cases that are named; without a name all of them."""
    print(transformers.__version__, torch.__version__)
    for case, (kind, fields) in CASES.items():
        if sys.argv[1:] and case not in sys.argv[1:]:
            continue
        model, found = model_of(kind, fields), {}
        for name, batch in batches().items():
            with torch.no_grad():
                found[f"logits:{name}"] = model(**inputs_of(batch, model.config)).logits.numpy()
        batch = batches()["plain"]
        ids = torch.from_numpy(batch["ids"].astype(np.int64))
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        found["loss"] = loss.detach().numpy()
        for name, parameter in model.named_parameters():
            for there, part in files_names(kind, name, parameter.grad):
                found[f"grad:{there}"] = part.numpy().copy()
        np.savez_compressed(FOLDER / f"{case}.npz", **found)
        print(case, float(loss), sum(x.size for x in found.values()), counted(batch).sum())


def generation() -> None:
    """New tokens of each prompt alone, -1 behind the last one."""
    found = {}
    for case in ("llama", "qwen3_moe", "gpt2", "mistral", "qwen3-window"):
        model = model_of(*CASES[case])
        for name, settings in SEARCHES.items():
            told = {**settings, "eos_token_id": settings.get("eos_id"), "do_sample": False, "max_new_tokens": NEW_TOKENS}
            told.pop("eos_id", None)
            rows = []
            for prompt in PROMPTS:
                ids = torch.tensor([prompt])
                out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **told)[:, len(prompt) :].tolist()
                ends = settings.get("eos_id", [])
                ends = ends if isinstance(ends, list) else [ends]
                for row in out:
                    last = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
                    kept = row[: last + 1]
                    rows.append(kept + [-1] * (NEW_TOKENS - len(kept)))
            found[f"{case}:{name}"] = np.array(rows, np.int32)
    np.savez_compressed(FOLDER / "generation.npz", **found)


def adapters() -> None:
    """What PEFT 0.21.2 computes with adapters of the first case."""
    import peft  # pyright: ignore[reportMissingImports]

    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(model_of(*CASES["llama"]), settings)
    plain = {name: name.removeprefix("base_model.model.").replace(".default", "") for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.from_numpy(weight(plain[name], tuple(parameter.shape))))
    ids = torch.from_numpy(batches()["plain"]["ids"].astype(np.int64))
    logits = model(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    loss.backward()
    grads = {f"grad:{plain[name]}": p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    np.savez_compressed(FOLDER / "lora.npz", loss=loss.detach().numpy(), logits=logits.detach().numpy(), **grads)


if __name__ == "__main__":
    main()
    generation()
    if not sys.argv[1:]:
        adapters()
