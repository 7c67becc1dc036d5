"""How good a model is on held-out data: loss and perplexity, and answers compared with the references."""
