"""A block-diffusion model with experts in SDAR's layout: the layers and the names of Qwen3-MoE, with attention in blocks."""

from transformers import Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .block_diffusion import BlockDiffusion
from .configuration_sdar_moe import SDARMoeConfig

# Files have a tensor for each expert, which transformers 5 stacks for the architectures that it knows.
register_checkpoint_conversion_mapping("sdar_moe", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)


class SDARMoeModel(BlockDiffusion, Qwen3MoeModel):
    """The body: hidden states [B, L, H]."""

    config_class = SDARMoeConfig


class SDARMoeForCausalLM(BlockDiffusion, Qwen3MoeForCausalLM):
    """The body and its head: logits [B, L, V] that predict the token at each position."""

    config_class = SDARMoeConfig
