"""RMS norms, as the model's parts import them."""

from forepage_kernels.row_norm import rms_norm, unit_rms

__all__ = ["rms_norm", "unit_rms"]
