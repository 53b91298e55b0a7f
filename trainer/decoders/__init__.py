"""Caption decoders. Every file defines `Config` and `Decoder` (see `_decoder.Decoder`).

Each is written once, over `trainer.attention.Attention`: the same lines run a whole sequence in
training, and one token of it in decoding and export. Its weights lie in the modules of the family's
class in `transformers`, so that checkpoints fit; what these modules compute together is written
here.
"""
