"""The training commands: the loop, a step's loss, checkpoints, merging and memory prediction.

Read `trainer.py` first for the loop, then `denoising.py` for the way from a row to its loss.
"""
