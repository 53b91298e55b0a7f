"""Bridges between an encoder and a decoder. Every file defines `Config` and `Bridge`.

`Bridge(image_tokens (B, N, D_encoder)) -> (B, N', D_decoder)`; `Config.reading()` says what becomes
of them in the decoder.
"""
