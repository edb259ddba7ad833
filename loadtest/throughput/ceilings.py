"""What the link between host and GPU gives, measured in the same run."""

import torch

COPY_BYTES = 1 << 30
COPIES = 5


def link_ceilings() -> dict[str, float]:
    """GB/s of large copies from page-locked memory to the GPU, the best of five."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best_ms = float("inf")
    for _ in range(COPIES):
        start.record()
        device.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        best_ms = min(best_ms, start.elapsed_time(end))
    del host, device
    torch.cuda.empty_cache()
    return {"pinned_copy_gb_per_s": COPY_BYTES / best_ms / 1e6}
