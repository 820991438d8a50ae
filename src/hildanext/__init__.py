"""HildaNext: autoregressive language models in, editable block-diffusion language models out."""

__version__ = "0.1.0"
__all__ = ["__version__"]
