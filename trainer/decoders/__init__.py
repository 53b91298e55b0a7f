"""Caption decoders. Every file defines `Config` and `Decoder`.

`forward(token_ids (B, T), memory (B, N, D)) -> logits (B, T, V)` is the whole sequence at once, for
training. `memory_cache(memory)` and `step(...)` are the same network one token at a time, for
decoding and export, over the caches of `trainer.attention`: keys and values of the image are
computed once, those of the text as they come. `width`, `layers`, `heads`, `head_dim` and
`max_length` are its sizes.
"""
