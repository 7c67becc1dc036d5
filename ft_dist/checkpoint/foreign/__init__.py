"""Reads checkpoints that DeepSpeed and Hugging Face's Trainer wrote."""
