"""The contract between trainer and server: all that must mean the same on both sides.

A *bundle* is a folder with one exported captioner; its *manifest* says what every file is and pins
its sha256. A *registry* is a folder of bundles, `<model>/<version>/`, with aliases. `preprocess`
is the only resize of the project and `Tokenizer` the only reader of a `tokenizer.json`.

Shape legend, for this package and for the graphs in a bundle:
    B images, N image tokens, T text tokens, D width, H heads, V vocabulary, K beams, R rows,
    L layers, M candidates. Pixels are uint8 (height, width, 3), written (H, W, 3) where no
    heads are about.
"""
