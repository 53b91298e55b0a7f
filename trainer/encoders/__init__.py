"""Image encoders. Every file defines `Config` and `Encoder`.

`Encoder(images (B, 3, H, W) in 0..255) -> (image_tokens (B, N, D), pooled (B, D))`; `width` is D,
`image_size` the (H, W) it was built for, `feature_map(images)` the patches' features where they
stand, (B, D, h, w). Normalisation belongs to the encoder, so that the exported graph takes the
pixels as they are. In place of images it takes what `encoded(images)` made of them, (B, N + 1, D).
"""
