"""Controls of an evaluation: gradients of noise, and proof that the base weights are what they were. Knows no tasks."""

from __future__ import annotations

import hashlib

import torch

from regrad_cli.learn.adapt import Tensors
from regrad_cli.learn.codec import Codec
from regrad_cli.learn.model import Model


def random_like(gradients: Tensors, codec: Codec | None, *, seed: int) -> Tensors:
    """Gaussian noise in the place of gradients, as strong as each of them in every tensor.

    gradients   {name: (k, rows, cols) float32}, as a codec gives them back
    codec       what the noise goes through as well, so that it has no finer structure than a gradient may have; its
                strength is matched afterwards. None for none
    returns     the same names and shapes; the norm of each (rows, cols) matrix is that of the gradient it stands for,
                a tensor of zeros stays zeros
    """
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in gradients.items()}
    if codec is not None:
        noise = codec.decode(*codec.encode(noise))
    matched = {}
    for name, gradient in gradients.items():
        drawn = noise[name].to(gradient.device)
        wanted, have = (torch.linalg.vector_norm(t, dim=(-2, -1), keepdim=True) for t in (gradient, drawn))
        matched[name] = drawn * torch.where(have > 0, wanted / have, 0.0)
    return matched


def weights_hash(model: Model) -> str:
    """SHA-256 over the bytes of every parameter and buffer of the model, by name."""
    digest = hashlib.sha256()
    for name, tensor in model.network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
