"""Which worker takes a prompt: equal beginnings go to the same worker, unless it is overloaded.

Pure. Rendezvous hashing: each worker scores the prompt's beginning, the highest score wins, and a worker
that comes or goes moves only its own share.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

PREFIX_TOKENS = 256
"""Tokens of the first block: prompts that share it can share its KV."""


@dataclass(frozen=True)
class WorkerLoad:
    """What routing knows of a worker: sequences running and waiting there, and how many it runs at once."""

    worker_id: str
    load: int
    max_running: int


def rank_workers(
    prompt_ids: Sequence[int], cache_salt: str, workers: Sequence[WorkerLoad]
) -> list[WorkerLoad]:
    """All workers, best first: by hash, but the least loaded leads when the first is over its share."""
    key = _prefix_key(prompt_ids, cache_salt)
    ranked = sorted(workers, key=lambda worker: _score(worker.worker_id, key), reverse=True)
    if not ranked or ranked[0].load <= ranked[0].max_running:
        return ranked
    least = min(ranked, key=lambda worker: worker.load)
    if least.load >= ranked[0].load:
        return ranked
    return [least, *(worker for worker in ranked if worker is not least)]


def _prefix_key(prompt_ids: Sequence[int], cache_salt: str) -> bytes:
    state = hashlib.blake2b(cache_salt.encode(), digest_size=16)
    state.update(b"\0")
    for token in prompt_ids[:PREFIX_TOKENS]:
        state.update(token.to_bytes(4, "little"))
    return state.digest()


def _score(worker_id: str, key: bytes) -> bytes:
    return hashlib.blake2b(worker_id.encode(), digest_size=16, key=key).digest()
