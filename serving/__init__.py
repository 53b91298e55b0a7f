"""The captioning service: bytes of a photograph in, captions out; ONNX Runtime, no PyTorch.

Shapes, here and in every docstring below: B images, H and W their pixels, N image tokens, T text
tokens, V vocabulary, K beams of an image, R rows (all beams of all images), M candidates of a row,
L layers, Hh attention heads, Dh the width of a head.
"""
