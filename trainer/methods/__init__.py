"""Self-supervised methods: every file defines `Config` and `Method`.

`Method(config, encoder, setting)` is an Objective on batches of views; `Method.encoder` is what is
kept of it. See `trainer.methods._method`.
"""
