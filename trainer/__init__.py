"""The offline trainer: photographs and a few captions in, a verified model bundle out.

Shape legend of every docstring in this package: B images, C captions an image, N image tokens,
T text tokens, D width, H heads, V vocabulary, K beams, R rows (beams of all images), L layers,
M candidates of a row.
"""

from trainer import torchvision_ops as torchvision_ops
