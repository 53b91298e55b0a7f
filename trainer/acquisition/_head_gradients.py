"""The gradient of a caption's loss by the weights of the output head, projected at random."""

from typing import Any

import torch
from torch import Tensor

from trainer.attention import Memory
from trainer.captioner import Captioner


@torch.no_grad()
def head_gradients(
    captioner: Captioner,
    memory: Memory,
    token_ids: Tensor,
    lengths: Tensor,
    width: int,
    *,
    begin: int = 1,
    seed: int = 0,
) -> Tensor:
    """Returns one gradient for each of B captions, (B, width).

    Of the mean over tokens of -log p the gradient by the head's weights is the mean of
    (p - onehot) hidden^T, V x D numbers. Coordinate w of the result is the mean of
    ((p - onehot) . r_w) (hidden . s_w) / sqrt(width), with signs r_w (V,) and s_w (D,) by chance:
    inner products, thus distances, are kept on average, the better the larger `width` is.

    Args:
        captioner: in evaluation mode.
        memory: of the B images.
        token_ids: (B, T), `<bos>` ... `<eos>` and padding.
        lengths: (B,), tokens without padding.
        width: dimensions of a gradient.
        begin: tokens at the start that were given, `<bos>` and a prompt: nothing is learnt of them.
        seed: of the signs.
    """
    decoder: Any = captioner.decoder
    given: list[Tensor] = []
    head = decoder.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        logits = decoder(token_ids[:, :-1], memory).float()  # (B, T - 1, V)
    finally:
        hook.remove()
    hidden, labels = given[-1].float(), token_ids[:, 1:]
    excess = logits.softmax(-1)
    excess.scatter_add_(2, labels.unsqueeze(2), -torch.ones_like(excess[..., :1]))
    position = torch.arange(1, token_ids.shape[1], device=token_ids.device)
    counts = (position >= begin) & (position < lengths.unsqueeze(1))  # (B, T - 1)
    draw = torch.Generator().manual_seed(seed)
    left, right = (
        _signs(size, width, draw).to(hidden.device) for size in (excess.shape[2], hidden.shape[2])
    )
    products = (excess @ left) * (hidden @ right) * counts.unsqueeze(2)
    return products.sum(1) / counts.sum(1, keepdim=True).clamp(min=1) / width**0.5


def _signs(size: int, width: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size, width), generator=draw).float() * 2 - 1
