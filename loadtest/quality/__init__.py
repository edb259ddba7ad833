"""Accuracy, recall and KV footprint by suite, length and arm: `python -m loadtest.quality`."""
