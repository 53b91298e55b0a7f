"""Which images to label next. Every file defines `Config` and `Acquisition`.

`Acquisition(config).pick(pool, count)` returns `count` picks, the first to be labelled first; see
`trainer.acquisition._acquisition`. Shapes: n images of a pool, D features of each.
"""
