"""Modelling code that exported folders carry. It imports torch and transformers only, nothing of HildaNext."""
