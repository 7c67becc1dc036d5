"""What a loaded model consists of, and how it computes: found out on the model itself."""
