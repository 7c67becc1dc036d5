"""The cost of a save: ours against DeepSpeed's `save_checkpoint` and torch DCP's `async_save`."""
