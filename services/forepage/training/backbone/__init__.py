"""Training of forepage-tiny, the small DeepSeek-V4 backbone that ships with the package."""
