"""The optimizers that `train.optimizer` selects."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from hildanext.config import TrainConfig
from hildanext.errors import ConfigError
from hildanext.model.quantized import quiet_bitsandbytes


def make_optimizer(model: nn.Module, train: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Adafactor over the trainable parameters, with weight decay on matrices only.

    fused: use AdamW's fused kernel. Raises ConfigError if 'adamw8bit' is set and bitsandbytes is not installed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=train.lr)
    if train.optimizer == "adamw8bit":
        return adamw8bit(groups, train.lr, train.betas)
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=fused)


def adamw8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861); small tensors keep fp32 moments.

    Raises ConfigError if bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "'train.optimizer': 'adamw8bit' needs bitsandbytes; install it with: pip install 'hildanext[quant]', "
            "or use 'adafactor'"
        )
    quiet_bitsandbytes()
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=betas)
    return optimizer
