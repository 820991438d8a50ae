"""Decoding: the rule of one pass, a sequence, the batch scheduler, its key-value cache, runtimes and engines.

Read `rule.py` first, then `sequence.py` and `scheduler.py`.
"""
