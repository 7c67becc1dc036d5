"""Imports checkpoints of DeepSpeed and Hugging Face's Trainer."""
