"""A stock causal LM that denoises blocks: the forward over [x_t ; x_0], the mask token, and batches of rows.

The base architecture is never changed. Only the attention mask, the mask token and the training differ
(docs/design.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from hildanext.config import Convention, LoraConfig
from hildanext.data.tokenizer import token_ids
from hildanext.diffusion.edits import EditTokens
from hildanext.errors import ModelError
from hildanext.model.backbone import body, n_embeddings, weight_matrix
from hildanext.model.policy import compute_dtype
from hildanext.model.training_attention import Kind, visible_keys

MASK_TOKEN, DELETE_TOKEN, INSERT_TOKEN = "<|mask|>", "<|delete|>", "<|insert|>"


class Injected(NamedTuple):
    """The adapter that is being trained in a model."""

    config: LoraConfig
    targets: list[str]  # names of the adapted linear layers, as peft matches them


class Batch(NamedTuple):
    """Clean rows x_0 of a micro-batch. All tensors are [B, L], on the model's device."""

    samples: list[int]  # global sample indices, which seed the noise
    input_ids: Tensor  # int64
    doc_ids: Tensor  # int64, -1 for padding
    position_ids: Tensor  # int64, from 0 in each document
    allowed: Tensor  # bool: may be noised and supervised


class DiffusionLM(nn.Module):
    """A causal LM with its tokenizer, mask token, block size and prediction convention.

    convention "in_place": the logits at position i predict token i. "shifted": the logits at i-1 predict token i.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask_token_id: int,
        block_size: int | None,
        convention: Convention,
        record: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.block_size = block_size  # of decoding; None before a conversion
        self.convention = convention
        self.record = record  # the `hilda` section of config.json
        self.modes: dict[str, Any] = {}  # the `hilda` section of generation_config.json, written by `calibrate`
        ids = token_ids(tokenizer)
        self.vocab_size = ids[-1] + 1  # embedding rows beyond it are padding and never decoded
        self.edit_tokens = read_edit_tokens(mask_token_id, record)  # None: no insertions and deletions
        # Ids below `vocab_size` that no text has: those without a token, DELETE and INSERT. Never decoded as text.
        self.holes = sorted(set(range(self.vocab_size)) - set(ids) | set(self.edit_ids))
        self.ordinary_ids = torch.tensor(ordinary_ids(tokenizer))
        self.attention: Kind = "dense"  # the attention that `forward` uses, see `training_attention`
        self.adapter: Injected | None = None  # set in training with `lora.rank`

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def embedding(self) -> nn.Module:
        layer = self.model.get_input_embeddings()
        assert isinstance(layer, nn.Module)
        return layer

    def embedding_std(self) -> Tensor:
        """Standard deviation of the embeddings' elements, a scalar: the unit of embedding noise."""
        return weight_matrix(self.embedding).detach().std()

    @property
    def gated(self) -> bool:
        """Whether its adapter acts on denoised rows only (`model.gate`)."""
        return "gate" in self.record

    @property
    def edit_ids(self) -> tuple[int, ...]:
        """DELETE and INSERT, or nothing."""
        return () if self.edit_tokens is None else self.edit_tokens[1:]

    @property
    def name(self) -> str:
        """Name of the base, as it was given for the conversion."""
        return str(self.record["base_model"])

    def allowed(self, loss_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Tokens that may be noised and supervised, [B, L] bool. "shifted" cannot predict a document's first token."""
        return loss_mask & (position_ids > 0) if self.convention == "shifted" else loss_mask

    @property
    def head(self) -> nn.Module:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head

    def decodable_logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32, with -inf at ids that are never decoded: the mask token, holes and padding rows."""
        logits: Tensor = self.head(hidden).float()
        logits[:, [self.mask_token_id, *self.holes]] = -torch.inf
        logits[:, self.vocab_size :] = -torch.inf
        return logits

    def forward(
        self,
        batch: Batch,
        noisy_ids: Tensor,
        wanted: Tensor,
        block_size: int,
        embed_noise: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [S, H] whose logits predict x_0 at the S wanted positions, in row-major order.

        noisy_ids [B, L] int64: x_t. wanted [B, L] bool. embed_noise [B, L, H] is added to the embeddings of x_t.
        block_size >= L is full diffusion over x_t alone (LLaDA2.0 eq. 4). Otherwise the model runs on [x_t ; x_0], 2L
        long, with the same positions twice (eq. 3).
        """
        length, position_ids = noisy_ids.shape[1], batch.position_ids
        full_diffusion = block_size >= length
        ids = noisy_ids if full_diffusion else torch.cat([noisy_ids, batch.input_ids], dim=1)
        embeds = self.embedding(ids)
        if embed_noise is not None:
            embeds = embeds + nn.functional.pad(embed_noise, (0, 0, 0, ids.shape[1] - length))
        visible = visible_keys(
            self.attention, batch.doc_ids, position_ids, block_size, compute_dtype(embeds), query_groups(self.model)
        )
        dense = isinstance(visible, Tensor)
        hidden = body(
            self.model,
            inputs_embeds=embeds,
            attention_mask=visible if dense else None,
            position_ids=position_ids if full_diffusion else position_ids.repeat(1, 2),
            **({} if dense else {"visible": visible}),
        )
        row, column = wanted.nonzero(as_tuple=True)
        if self.convention == "shifted":
            column = column - 1
            if not full_diffusion:
                # A block's first token is predicted by the clean stream, whose last token closes the block before.
                opens_block = position_ids[wanted] % block_size == 0
                column = torch.where(opens_block, column + length, column)
        return hidden[row, column]


def query_groups(model: PreTrainedModel) -> int:
    """Number of query heads that share a key head."""
    config = model.config.get_text_config()
    if not hasattr(config, "num_key_value_heads"):
        return 1
    groups: int = config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)
    return groups


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens, including added ones without a named role."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Sorted ids that may replace a token as noise: those of the tokenizer, without special tokens."""
    return sorted(set(token_ids(tokenizer)) - special_ids(tokenizer))


