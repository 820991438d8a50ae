"""Models and faults for the tests of decoding."""

import torch

from hildanext.model.diffusion_lm import DiffusionLM
from support.models import random_llama

MASK, EOS, DELETE, INSERT = 299, 3, 298, 297


def diffusion_lm(tokenizer, convention, dtype=torch.float64, block=4, vocab_size=300, edits=False):
    # Decided enough that thresholds matter, undecided enough that blocks take several passes.
    model = random_llama(vocab_size, initializer_range=0.35, num_key_value_heads=1).to(dtype)
    record = {"base_model": "tiny", "tokens_trained": 0}
    if edits:
        record["edits"] = {"delete_token_id": DELETE, "insert_token_id": INSERT}
        with torch.no_grad():  # likely enough to be proposed now and then
            model.get_output_embeddings().weight[[DELETE, INSERT]] *= 1.7
    return DiffusionLM(model, tokenizer, mask_token_id=MASK, block_size=block, convention=convention, record=record)


class Starved:
    """A runtime that runs out of memory in chosen forwards."""

    def __init__(self, runtime, failing):
        self.runtime, self.failing, self.count, self.allocated = runtime, failing, 0, []
        self.name, self.head, self.copy, self.swap = "starved", runtime.head, runtime.copy, runtime.swap
        self.erase = runtime.erase

    def allocate(self, slots, context):
        self.allocated.append(slots)
        self.runtime.allocate(slots, context)

    def body(self, batch):
        self.count += 1
        if self.count in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return self.runtime.body(batch)
