"""Which model: built-in or local or from the hub; its tokenizer, its adapters, its fused layers, its export."""
