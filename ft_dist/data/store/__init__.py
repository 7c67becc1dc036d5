"""Tokenised samples on disk and in object stores."""
