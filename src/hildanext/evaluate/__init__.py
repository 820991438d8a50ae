"""Evaluation: likelihoods, tasks, the benchmark against the AR base, calibration, and the sandbox for generated code.

Read likelihood.py first, then ways.py (who answers) and command.py (the `evaluate` command).
"""
