"""Configuration of a block-diffusion model with experts in SDAR's layout: Qwen3-MoE with a block size and a mask token."""

from transformers import Qwen3MoeConfig


class SDARMoeConfig(Qwen3MoeConfig):
    """Qwen3MoeConfig, and what `SDARConfig` adds to Qwen3Config."""

    model_type = "sdar_moe"

    def __init__(
        self, block_size=4, mask_token_id=151669, never_decoded=((151669, 151670),), rope_theta=1_000_000.0, **kwargs
    ):
        super().__init__(rope_theta=rope_theta, **kwargs)
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.never_decoded = [list(ids) for ids in never_decoded]
        self.rope_theta = rope_theta  # transformers 5 moves it to `rope_parameters`
