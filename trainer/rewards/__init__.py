"""What a sampled caption is worth to `objectives.scst`. Every file defines `Reward`.

`Reward(sources).scores(sampled)` gives each of R captions a number, higher for better ones, in
units of its own: the weights of a recipe's `rewards` make a sum of them. Those that find fault
(`repetition`, `bad_endings`) take a weight below 0. See `trainer.rewards._reward`.
"""
