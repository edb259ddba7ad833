"""Soak and overload: many requests of every kind, and what is left of them in memory and blocks."""
