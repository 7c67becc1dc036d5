"""A run's output: metrics and events as JSON lines, the console, wandb and TensorBoard."""
