"""Checks that need the ranks themselves, before weights are loaded: do they agree, share output_dir, communicate?"""
