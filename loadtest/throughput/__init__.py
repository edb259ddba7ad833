"""How many sequences of a length one GPU decodes at once, and how fast, by what is kept on it."""
