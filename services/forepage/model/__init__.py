"""DeepSeek-V4 in plain torch: one implementation for Flash, Pro and any small config of the family."""
