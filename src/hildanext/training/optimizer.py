"""The optimizers of a training."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from hildanext.config import TrainConfig
from hildanext.errors import ConfigError
from hildanext.model.quantized import quiet_bitsandbytes


def make_optimizer(model: nn.Module, train: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    """AdamW, the same with moments in 8 bits, or Adafactor, whose state is negligible; weight decay on matrices only."""
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
    """AdamW whose moments take a byte each (Dettmers et al. 2022, arXiv 2110.02861); small tensors keep theirs in fp32.

    Raises ConfigError when bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "'train.optimizer': 'adamw8bit' needs bitsandbytes; install it with: pip install 'hildanext[quant]', or use 'adafactor'"
        )
    quiet_bitsandbytes()
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=betas)
    return optimizer
