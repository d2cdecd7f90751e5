"""fastpo: fused kernels and a fast training loop for iterative preference optimization of language models."""

__version__ = "0.1.0"
