"""Training of what the package ships: forepage-tiny's backbone, and its memory indexer."""
