"""Sources become documents, documents become packed rows of tokens. No model code. Read `packing.py` first."""
