"""Gated activations: SwiGLU and GeGLU."""
