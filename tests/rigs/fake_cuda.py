"""A CUDA runtime for tests of page-locking, on a machine without a GPU."""

import threading
from contextlib import nullcontext

import pytest
import torch

WAIT_S = 10.0


class FakeRuntime:
    """Keeps account of registrations; each one waits for `go_on`, those from `refuse_from` on are refused."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.unregistered: list[int] = []
        self.registered: set[int] = set()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.refuse_from: int | None = None

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> "FakeRuntime":
        """In place of the real one, in this test."""
        fake = cls()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        return fake

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: ARG002, N802
        self.entered.set()
        self.go_on.wait(WAIT_S)
        if self.refuse_from is not None and len(self.sizes) >= self.refuse_from:
            return 2
        self.sizes.append(size)
        self.registered.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.unregistered.append(address)
        self.registered.remove(address)
        return 0
