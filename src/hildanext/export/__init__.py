"""Folders that other programs load: SGLang and LMDeploy (SDAR's layout), diffusers, and a card for the hub."""
