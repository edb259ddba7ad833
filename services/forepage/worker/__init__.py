"""The decode worker: model, scheduler, device blocks, prefetcher, sampler. Read `loop.py` first."""
