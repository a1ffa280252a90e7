"""BMTrain for MindSpore: ZeRO-2/3 training of large language models as a plain `pip install`.

Importing the package patches MindSpore at run time (see `bmtrain_ms.compat`); MindSpore's files are never touched.
"""

from bmtrain_ms_base.absent import absent as _absent

from . import compat

compat.install()

from . import (
    benchmark,
    checkpoint,
    comm,
    data,
    debug,
    distributed,
    files,
    global_var,
    inspect,
    loss,
    lr_scheduler,
    model_center,
    nccl,
    nn,
    ops,
    optim,
    parallel,
    store,
    train,
    utils,
    wrapper,
    zero,
)
from .checkpoint import load, save
from .comm import init_distributed, is_initialized, rank, shutdown, synchronize, world_size
from .global_var import config
from .parallel import PipelineTransformerBlockList
from .parallel import block_list as pipe_layer
from .utils import (
    gather_result,
    grouped_parameters,
    print_block,
    print_dict,
    print_rank,
    see_memory,
    sum_loss,
    wait_loader,
)
from .wrapper import BMTrainModelWrapper
from .zero import (
    Block,
    CheckpointBlock,
    DistributedModule,
    DistributedParameter,
    ParameterInitializer,
    TransformerBlockList,
    empty,
    init,
    init_parameters,
)
from .zero import block_list as block_layer  # BMTrain's names of modules that scripts refer to
from .zero import context as zero_context
from .zero import init as param_init
from .zero import module as layer
from .zero import param as parameter

__version__ = "0.1.0"

_ABSENT = {
    "hook_func": "Blocks are made of differentiable functions, not of hooks; wrap the module in Block",
    "load_nccl_pypi": "there is no NCCL to load: ranks talk over HCCL on Ascend, and over memory or MPI on CPU; delete the call",
    "optim_step": "since BMTrain 1.0 it is OptimManager: manager = bmtrain_ms.optim.OptimManager(...); manager.step()",
}


__getattr__ = _absent(__name__, _ABSENT)


__all__ = [
    "BMTrainModelWrapper",
    "Block",
    "CheckpointBlock",
    "DistributedModule",
    "DistributedParameter",
    "ParameterInitializer",
    "PipelineTransformerBlockList",
    "TransformerBlockList",
    "benchmark",
    "block_layer",
    "checkpoint",
    "comm",
    "compat",
    "config",
    "data",
    "debug",
    "distributed",
    "empty",
    "files",
    "gather_result",
    "global_var",
    "grouped_parameters",
    "init",
    "init_distributed",
    "init_parameters",
    "inspect",
    "is_initialized",
    "layer",
    "load",
    "loss",
    "lr_scheduler",
    "model_center",
    "nccl",
    "nn",
    "ops",
    "optim",
    "parallel",
    "param_init",
    "parameter",
    "pipe_layer",
    "print_block",
    "print_dict",
    "print_rank",
    "rank",
    "save",
    "see_memory",
    "shutdown",
    "store",
    "sum_loss",
    "synchronize",
    "train",
    "utils",
    "wait_loader",
    "world_size",
    "wrapper",
    "zero",
    "zero_context",
]
