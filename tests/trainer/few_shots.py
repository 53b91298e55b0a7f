"""A tiny captioner with gated layers and room for examples, and prompts for it."""

import torch
from tiny_captioner import GPT2, TEXT, VIT

from exports.images import ImageSpec
from trainer.captioner import Captioner

SHOTS, SHOT_TOKENS, LATENTS = 3, 6, 4
LLAMA = {**GPT2, "name": "llama", "width": 64, "heads": 4, "key_value_heads": 2}


def gated_captioner(decoder=GPT2, *, shots=SHOTS, gate=1.0) -> Captioner:
    """Returns one whose gates are open by `gate`, its weights sharp enough to tell images apart."""
    torch.manual_seed(0)
    bridge = {"name": "perceiver", "latents": LATENTS, "layers": 1, "heads": 2}
    captioner = Captioner(
        encoder=VIT,
        bridge={**bridge, "shots": shots, "shot_tokens": SHOT_TOKENS},
        decoder=decoder,
        image=ImageSpec(height=32, width=48),
        text=TEXT,
    )
    with torch.no_grad():
        for name, parameter in captioner.decoder.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            if name.endswith("_gate"):
                parameter.fill_(gate)
        captioner.bridge.latents.mul_(30)
    return captioner.eval()


def captions(rows: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Returns captions of random lengths up to `longest`, as ids `<bos>` ... `<eos>`."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (rows,), generator=draw).tolist()
    words = torch.randint(3, TEXT.vocab_size, (rows, longest), generator=draw).tolist()
    return [
        [TEXT.bos_id, *ids[: n - 2], TEXT.eos_id] for ids, n in zip(words, lengths, strict=True)
    ]


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns uint8 images (*shape, 3, 32, 48)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3, 32, 48), dtype=torch.uint8, generator=draw)
