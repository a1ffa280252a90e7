"""Models, a file for each family."""

from .causal_lm import CausalLM
from .config import DecoderConfig
from .deepseek_v2 import DeepseekV2, DeepseekV2Config
from .gpt2 import GPT2, GPT2Config
from .grok1 import Grok1, Grok1Config
from .llama import Llama, LlamaConfig
from .minicpm import MiniCPM, MiniCPMConfig
from .minicpm3 import MiniCPM3, MiniCPM3Config
from .mistral import Mistral, MistralConfig
from .mixtral import Mixtral, MixtralConfig
from .qwen2 import Qwen2, Qwen2Config
from .qwen3 import Qwen3, Qwen3Config, Qwen3Moe, Qwen3MoeConfig

FAMILIES: tuple[type[CausalLM], ...] = (
    Llama,
    Mistral,
    MiniCPM,
    MiniCPM3,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Mixtral,
    DeepseekV2,
    Grok1,
    GPT2,
)

__all__ = [
    "FAMILIES",
    "GPT2",
    "CausalLM",
    "DecoderConfig",
    "DeepseekV2",
    "DeepseekV2Config",
    "GPT2Config",
    "Grok1",
    "Grok1Config",
    "Llama",
    "LlamaConfig",
    "MiniCPM",
    "MiniCPM3",
    "MiniCPM3Config",
    "MiniCPMConfig",
    "Mistral",
    "MistralConfig",
    "Mixtral",
    "MixtralConfig",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "Qwen3Moe",
    "Qwen3MoeConfig",
]
