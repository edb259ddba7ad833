"""The lookahead index: predicts the blocks of the next interval, and audits what the last one missed."""
