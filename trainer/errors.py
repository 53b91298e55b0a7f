"""The trainer's errors, each with a message that says what was found and what to do.

TrainerError
├── DataError          a data set cannot be read or used: the message names the file and line
├── ConfigError        a recipe or an override is wrong: the message names the key
├── CheckpointError    a checkpoint is missing, damaged or of another run
├── DivergenceError    a loss is not a number: the message names the step and what is still good
├── CollapseError      captions are all alike: the message says whether images count
├── RewardHackingError a reward rises while captions grow worse: the message names what grew
├── ParityError        an exported graph does not behave as the model it came from
└── QuantisationError  nothing to calibrate integers on, or values that are not finite
"""


class TrainerError(Exception):
    """Base of every error that the trainer raises on purpose."""


class DataError(TrainerError):
    """A data set cannot be read or used."""


class ConfigError(TrainerError):
    """A recipe or an override is wrong."""


class CheckpointError(TrainerError):
    """A checkpoint is missing, damaged or of another run."""


class DivergenceError(TrainerError):
    """A loss is not a number."""


class CollapseError(TrainerError):
    """Captions are all alike, whatever the image."""


class RewardHackingError(TrainerError):
    """A reward is pleased by captions that nobody wants."""


class ParityError(TrainerError):
    """An exported graph does not behave as the model it came from."""


class QuantisationError(TrainerError):
    """There is nothing to calibrate integers on, or values are not finite."""
