"""Output layer and cross-entropy in one op, without the full logits."""
