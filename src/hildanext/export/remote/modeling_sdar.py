"""A block-diffusion model in SDAR's layout: the layers and the names of Qwen3, with attention in blocks."""

from transformers import Qwen3ForCausalLM, Qwen3Model

from .block_diffusion import BlockDiffusion
from .configuration_sdar import SDARConfig


class SDARModel(BlockDiffusion, Qwen3Model):
    """The body: hidden states [B, L, H]."""

    config_class = SDARConfig


class SDARForCausalLM(BlockDiffusion, Qwen3ForCausalLM):
    """The body and its head: logits [B, L, V] that predict the token at each position."""

    config_class = SDARConfig
