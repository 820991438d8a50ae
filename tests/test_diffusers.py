"""Generated ids against another implementation: diffusers' LLaDA2Pipeline, on tiny random models, greedy.

Where the two definitions differ, and what is done about it here:
- diffusers may predict the mask token: the wrapper takes it out of the logits.
- diffusers hands the model a 2-D mask: the wrapper turns it into the block-causal 4-D one that both mean.
- with `max_post_steps` p diffusers makes p + 1 correction passes: it gets p - 1 where we have p.
- diffusers reads tau_edit 0.0 as off; ours takes every change: S_MODE is compared at 1e-9.
- diffusers ends a block without correction when drafting took all `num_inference_steps`: it gets one more than drafting
  can take.
- diffusers stops in the middle of a block at end of text: compared without end of text.
Editing while masks remain is the same in both.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hildanext.decoding.runtimes.eager import EagerRuntime
from hildanext.decoding.scheduler import Scheduler
from hildanext.decoding.sequence import Sequence
from hildanext.decoding.settings import Settings
from hildanext.decoding.span import Vocabulary
from hildanext.diffusion.masks import additive, block_causal_mask
from hildanext.model.diffusion_lm import DiffusionLM

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

VOCAB, MASK, BLOCK = 48, 47, 8


class AsDiffusersExpects(torch.nn.Module):
    """A stock causal LM behind the interface of LLaDA2 models."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config

    @property
    def dtype(self):
        return self.model.dtype

    @property
    def device(self):
        return self.model.device

    def forward(self, ids, attention_mask, position_ids):
        mask = block_causal_mask(torch.zeros_like(ids), position_ids // BLOCK)
        output = self.model(ids, attention_mask=additive(mask, self.dtype), position_ids=position_ids)
        output.logits[..., MASK] = -torch.inf
        return output


@pytest.fixture(scope="module")
def lm(tiny_tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.6,  # decided enough that thresholds matter
        )
    )
    model = model.double().eval()
    record = {"base_model": "tiny", "tokens_trained": 0}
    return DiffusionLM(
        model, tiny_tokenizer, mask_token_id=MASK, block_size=BLOCK, convention="in_place", record=record
    )


def ours(lm, prompt, new, tau_mask, tau_edit, post):
    settings = Settings("Q_MODE", tau_mask, tau_edit, post, BLOCK, new, 0.0, 0)
    scheduler = Scheduler(EagerRuntime(lm.model), slots=1, context=256, prefill_chunk=16)
    sequence = Sequence(prompt, settings, Vocabulary(VOCAB, MASK, (), shifted=False), str)
    scheduler.submit(sequence)
    while not scheduler.is_idle:
        scheduler.step()
    return sequence.stream.token_ids


def theirs(lm, prompt, new, tau_mask, tau_edit, post):
    pipe = diffusers.LLaDA2Pipeline(model=AsDiffusersExpects(lm.model), scheduler=diffusers.BlockRefinementScheduler())
    pipe.set_progress_bar_config(disable=True)
    sequences, _ = pipe(
        input_ids=torch.tensor([prompt]),
        use_chat_template=False,
        gen_length=new,
        block_length=BLOCK,
        num_inference_steps=2 * BLOCK,
        temperature=0.0,
        sampling_method="greedy",
        threshold=tau_mask,
        editing_threshold=tau_edit,
        max_post_steps=post - 1,
        eos_early_stop=False,
        mask_token_id=MASK,
        output_type="seq",
        return_dict=False,
    )
    return sequences[0].tolist()


@pytest.mark.parametrize(
    ("tau_mask", "tau_edit", "post"),
    [(0.5, 1e-9, 16), (0.7, 0.5, 16), (0.7, None, 16), (0.5, 1e-9, 3)],
    ids=["S_MODE", "Q_MODE", "editing off", "S_MODE capped"],
)
def test_the_same_tokens_as_diffusers(lm, tau_mask, tau_edit, post):
    generator = torch.Generator().manual_seed(1)
    edits_matter = 0
    for length in (*range(1, 18), *range(18, 51, 5)):  # on and off block borders
        prompt = torch.randint(1, VOCAB - 1, (length,), generator=generator).tolist()
        got = ours(lm, prompt, 2 * BLOCK, tau_mask, tau_edit, post)
        assert got == theirs(lm, prompt, 2 * BLOCK, tau_mask, tau_edit, post), f"prompt of {length} tokens"
        edits_matter += tau_edit is not None and got != ours(lm, prompt, 2 * BLOCK, tau_mask, None, post)
    if tau_edit is not None:
        assert edits_matter > 10  # else this would compare nothing
