"""mindnlp's GPT-2 under the wrapper: `python -m tests.benchmarks.mindnlp_gpt2 --packages FOLDER`, see `INSTALL`."""

from __future__ import annotations

import argparse
import os
import sys

from tests.benchmarks.harness import environment, launch, report, table, write_page

STEPS, VOCAB, LENGTH, BATCH = 6, 31, 16, 4

INSTALL = (
    "pip install --no-deps --target FOLDER mindnlp==0.3.1 pytest==7.2.0 attrs pluggy==1.3.0 iniconfig sentencepiece ml_dtypes "
    "regex addict jieba pandas==2.2.3 pytz python-dateutil tzdata six pyarrow==17.0.0 pyarrow_hotfix datasets==2.19.0 "
    "multiprocess dill fsspec==2024.3.1 xxhash requests huggingface_hub==0.23.0 evaluate aiohttp multidict yarl propcache "
    "aiohappyeyeballs aiosignal frozenlist"
)


def rank(wrapped: bool) -> None:
    """Losses of some steps, over all ranks, and what the wrapper says."""
    import mindspore as ms
    import numpy as np
    from mindnlp.transformers import GPT2Config, GPT2LMHeadModel

    import bmtrain_ms as bms

    world = bms.init_distributed(seed=0)
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(VOCAB, n_positions=LENGTH, n_embd=32, n_layer=3, n_head=4, **options))
    if wrapped:
        bms.BMTrainModelWrapper(model, verbose=False)
    model.set_train(True)
    manager = bms.optim.OptimManager()
    manager.add_optimizer(bms.optim.AdamOptimizer(model.trainable_params(), lr=1e-2))
    losses, share = [], BATCH // world.engine.size
    ids = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))
    mine = ms.Tensor(ids[world.engine.rank * share :][:share].astype(np.int64))
    for _ in range(STEPS):
        manager.zero_grad()
        losses.append(float(bms.sum_loss(manager.backward(lambda x: model(x, labels=x).loss, mine)).asnumpy()))
        manager.step()
    if world.engine.rank == 0:
        report({"losses": losses, "said": str(model.wrap_report) if wrapped else ""})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--packages", required=True, help="folder that mindnlp was installed into")
    options = parser.parse_args()
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), options.packages]))
    module, cases = (
        "tests.benchmarks.mindnlp_gpt2",
        {"unwrapped": (1, "0"), "wrapped, 1 rank": (1, "1"), "wrapped, 2 ranks": (2, "1")},
    )
    results = {name: launch(module, ranks, wrapped, PYTHONPATH=path)[0] for name, (ranks, wrapped) in cases.items()}
    expected = results["unwrapped"]["losses"]
    apart = max(abs(a / b - 1) for result in results.values() for a, b in zip(result["losses"], expected))
    write_page(
        "mindnlp",
        "mindnlp's GPT-2 under BMTrainModelWrapper",
        "A model that was not written for us trains as it does unwrapped.",
        f"**Result**: the losses of {STEPS} steps of Adam differ by at most {apart:.1e}, relatively.",
        f"{environment()} mindnlp 0.3.1. `python -m {module} --packages FOLDER`",
        table(
            ["", *(f"step {i + 1}" for i in range(STEPS))], [[n, *(f"{x:.6f}" for x in r["losses"])] for n, r in results.items()]
        ),
        f"```\n{results['wrapped, 2 ranks']['said']}\n```",
        "mindnlp's requirements cannot be met beside MindSpore's and ours (pytest 7.2; pandas, pyarrow and datasets of NumPy 1), "
        "so it is not among the tests. It was installed without its requirements, into a folder of its own:",
        f"```bash\n{INSTALL}\n```",
        "From 0.4 on mindnlp's models are not Cells any more, and are refused.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(sys.argv[2] == "1")
    else:
        main()
