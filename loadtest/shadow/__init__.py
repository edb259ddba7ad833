"""Checks what answers said of their evidence by a second pass over their tokens, nothing absent."""