def first_mask_row(known: Tensor, seed: int) -> Tensor:
    """The embedding [H] of a new token: the mean of the known tokens' rows [n, H] plus small noise."""
    mean, std = known.mean(0), known.std(0)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
    return mean + 0.02 * std * noise


def read_edit_tokens(mask_token_id: int, record: dict[str, Any]) -> EditTokens | None:
    """DELETE and INSERT of a checkpoint. record: the `hilda` section of its config.json."""
    ids = record.get("edits")
    return None if ids is None else EditTokens(mask_token_id, ids["delete_token_id"], ids["insert_token_id"])


@torch.no_grad()
def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> int:
    """Return the id of the tokenizer's mask token; add the special token `<|mask|>` if there is no such token.

    The new token's embedding is the mean row plus small noise, and its row of an untied head is the head's mean row.
    So are those of other tokens that have no row (Gemma 3's image token), without the noise. The embedding is resized
    only if it has too few rows. Existing special tokens are never reused.

    Raises ModelError if `<|mask|>` would get an id that another token has.
    """
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    is_new = tokenizer.mask_token_id is None
    if is_new:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    mask_id, n_ids = int(tokenizer.mask_token_id), max(tokens) + 1
    if is_new and tokens.get(mask_id, MASK_TOKEN) != MASK_TOKEN:
        raise ModelError(
            f"tokenizer '{tokenizer.name_or_path}': has {len(tokens)} tokens but ids up to {max(tokens)}, so {MASK_TOKEN} "
            f"would get the id {mask_id} of {tokens[mask_id]!r}; give it a mask_token in tokenizer_config.json"
        )
    if is_new or n_ids > n_embeddings(model):
        _give_rows(model, [mask_id] if is_new else [], n_ids, seed)
    return mask_id


@torch.no_grad()
def add_edit_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, int]:
    """Add the special tokens DELETE and INSERT as `add_mask_token` adds a mask token. Returns the entry `hilda.edits`."""
    known = max(tokenizer.get_vocab().values()) + 1
    names = [DELETE_TOKEN, INSERT_TOKEN]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    ids = [tokenizer.get_vocab()[name] for name in names]
    _give_rows(model, ids, known, seed + 1)
    return dict(zip(("delete_token_id", "insert_token_id"), ids, strict=True))


def add_adapters_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: dict[str, Any] | None, record: dict[str, Any]
) -> None:
    """Add the tokens that an adapter was trained with to its base, which may be converted itself (`known`)."""
    seed = record["adapter"]["seed"]
    if known is None:
        add_mask_token(model, tokenizer, seed)
    if "edits" in record and "edits" not in (known or {}):
        add_edit_tokens(model, tokenizer, seed)


def _give_rows(model: PreTrainedModel, new_ids: list[int], n_known: int, seed: int) -> None:
    """Give new tokens rows in the vocabulary of a model, whose ids below `n_known` have been in use."""
    embedding, head = weight_matrix(model.get_input_embeddings()), weight_matrix(model.get_output_embeddings())
    n_rows, n_needed, is_tied = len(embedding), max([n_known, *(token + 1 for token in new_ids)]), head is embedding
    mean, head_mean = embedding[:n_known].mean(0), head[:n_known].mean(0)
    rows = [first_mask_row(embedding[:n_known], seed + i) for i in range(len(new_ids))]
    if n_needed > n_rows:
        model.resize_token_embeddings(n_needed, mean_resizing=False)
        embedding, head = weight_matrix(model.get_input_embeddings()), weight_matrix(model.get_output_embeddings())
        embedding[n_rows:] = mean
        if not is_tied:
            head[n_rows:] = head_mean
    for token, row in zip(new_ids, rows, strict=True):
        embedding[token] = row
        if not is_tied:
            head[token] = head_mean


def make_batch(lm: DiffusionLM, samples: list[int], rows: dict[str, Tensor]) -> Batch:
    """Rows as `RowSource.batch` returns them, as a Batch on the model's device."""
    allowed = lm.allowed(rows["loss_mask"], rows["position_ids"])
    input_ids, doc_ids, position_ids = (rows[key].to(lm.device) for key in ("input_ids", "doc_ids", "position_ids"))
    return Batch(samples, input_ids, doc_ids, position_ids, allowed.to(lm.device))
