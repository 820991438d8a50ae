"""Block diffusion on a stock causal LM of transformers: attention in blocks, and tokens that no text may contain.

A token sees all tokens of its own block and of the blocks before it (LLaDA2.0, arXiv 2512.15745, eq. 3, on clean text).
The logits at a position predict the token at that position. Blocks are counted from the start of the row.
"""

import torch


def block_mask(n_queries, n_keys, block_size, key_mask, like):
    """Additive attention mask [B, 1, Q, K], 0 or the lowest number of the dtype of `like`.

    The queries are the last Q of K positions. key_mask [B, K], or None: 0 hides a key, unless only zeros follow it. Those
    are the end of the last block, which is denoised with the rest of it.
    """
    block = torch.arange(n_keys, device=like.device) // block_size
    visible = (block[n_keys - n_queries :, None] >= block)[None, None]
    if key_mask is not None:
        has_later = key_mask.flip(-1).cummax(-1).values.flip(-1) > 0
        visible = visible & ((key_mask > 0) | ~has_later)[:, None, None]
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~visible, torch.finfo(like.dtype).min
    )


class BlockDiffusion:
    """Put before a model of transformers in the bases of a class.

    Of config.json it uses `block_size` and `never_decoded`: half-open ranges of ids (the mask token, ids without a token,
    rows that pad the vocabulary), whose logits become -inf.
    """

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        """As of the stock model. A 4-D attention mask is used as it is; from a 2-D mask or none the block mask is made."""
        embeds = kwargs.get("inputs_embeds")
        rows = input_ids if embeds is None else embeds
        n_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        n_keys = n_cached + rows.shape[1]
        if position_ids is None:
            position_ids = torch.arange(n_cached, n_keys, device=rows.device)[None]
        if attention_mask is None or attention_mask.dim() == 2:
            weight = self.get_input_embeddings().weight
            attention_mask = block_mask(rows.shape[1], n_keys, self.config.block_size, attention_mask, weight)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        if "logits" in output:
            for start, stop in self.config.never_decoded:
                output.logits[..., start:stop] = -torch.inf
        return output

    def generate(self, *args, **kwargs):
        """Refuse: the next-token loop of transformers would write nonsense."""
        raise NotImplementedError(
            "this model fills blocks of masks; decode it with SGLang, LMDeploy, diffusers' LLaDA2Pipeline or HildaNext"
        )
