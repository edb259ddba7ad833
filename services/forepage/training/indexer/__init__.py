"""Training of the memory indexer: dump the frozen backbone's features, fit a dual encoder, calibrate it."""
