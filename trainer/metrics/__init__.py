"""Caption metrics, one a file: `score(references, candidates) -> Scores`.

Every file scores a corpus of n images, each with one candidate caption and one or more reference
captions, all split into words by the same rule (`_words.words`). The names of the figures that a
file gives stand in `Scores.names`; `trainer.intervals` turns `Scores` into confidence intervals.
"""
