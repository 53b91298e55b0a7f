"""What the contrastive methods share: heads, the losses, and batches larger than memory.

N images a batch, D width of an embedding; embeddings have unit length where a loss takes them.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.distributed import gathered, rank

REMEDIES = (
    "another optim.lr or method.temperature, milder rows of [augment], or a larger loop.batch_size"
)


def projection_head(*widths: int, last_norm: bool = False, affine: bool = True) -> nn.Sequential:
    """Returns an MLP with BatchNorm and ReLU between its layers.

    Chen et al., 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
    https://arxiv.org/abs/2002.05709, section 2.1, and appendix B.9 for the norm at the end.

    Args:
        widths: of the input and of every layer's output.
        last_norm: whether BatchNorm also stands at the end.
        affine: whether that one has weights.
    """
    layers: list[nn.Module] = []
    for number, (given, made) in enumerate(pairwise(widths), start=2):
        last = number == len(widths)
        norm = not last or last_norm
        layers.append(nn.Linear(given, made, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(made, affine=affine or not last))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Returns the normalised temperature-scaled cross-entropy of N positive pairs.

    Every embedding z_i has one positive z_j among the other 2N - 1:
    l_i = -log exp(z_i z_j / t) / sum_{k != i} exp(z_i z_k / t).  Chen et al., 2020, equation 1,
    https://arxiv.org/abs/2002.05709.

    Args:
        first: (N, D), unit length.
        second: (N, D), of the same images.
        temperature: t.
    """
    both = torch.cat([first, second]).float()
    places = torch.arange(len(both), device=both.device)
    logits = both @ both.T / temperature
    logits[places, places] = -torch.inf
    return F.cross_entropy(logits, places.roll(len(first)))


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Returns the cross-entropy of finding each query's own key among all workers' keys.

    van den Oord et al., 2018, https://arxiv.org/abs/1807.03748, equation 4.

    Args:
        queries: (N, D), unit length.
        keys: (N, D), of the same images.
        temperature: t.
    """
    own = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return F.cross_entropy(queries.float() @ gathered(keys).float().T / temperature, own)


def in_chunks(encode: nn.Module, images: Tensor, chunk: int) -> Tensor:
    """Returns `encode(images)`, whose activations are kept for `chunk` images at a time only.

    The gradient of a loss over the whole batch is exact: each chunk is encoded once without its
    activations, and once more when its part of the gradient has come (Gao et al., 2021, "Scaling
    Deep Contrastive Learning Batch Size under Memory Limited Setup",
    https://arxiv.org/abs/2101.06983). BatchNorm inside `encode` sees one chunk at a time, and
    counts it into its running statistics once.

    Args:
        encode: images to embeddings (B, D).
        images: (B, ...).
        chunk: 0 encodes all at once.
    """
    if not chunk or chunk >= len(images):
        return encode(images)
    return torch.cat(
        [
            checkpoint(encode, part, use_reentrant=False, context_fn=lambda: _contexts(encode))
            for part in images.split(chunk)
        ]
    )


def _contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _still_statistics(module)


@contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    norms = [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, counter in kept:
            norm.momentum, norm.num_batches_tracked = momentum, counter


class Pooled(nn.Module):
    """Images to the encoder's pooled features (B, D), which is what the heads read."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Returns pooled (B, D)."""
        pooled: Tensor = self.encoder(images)[1]
        return pooled
