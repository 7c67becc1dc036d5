"""A finished run: load, chat, score, export."""
