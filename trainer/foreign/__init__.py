"""Captioners of `transformers` in the parts of this package, one family a file.

Every file defines `CLASS`, the name of the family's class, and

- `tables(config) -> Tables`: what `trainer.captioner.Captioner` is built from;
- `special_ids(model) -> SpecialIds`;
- `generation(model)`: its `GenerationConfig`;
- `tensors(model) -> Tensors`: the weights, by the parts and names of our captioner;
- `logits(model, images, token_ids)`: what it says itself, (B, T, V), to compare with.

`_clip` is no captioner: the two towers that `python -m trainer align` begins with.
"""
