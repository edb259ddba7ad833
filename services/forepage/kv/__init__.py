"""What a sequence's KV is made of and which of it is resident: values and decisions, no torch, no I/O."""
