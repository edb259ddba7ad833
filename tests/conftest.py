"""Without a GPU Triton interprets the kernels: said here, before any test of any folder imports one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
