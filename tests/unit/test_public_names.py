"""Every name that scripts written for BMTrain use is there, or says what to use instead."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from types import ModuleType

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

import bmtrain_ms as bms

# What `import bmtrain as bmt` gives, as far as it makes sense here.
FUNCTIONS = (
    "init_distributed rank world_size print_block print_dict print_rank see_memory init_parameters grouped_parameters synchronize "
    "sum_loss wait_loader gather_result save load BMTrainModelWrapper"
)
CLASSES = (
    "DistributedParameter ParameterInitializer DistributedModule Block CheckpointBlock TransformerBlockList "
    "PipelineTransformerBlockList"
)
MODULES = (
    "nccl debug loss distributed nn optim inspect lr_scheduler benchmark utils store global_var init layer parameter block_layer "
    "zero_context wrapper param_init pipe_layer"
)

# Further names that users touch, private ones among them.
DEEPER = {
    "store": "_save_to_rank0 broadcast_object allgather_objects save load",
    "nccl": "commCount commRank allReduce broadcast reduce allGather reduceScatter send recv",
    "distributed": "all_gather all_reduce broadcast reduce_scatter send_activations recv_activations",
    "global_var": "config",
    "block_layer": "Block CheckpointBlock TransformerBlockList",
    "pipe_layer": "PipelineTransformerBlockList",
    "layer": "DistributedModule",
    "parameter": "DistributedParameter",
    "param_init": "ParameterInitializer init_parameters",
    "wrapper": "BMTrainModelWrapper",
    "init": "init_distributed is_initialized normal_ xavier_normal_",
    "zero_context": "ZeroContext",
    "utils": "AverageRecorder round_up grouped_parameters print_rank",
    "optim": "OptimManager AdamOptimizer AdamOffloadOptimizer",
    "loss": "FusedCrossEntropy",
    "lr_scheduler": "Cosine Linear Noam NoDecay Exponential",
    "inspect": "inspect_model inspect_tensor record_tensor format_summary",
    "debug": "set get append extend clear",
    "benchmark": "all_gather reduce_scatter send_recv",
    "nn": "Linear",
}


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_functions(name: str):
    assert inspect.isroutine(getattr(bms, name)) and name in bms.__all__


@pytest.mark.parametrize("name", CLASSES.split())
def test_classes(name: str):
    assert inspect.isclass(getattr(bms, name)) and name in bms.__all__


@pytest.mark.parametrize("name", MODULES.split())
def test_modules(name: str):
    assert isinstance(getattr(bms, name), ModuleType) and name in bms.__all__


@pytest.mark.parametrize("module, name", [(module, name) for module, names in DEEPER.items() for name in names.split()])
def test_names_in_modules(module: str, name: str):
    assert hasattr(getattr(bms, module), name)


def test_what_is_the_same():
    assert bms.CheckpointBlock is bms.Block is bms.block_layer.Block
    assert bms.global_var.config is bms.config
    assert bms.store._save_to_rank0 is bms.store.state_dict
    assert bms.store.save is bms.save and bms.store.load is bms.load
    assert bms.nn.Linear.__mro__[1] is bms.DistributedModule and issubclass(bms.Block, nn.Cell)


ABSENT = {
    "load_nccl_pypi": "there is no NCCL to load: ranks talk over HCCL on Ascend, and over memory or MPI on CPU; delete the call",
    "hook_func": "Blocks are made of differentiable functions, not of hooks; wrap the module in Block",
    "optim_step": "since BMTrain 1.0 it is OptimManager: manager = bmtrain_ms.optim.OptimManager(...); manager.step()",
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_there_says_what_to_do(name: str):
    with pytest.raises(AttributeError) as info:
        getattr(bms, name)
    assert str(info.value) == f"module 'bmtrain_ms' has no attribute {name!r}: {ABSENT[name]}"
    assert not hasattr(bms, name) and name not in bms.__all__


DEEPER_ABSENT = {
    "nccl": {"commInitRank": "init_distributed makes the communicators", "groupStart": "delete the call: an engine takes a list"},
    "store": {
        "_save_to_infer_model": "state_dict(model) gives rank 0 whole",
        "DistributedTensorWrapper": "a DistributedParameter says",
    },
    "utils": {"check_torch_version": "there is no torch here"},
    "nn": {
        "OpLinear": "it is a Linear with a derivative of its own, which autograd has here; use Linear",
    },
    "loss": {"_function": "OptimManager looks for overflows by itself: manager.step().updated"},
}


@pytest.mark.parametrize("module, name", [(module, name) for module, names in DEEPER_ABSENT.items() for name in names])
def test_modules_say_what_to_do_instead(module: str, name: str):
    with pytest.raises(AttributeError) as info:
        getattr(getattr(bms, module), name)
    start = f"module 'bmtrain_ms.{module}' has no attribute {name!r}: {DEEPER_ABSENT[module][name]}"
    assert str(info.value).startswith(start)
    with pytest.raises(AttributeError, match=f"^module 'bmtrain_ms.{module}' has no attribute 'nonsense'$"):
        _ = getattr(bms, module).nonsense


def test_options_of_what_is_not_there_yet_are_taken_at_their_defaults(single_world):
    p = bms.DistributedParameter(bms.empty(2, 3), True, None, None, False, -1)
    assert p._original_shape == (2, 3) and p.numel() == p.size == 6 and p.gather_all().shape == (2, 3)
    p._copy_data(np.ones((2, 3), np.float32))
    assert p.asnumpy().tolist() == [1.0] * 6
    assert bms.DistributedParameter(bms.empty(2, 3), tp_mode=True).tp_parts == 1  # each tensor-parallel rank has all of it
    with pytest.raises(ValueError, match=r"^tp_split_dim=0, tp_parts=None need tp_mode=True"):
        bms.DistributedParameter(bms.empty(2, 3), tp_split_dim=0)
    with pytest.raises(ValueError, match=r"^tp_split_dim=2 is no dim of a parameter of shape \(2, 3\)"):
        bms.DistributedParameter(bms.empty(2, 3), tp_mode=True, tp_split_dim=2)
    assert bms.utils.tp_split_tensor(ms.Tensor(np.ones((2, 3))), 1).shape == (2, 3)
    with pytest.raises(ValueError, match=r"^split_dim=2 is no dim"):
        bms.utils.tp_split_tensor(ms.Tensor(np.ones((2, 3))), 2)
    assert bms.nn.Linear(2, 2, True, None).parameter("weight").asnumpy().dtype == np.float32
    layer = bms.nn.Linear(2, 2)
    bms.Block(layer, True, 3, False, "BLOCK")
    assert bms.Block(bms.nn.Linear(2, 2), mode="PIPE").zero_level == 2
    with pytest.raises(
        ValueError, match=r"^Block\(initialized=True\) is what BMTrain's lists.*: leave it out, and put the same module"
    ):
        bms.Block(bms.nn.Linear(2, 2), initialized=True)
    with pytest.raises(ValueError, match=r"^mode must be BLOCK, or PIPE in a PipelineTransformerBlockList, not 'PIPELINE'$"):
        bms.Block(bms.nn.Linear(2, 2), mode="PIPELINE")


def test_other_names_are_unknown_as_in_any_module():
    with pytest.raises(AttributeError) as info:
        _ = bms.nonsense
    assert str(info.value) == "module 'bmtrain_ms' has no attribute 'nonsense'"
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'bmtrain_ms'"):
        exec("from bmtrain_ms import nonsense")


def test_all_is_complete_sorted_and_true():
    assert bms.__all__ == sorted(set(bms.__all__))
    assert all(getattr(bms, name) is not None for name in bms.__all__)
    public = {name for name in vars(bms) if not name.startswith("_")}
    assert public == set(bms.__all__)


def test_modules_are_reached_without_importing_them():
    """BMTrain's own example uses `bmt.benchmark`, which its `__init__` does not import."""
    code = f"import bmtrain_ms as b; [getattr(b, name) for name in {MODULES.split()!r}]"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_real_modules_can_be_imported_by_their_path():
    for name in ("nccl", "debug", "loss", "distributed", "optim", "inspect", "lr_scheduler", "benchmark", "utils", "store"):
        assert importlib.import_module(f"bmtrain_ms.{name}") is getattr(bms, name)
