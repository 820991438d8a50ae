"""Check that an architecture can run block diffusion, by running it on a short row as training and decoding do."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hildanext.diffusion.masks import additive, document_mask
from hildanext.errors import ModelError, NonFiniteLogitsError
from hildanext.model.backbone import body, length_limit, n_embeddings, weight_matrix
from hildanext.model.policy import compute_dtype

N = 16  # tokens in the row, fewer for a model with fewer positions
FAR = 4096  # positions of a model without a limit
# Kinds of layers in which a 4-D mask alone decides what a token sees.
MASKED = {"full_attention", "sliding_attention", "chunked_attention"}


@torch.no_grad()
def probe(model: PreTrainedModel) -> None:
    """Check that block diffusion can run on a model. Raises ModelError with the architecture and the reason if not,
    NonFiniteLogitsError if its logits are NaN or infinite.

    The checks: (1) only attention mixes tokens; (2) a later token changes an earlier logit under a bidirectional mask,
    but (3) not under a causal mask; (4) `position_ids` change the logits; (5) a document in a packed row has the same
    logits whatever stands beside it, as alone, and (6) when a text in the row reaches the model's last position; (7) a
    key-value cache does not change the logits; (8) the head is a single projection of the hidden states, and these
    depend on the input embeddings only.

    It runs in the current autocast: a training that computes in another format than its weights' probes both.
    """
    was_training = model.training
    model.eval()
    try:
        problem = _other_layers(model) or _problem(_Row(model))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"fails with a 4-D mask and position_ids: {reason}"
    finally:
        model.train(was_training)
    if problem is not None:
        raise ModelError(f"{type(model).__name__} {problem}")


def _other_layers(model: PreTrainedModel) -> str | None:
    """What besides attention under a mask mixes tokens, by the model's own description.

    The row is too short, and rounding too coarse, to see a state that decays quickly or a choice among many keys.
    """
    config = model.config.get_text_config().to_dict()
    others = sorted(set(config.get("layer_types") or []) - MASKED)
    if others:
        return f"has layers of the kind '{others[0]}', in which no mask decides what a token sees"
    if model._is_stateful:
        return "carries a recurrent state from token to token, which no mask interrupts between documents"
    if config.get("attn_temperature_tuning"):
        return "scales queries by their index in the row (attn_temperature_tuning), which packed documents change"
    return None


class _Row:
    """A short row of tokens, and the model that runs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        limit = length_limit(model)
        self.end = FAR if limit is None else limit.length
        self.n = min(N, self.end)
        self.cut = self.n // 2  # index of the second document in the packed row
        # Fixed ids, spread over the vocabulary: the probe must not use the global random generator.
        self.ids = (torch.arange(1, self.n + 1, device=self.device) * 7919 % n_embeddings(model))[None]
        self.positions = torch.arange(self.n, device=self.device)[None]
        self.full = torch.ones(1, self.n, self.n, dtype=torch.bool, device=self.device)
        self.docs = (self.positions >= self.cut).long()
        self.dtype = compute_dtype(weight_matrix(model.get_input_embeddings()))
        quantized = not all(parameter.is_floating_point() for parameter in model.parameters())
        self.is_coarse = quantized or self.dtype in (torch.float16, torch.bfloat16)

    def changed(self, where: slice) -> Tensor:
        """The ids with other tokens in `where`."""
        ids = self.ids.clone()
        ids[:, where] = (ids[:, where] + 1) % n_embeddings(self.model)
        return ids

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """[B, W, V] float32. mask [B, W, K] bool."""
        found: Tensor = self.model(
            input_ids=ids,
            attention_mask=additive(mask, self.dtype),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits.float()
        if not found.isfinite().all():  # every comparison with NaN is false, so each check would pass
            raise NonFiniteLogitsError(type(self.model).__name__)
        return found

    def differ(self, a: Tensor, b: Tensor, *, same_shape: bool) -> bool:
        """Whether logits [1, W, V] differ by more than rounding. same_shape: of the two forwards, which round equally then.

        In units of the logits' spread, rounding in fp32 is at most about 1e-3 and a wrong mask changes them by about 1.
        In 16 bits single tokens of a trained model change as much by rounding, but not most of them: half stay below 0.2.
        """
        gap = (a - b).abs()
        if not self.is_coarse:
            return (gap.max() / a.std().clamp_min(1e-12)).item() > (1e-3 if same_shape else 1e-2)
        by_token = gap.square().mean(-1).sqrt() / a.std(-1).clamp_min(1e-12)
        return by_token.median().item() > (0.02 if same_shape else 0.35)


def _problem(row: _Row) -> str | None:
    """The first check that fails, as the end of a sentence about the model; None if it passes them all."""
    packed = torch.cat([row.positions[:, : row.cut], row.positions[:, : row.n - row.cut]], dim=1)
    documents = document_mask(row.docs)
    masks = torch.cat([row.full, row.full.tril(), documents, row.full])
    positions = torch.cat([row.positions, row.positions, packed, row.positions])
    # Compared at the same place in two batches of one shape, because rounding depends on both.
    both_ways, causal, beside, straight = row.logits(row.ids.expand(4, -1), masks, positions).split(1)
    last, first = row.changed(slice(-1, None)), row.changed(slice(row.cut))
    changed = torch.cat([last, last, first, row.ids])
    positions = torch.cat([row.positions, row.positions, packed, row.positions.flip(1)])
    both_ways_changed, causal_changed, beside_other, backwards = row.logits(changed, masks, positions).split(1)
    if torch.equal(both_ways[:, :-1], both_ways_changed[:, :-1]):
        return "ignores a bidirectional 4-D attention mask; block diffusion cannot run on it"
    if row.differ(causal[:, :-1], causal_changed[:, :-1], same_shape=True):
        return "does not honour a causal 4-D attention mask; block diffusion cannot run on it"
    if torch.equal(straight, backwards):
        return "ignores position_ids; packed documents would get wrong positions"
    alone = row.logits(row.ids[:, row.cut :], row.full[:, row.cut :, row.cut :], packed[:, row.cut :])
    second = beside[:, row.cut :]
    leaks = row.differ(second, beside_other[:, row.cut :], same_shape=True)
    if leaks or row.differ(second, alone, same_shape=False):
        return "gives a packed document other logits than the document alone; document masks do not work on it"
    far = packed.clone()
    far[:, row.cut :] += row.end - 1 - packed[:, -1:]
    if row.differ(beside[:, : row.cut], row.logits(row.ids, documents, far)[:, : row.cut], same_shape=False):
        return (
            f"changes its rotary factors with the longest text of a batch, already below {row.end} positions; a text "
            "would get other logits beside a longer one"
        )
    return _cache_problem(row) or _head_problem(row, both_ways)


def _cache_problem(row: _Row) -> str | None:
    """Compare two blocks in one forward with the second block read after the first one was cached."""
    blocks = torch.arange(row.n, device=row.device) >= row.cut
    whole = row.logits(row.ids, (blocks[:, None] >= blocks)[None], row.positions)[:, row.cut :]
    cache = DynamicCache()
    row.logits(row.ids[:, : row.cut], row.full[:, : row.cut, : row.cut], row.positions[:, : row.cut], cache)
    second = row.logits(row.ids[:, row.cut :], row.full[:, row.cut :], row.positions[:, row.cut :], cache)
    if row.differ(whole, second, same_shape=False):
        return "gives other logits with a key-value cache than without; decoding cannot run on it"
    n_layers = row.model.config.get_text_config().num_hidden_layers
    if len(cache.layers) > n_layers:
        return f"caches {len(cache.layers)} layers but has {n_layers}; decoding cannot run on it"
    return None


def _head_problem(row: _Row, expected: Tensor) -> str | None:
    """Compare the model's logits under the full mask with its head on the hidden states of the input embeddings."""
    if row.model.base_model is row.model:
        return "does not separate its body from its head; logits cannot be computed for chosen positions only"
    # Training passes embeddings, so inputs that are looked up by id in each layer (Gemma 3n) would be missing.
    embeds = row.model.get_input_embeddings()(row.ids)
    mask = additive(row.full, row.dtype)
    hidden = body(row.model, inputs_embeds=embeds, attention_mask=mask, position_ids=row.positions)
    head = row.model.get_output_embeddings()
    if head is None or row.differ(expected, head(hidden).float(), same_shape=False):
        return (
            "computes more than one projection from hidden states to logits, or uses ids beside the input "
            "embeddings; logits cannot be computed for chosen positions only"
        )
    return None
