"""How long a decode step takes on this GPU, and where the time goes: no worker, no history, no prefill."""
