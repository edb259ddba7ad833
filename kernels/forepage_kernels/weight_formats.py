"""What kernels take of quantised weights; no Triton, so that a loader can ask."""

LARGEST_FP4_SCALE = 128
"""E8M0 code (a factor of 2) up to which MXFP4 is decoded exactly; the next one decodes to infinity."""
