"""Deterministic long-context tasks: RULER, LongMemEval, LongBench-v2 and MRCR style."""
