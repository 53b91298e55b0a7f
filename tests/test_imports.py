"""The two sides stay apart: the server runs where no training library is installed."""

import subprocess
import sys

import pytest

TRAINING = ("torch", "transformers", "timm", "onnx", "trainer")


@pytest.mark.parametrize("module", ["serving.app", "serving.deployment", "exports.__main__"])
def test_it_imports_without_the_training_libraries(module: str) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({TRAINING})); import {module}"
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)


def test_the_app_needs_no_ray() -> None:
    code = "import sys; sys.modules['ray'] = None; import serving.app, serving.local"
    subprocess.run([sys.executable, "-c", code], check=True)
