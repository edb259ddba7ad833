"""What kernels take of quantised weights; no Triton, so that a loader can ask."""

LARGEST_FP4_SCALE = 128
LARGEST_FP8_SCALE = 134
"""E8M0 codes (factors of 2 and 128) up to which decoding is exact; the next one decodes to infinity."""
