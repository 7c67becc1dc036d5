"""Models: built-in, local or from the hub; their tokenizers, families, shapes and fused layers."""
