"""A stock causal language model that denoises: loading, adapters, attention, number formats and devices.

Read `diffusion_lm.py` first, then `loading.py`.
"""
