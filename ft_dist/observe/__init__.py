"""What a run tells: metrics and events as JSON lines, the console, wandb and TensorBoard."""
