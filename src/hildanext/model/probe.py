"""Check that an architecture honours 4-D attention masks and `position_ids`, by running it on a short row."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.diffusion.masks import additive, document_mask
from hildanext.errors import ModelError, NonFiniteLogitsError
from hildanext.model.backbone import body, n_embeddings

N = 8  # tokens in the row
CUT = 5  # index of the second document in the packed row


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in standard deviations of `a`."""
    return ((a - b).abs().max() / a.std().clamp_min(1e-12)).item()


@torch.no_grad()
def probe(model: PreTrainedModel) -> None:
    """Check that block diffusion can run on a model. Raises ModelError with the architecture and the reason if not,
    NonFiniteLogitsError if its logits are NaN or infinite.

    The checks: (1) a later token changes an earlier logit under a bidirectional mask, but (2) not under a causal mask;
    (3) `position_ids` change the logits; (4) a document in a packed row has the same logits as alone; (5) the head is
    a single projection of the hidden states, and these depend on the input embeddings only.
    """
    name = type(model).__name__
    was_training = model.training
    model.eval()
    device, dtype = model.device, model.dtype
    vocabulary = n_embeddings(model)
    # Fixed ids, spread over the vocabulary: the probe must not use the global random generator.
    ids = (torch.arange(1, N + 1, device=device) * 7919 % vocabulary)[None]
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % vocabulary
    positions = torch.arange(N, device=device)[None]
    full = torch.ones(1, N, N, dtype=torch.bool, device=device)
    # Rounding depends on shapes: about 1e-4 in a trained fp32 model. A wrong mask changes logits by about 1.
    coarse = dtype in (torch.float16, torch.bfloat16) or not all(p.is_floating_point() for p in model.parameters())
    tolerance = 0.1 if coarse else 1e-3

    def logits(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        found = model(
            input_ids=ids, attention_mask=additive(mask, dtype), position_ids=positions, use_cache=False
        ).logits.float()
        if not found.isfinite().all():  # every comparison with NaN is false, so each check below would pass
            raise NonFiniteLogitsError(name)
        return found

    try:
        both_ways, causal = logits(ids, full, positions), logits(ids, full.tril(), positions)
        if _difference(both_ways[:, :-1], logits(changed, full, positions)[:, :-1]) < 1e-6:
            raise ModelError(f"{name} ignores a bidirectional 4-D attention mask; block diffusion cannot run on it")
        if _difference(causal[:, :-1], logits(changed, full.tril(), positions)[:, :-1]) > tolerance:
            raise ModelError(f"{name} does not honour a causal 4-D attention mask; block diffusion cannot run on it")
        if _difference(both_ways, logits(ids, full, positions * 3)) < 1e-6:
            raise ModelError(f"{name} ignores position_ids; packed documents would get wrong positions")
        docs = (positions >= CUT).long()
        packed = logits(ids, document_mask(docs), torch.cat([positions[:, :CUT], positions[:, : N - CUT]], dim=1))
        alone = logits(ids[:, CUT:], full[:, CUT:, CUT:], positions[:, : N - CUT])
        if _difference(alone, packed[:, CUT:]) > tolerance:
            raise ModelError(
                f"{name} gives a packed document other logits than the document alone; document masks do not work on it"
            )
        # Training passes embeddings, so inputs that are looked up by id in each layer (Gemma 3n) would be missing.
        embeds = model.get_input_embeddings()(ids)
        hidden = body(model, inputs_embeds=embeds, attention_mask=additive(full, dtype), position_ids=positions)
        head = model.get_output_embeddings()
        if head is None or _difference(both_ways, head(hidden).float()) > tolerance:
            raise ModelError(
                f"{name} computes more than one projection from hidden states to logits, or uses ids beside the input "
                "embeddings; logits cannot be computed for chosen positions only"
            )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{name} fails with a 4-D mask and position_ids: {reason}") from error
    finally:
        model.train(was_training)
