"""The statistics of the training images that go into a bundle, see `exports.reference`."""

import numpy as np

from exports.images import ImageSpec
from exports.reference import Reference, features_of
from trainer.data import read_examples
from trainer.errors import DataError
from trainer.onnx_steps import session
from trainer.photos import load_all
from trainer.run import Data
from trainer.stages._bundle import Graphs

_IMAGES = 512  # at most: more would not move a mean and a deviation that are read by eye
_FEWEST = 16  # two halves of them are held against each other
_TOGETHER = 16


def training_reference(graphs: Graphs, data: Data, image: ImageSpec) -> Reference | None:
    """Returns what the training images look like to an encoder; None where that cannot be told.

    Args:
        graphs: as they go into the bundle.
        data: names the training images.
        image: how the encoder takes them.
    """
    try:
        examples = read_examples(data.train, images=data.images, split=data.train_split)
        present = [example for example in examples if example.image.is_file()]
        if len(present) < _FEWEST:
            raise DataError(f"{len(present)} training images are too few, {_FEWEST} are needed")
        order = np.random.default_rng(0).permutation(len(present))[:_IMAGES]
        pixels = load_all([present[at] for at in order], image)
    except DataError as error:  # they may be elsewhere by now, which is no reason not to export
        print(f"{error}: the server will not tell how far images are from the training set")
        return None
    output = graphs.decoder_spec.memory[0]
    encoder = session(graphs.encoder)
    features = [
        features_of(
            encoder.run([output], {graphs.encoder_spec.input: pixels[start:][:_TOGETHER]})[0]
        )
        for start in range(0, len(pixels), _TOGETHER)
    ]
    return Reference.fit(output, np.concatenate(features))
