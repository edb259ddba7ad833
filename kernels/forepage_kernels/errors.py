"""The one error of this package."""


class ShapeError(ValueError):
    """A tensor's shape, dtype, device or stride is not what an op or a layout takes; names the argument."""
