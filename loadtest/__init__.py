"""Measurements of a running forepage over HTTP; never part of the package."""
