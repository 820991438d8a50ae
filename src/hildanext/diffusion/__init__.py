"""The diffusion process of the papers: noise, attention masks, objective and schedule. Read `noise.py` first."""
