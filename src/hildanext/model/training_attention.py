"""Attention for training that skips most masked scores: FlexAttention on GPUs with Triton, SDPA in pieces elsewhere.

For a [x_t ; x_0] row of 1,024 tokens in blocks of 32, the mask allows a tenth to a third of the 2,048 x 2,048 scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from hildanext.diffusion.masks import Pieces, additive, document_mask, training_mask, training_pieces
from hildanext.diffusion.noise import block_ids
from hildanext.errors import ModelError
from hildanext.model.decoding_attention import EXTRAS, grouped_attention

NAME = "hildanext_training"
Kind = Literal["dense", "pieces", "flex"]
Visible = Tensor | Pieces | BlockMask
# Pieces are faster than the dense mask if they compute at most this share of its scores (rows of 64 to 1,024 tokens).
WORTH = 0.75
# Limit of FlexAttention kernels in a process. A training has rows of a few shapes, with and without gradients.
SHAPES = 64
CHUNK = 128  # queries in a piece; the fastest size from 32 to 512 on a CPU


def visible_keys(
    kind: Kind,
    doc_ids: Tensor,
    position_ids: Tensor,
    block_size: int,
    dtype: torch.dtype,
    groups: int,
    chunk: int = CHUNK,
) -> Visible:
    """The attention mask in the form that `kind` needs: an additive tensor, pieces or a BlockMask.

    doc_ids, position_ids [B, L] int64. With block_size >= L the mask is for full diffusion over x_t alone (LLaDA2.0,
    arXiv 2512.15745, eq. 4), else for [x_t ; x_0] (eq. 3). dtype: of additive masks. groups: query heads per key head.
    chunk: queries in a piece. For short rows "pieces" returns the dense mask, which is faster there.
    """
    n_rows, length = doc_ids.shape
    blocks = block_ids(position_ids, block_size) if block_size < length else None
    if kind == "pieces":
        pieces = training_pieces(doc_ids, blocks, chunk)
        if pieces.scores <= WORTH * n_rows * (pieces.streams * length) ** 2:
            return pieces.additive(dtype, groups)
    elif kind == "flex":
        return flex_mask(doc_ids, blocks)
    return additive(document_mask(doc_ids) if blocks is None else training_mask(doc_ids, blocks), dtype)


def flex_mask(doc_ids: Tensor, blocks: Tensor | None) -> BlockMask:
    """The same mask for FlexAttention. The ids are inputs of the compiled kernel, so new rows need no new kernel.

    doc_ids [B, L] int64. blocks [B, L] int64: the block of each token, or None for full diffusion.
    """
    n_rows, length = doc_ids.shape
    indices = torch.arange(length, device=doc_ids.device)
    docs = torch.where(doc_ids < 0, -1 - indices, doc_ids)  # each padding token is a document of its own

    def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return docs[row, query] == docs[row, key]

    if blocks is None:
        return create_block_mask(same_document, n_rows, None, length, length, device=str(doc_ids.device))

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k = query % length, key % length
        noisy_query, noisy_key = query < length, key < length
        b_q, b_k = blocks[row, q], blocks[row, k]
        seen = torch.where(noisy_key, noisy_query & (b_q == b_k), torch.where(noisy_query, b_q > b_k, b_q >= b_k))
        return seen & (docs[row, q] == docs[row, k])

    return create_block_mask(rule, n_rows, None, 2 * length, 2 * length, device=str(doc_ids.device))


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    visible: Pieces | BlockMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers. query [B, Hq, W, D]; key, value [B, Hkv, W, D]. Returns [B, W, Hq, D].

    visible: passed to the model's forward by the caller; without it, this is `grouped_attention`. Raises ModelError
    for dropout, soft caps, sinks and position biases. The check at the start of a training then chooses the dense
    mask.
    """
    if visible is None:
        return grouped_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if dropout or any(kwargs.get(name) is not None for name in EXTRAS if name != "sliding_window"):
        raise ModelError("attention with dropout, soft caps, sinks or position biases needs the dense mask")
    if isinstance(visible, Pieces):
        output = in_pieces(query, key, value, visible, scaling)
    else:
        run = compiled_flex() if query.is_cuda else cast(Any, flex_attention)
        output = run(query, key, value, block_mask=visible, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled to a kernel for each shape of rows.

    Raises ModelError for more than SHAPES shapes. torch would silently run it uncompiled instead, which stores every
    score.
    """
    from torch._dynamo import config, exc  # slow to import

    config.recompile_limit = max(config.recompile_limit, SHAPES)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except exc.FailOnRecompileLimitHit:
            raise ModelError(
                f"FlexAttention has compiled kernels for {SHAPES} shapes of rows, which is the limit, and needs "
                "another; set train.attention to 'pieces', or lower data.seq_len"
            ) from None

    return run


def in_pieces(query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scaling: float | None) -> Tensor:
    """Attention piece by piece. query [B, Hq, W, D]; key, value [B, Hkv, W, D]. Returns [B, Hq, W, D].

    Query heads that share a key head are stacked, as in decoding. Queries are cut by one `split`, keys by one
    `index_select`, whose gradients are one `cat` and one `index_add`. Slices would each allocate a gradient of a whole
    row.
    """
    n_rows, n_heads, width, dim = query.shape
    n_kv = key.shape[1]
    groups, streams = n_heads // n_kv, pieces.streams
    length = width // streams
    rows = query.view(n_rows, n_heads, streams, length, dim).permute(1, 2, 0, 3, 4)
    queries = rows.reshape(n_kv, groups, streams, n_rows * length, dim).split(pieces.chunk, dim=3)
    keys, values = (
        x.transpose(0, 1).reshape(n_kv, n_rows * width, -1).index_select(1, pieces.keys).split(pieces.sizes, dim=1)
        for x in (key, value)
    )
    outputs = []
    for q, k, v, mask in zip(queries, keys, values, pieces.masks, strict=True):
        stacked = q.reshape(1, n_kv, -1, dim)
        out = F.scaled_dot_product_attention(stacked, k[None], v[None], attn_mask=mask, scale=scaling)
        outputs.append(out.view(n_kv, groups, streams, -1, v.shape[-1]))
    joined = torch.cat(outputs, dim=3).view(n_heads, streams, n_rows, length, -1)
    return joined.permute(2, 0, 1, 3, 4).reshape(n_rows, n_heads, width, -1)


def use_training_attention(model: PreTrainedModel) -> None:
    """Switch a model to `training_attention`, so that its forward takes `visible`."""
    AttentionInterface.register(NAME, cast(Any, training_attention))
    model.set_attn_implementation(NAME)
