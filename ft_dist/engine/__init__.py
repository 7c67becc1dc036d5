"""DeepSpeed behind one call: micro-batches in, a finished optimizer step out."""
