"""A captioner that a stage was pointed to: a run or a bundle, ready to decode."""

from dataclasses import dataclass
from pathlib import Path

from exports.bundle import Bundle
from exports.images import ImageSpec
from exports.manifest import MANIFEST_FILE, Generation, Reranking
from exports.text import TextSpec, Tokenizer
from trainer.decoding import TorchSteps
from trainer.onnx_steps import OnnxSteps
from trainer.reranking import MatchModel
from trainer.retrieval import Reader
from trainer.run import Run


@dataclass(frozen=True, slots=True)
class Model:
    """A captioner ready to decode: from a run (PyTorch) or from a bundle (ONNX Runtime)."""

    name: str
    steps: MatchModel
    tokenizer: Tokenizer
    text: TextSpec
    image: ImageSpec
    generation: Generation
    reranking: Reranking | None = None
    """With a matcher, how it weighs."""
    prompt_ids: tuple[int, ...] = ()
    """What stands before every caption; not a part of it."""
    reader: Reader | None = None
    """Of a run with a matcher."""

    @classmethod
    def open(cls, path: Path) -> "Model":
        """Returns the captioner of a bundle's or run's folder.

        Raises:
            CheckpointError: neither is there; BundleError: the bundle does not verify.
        """
        if (path / MANIFEST_FILE).exists():
            bundle = Bundle.open(path)
            manifest, matcher = bundle.manifest, bundle.manifest.matcher
            steps = OnnxSteps(
                bundle.read(manifest.encoder.file),
                bundle.read(manifest.decoder.file),
                manifest.encoder,
                manifest.decoder,
                manifest.text,
                bundle.read(matcher.file) if matcher else None,
                matcher,
            )
            return cls(
                f"{manifest.name}@{manifest.version}",
                steps,
                bundle.tokenizer(),
                manifest.text,
                manifest.image,
                manifest.defaults,
                matcher.reranking if matcher else None,
                manifest.prompt_ids,
            )
        run = Run(path)
        captioner = run.captioner()
        return cls(
            path.name,
            TorchSteps(captioner),
            run.tokenizer,
            run.text,
            run.recipe.image,
            run.recipe.generation,
            captioner.matcher.reranking if captioner.matcher else None,
            run.prompt_ids,
            None if captioner.matcher is None else Reader(captioner, run.tokenizer),
        )
