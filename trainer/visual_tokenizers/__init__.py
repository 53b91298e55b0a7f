"""Visual tokenizers, which turn patches into ids. Every file defines `Config` and `Tokenizer`.

`Tokenizer(config, image_size, grid, steps)` is an Objective on batches of one view; see
`trainer.visual_tokenizers._tokenizer`.
"""
