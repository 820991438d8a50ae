"""Configuration of a block-diffusion model in SDAR's layout: Qwen3 with a block size and a mask token."""

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    """Qwen3Config, and:

    block_size: tokens of a block. mask_token_id: the token to denoise. never_decoded: half-open ranges of ids that no text
    may contain. rope_theta: transformers 5 moves it to `rope_parameters`; SGLang reads it here and else takes 10,000.
    """

    model_type = "sdar"

    def __init__(
        self, block_size=4, mask_token_id=151669, never_decoded=((151669, 151670),), rope_theta=1_000_000.0, **kwargs
    ):
        super().__init__(rope_theta=rope_theta, **kwargs)
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.never_decoded = [list(ids) for ids in never_decoded]
        self.rope_theta = rope_theta
