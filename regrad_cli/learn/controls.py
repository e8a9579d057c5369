"""Controls of an evaluation: gradients of noise, and proof that the base weights are what they were. Knows no tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from regrad_cli.learn.adapt import Tensors
from regrad_cli.learn.codec import Codec
from regrad_cli.learn.model import Model

DRAWN = 16  # more than the segments of an answer that usually weigh


class Noise:
    """Gaussian noise that stands in for gradients.

    `DRAWN` gradients of noise are made once; for each tensor of each gradient one of them is taken, which one and with
    which sign is left to chance.
    codec   what the noise goes through as well, so that it has no finer structure than a gradient may have; None for
            none
    """

    def __init__(self, codec: Codec | None, *, seed: int) -> None:
        self._codec = codec
        self._seed = seed
        self._drawn: Tensors = {}

    def like(self, gradients: Tensors, *, seed: int) -> Tensors:
        """Noise as strong as each gradient in every tensor.

        gradients   {name: (k, rows, cols) float32}, as a codec gives them back; of the same tensors in every call
        seed        of the choice
        returns     the same names and shapes; the norm of each (rows, cols) matrix is that of the gradient it stands
                    for, a tensor of zeros stays zeros
        """
        if not self._drawn:
            self._drawn = self._made({name: tensor.shape[1:] for name, tensor in gradients.items()})
        generator = torch.Generator().manual_seed(seed)
        matched = {}
        for name, gradient in gradients.items():
            count = len(gradient)
            chosen = torch.cat([torch.randperm(DRAWN, generator=generator) for _ in range(0, count, DRAWN)])[:count]
            signs = torch.randint(2, (count, 1, 1), generator=generator) * 2.0 - 1.0
            norms = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
            matched[name] = self._drawn[name][chosen].to(gradient.device) * (norms * signs.to(gradient.device))
        return matched

    def _made(self, shapes: Mapping[str, torch.Size]) -> Tensors:
        """{name: (DRAWN, rows, cols)}, each matrix of norm 1."""
        generator = torch.Generator().manual_seed(self._seed)
        noise = {name: torch.randn((DRAWN, *shape), generator=generator) for name, shape in shapes.items()}
        if self._codec is not None:
            noise = self._codec.decode(*self._codec.encode(noise))
        return {name: F.normalize(each.flatten(1)).view_as(each) for name, each in noise.items()}


def weights_hash(model: Model) -> str:
    """SHA-256 over the bytes of every parameter and buffer of the model, by name."""
    digest = hashlib.sha256()
    for name, tensor in model.network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
