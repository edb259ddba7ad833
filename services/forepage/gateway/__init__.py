"""The HTTP edge: OpenAI-compatible endpoints over decode workers. No torch."""
