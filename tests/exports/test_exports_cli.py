import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exports.__main__ import main
from exports.registry import Registry

Write = Callable[[Path], Path]


def test_publish_promote_list_rollback(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = str(write(tmp_path / "source")), str(tmp_path / "registry")

    assert main(["publish", source, "--registry", root]) == 0
    assert main(["publish", source, "--registry", root]) == 0
    assert "published tiny@2" in capsys.readouterr().out
    assert main(["promote", "tiny", "1", "--registry", root]) == 0
    assert main(["promote", "tiny", "2", "--registry", root]) == 0
    capsys.readouterr()

    assert main(["list", "--registry", root]) == 0
    assert capsys.readouterr().out == "tiny@1  previous\ntiny@2  production\n"

    assert main(["rollback", "tiny", "--registry", root]) == 0
    assert capsys.readouterr().out == "tiny@1 is production again\n"


def test_verify_takes_a_bundle_or_all_of_a_model(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = write(tmp_path / "source"), tmp_path / "registry"
    for _ in range(2):
        assert main(["publish", str(source), "--registry", str(root)]) == 0
    capsys.readouterr()

    assert main(["verify", str(source)]) == 0
    assert capsys.readouterr().out.startswith("ok  tiny@0  6 files, 0.0 MB  manifest sha256 ")
    assert main(["verify", str(root / "tiny")]) == 0
    assert [line[:10] for line in capsys.readouterr().out.splitlines()] == [
        "ok  tiny@1",
        "ok  tiny@2",
    ]

    (root / "tiny" / "2").rename(root / "tiny" / "9")
    assert main(["verify", str(root / "tiny" / "9")]) == 0
    assert main(["verify", str(root / "tiny")]) == 1
    assert "is of tiny@2, but stands under tiny@9" in capsys.readouterr().err

    (root / "tiny" / "9").rename(root / "tiny" / "2")
    (root / "tiny" / "2" / "manifest.json").unlink()
    assert main(["verify", str(root / "tiny")]) == 1
    assert "no manifest.json" in capsys.readouterr().err


def test_one_flipped_byte_is_one_line_and_exit_code_1(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "bundle")
    body = bytearray((path / "decoder.onnx").read_bytes())
    body[3] ^= 1
    (path / "decoder.onnx").write_bytes(body)

    done = subprocess.run(
        [sys.executable, "-m", "exports", "verify", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr.startswith("error: ")
    assert "decoder.onnx" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["verify", "absent"],
        ["promote", "tiny", "1", "--registry", "absent"],
        ["rollback", "tiny", "--registry", "absent"],
        ["list", "--registry", "s3://bucket"],
        ["publish", "absent", "--registry", "absent"],
    ],
)
def test_every_failure_is_an_error_line_and_leaves_nothing_behind(
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_shadow_is_set_shown_and_ended(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = str(write(tmp_path / "source")), str(tmp_path / "registry")

    def run(*arguments: str) -> str:
        code = main([*arguments, "--registry", root])
        said = capsys.readouterr()
        assert code == (1 if said.err else 0)
        return said.out or said.err

    for _ in range(2):
        run("publish", source)
    run("promote", "tiny", "1")
    assert run("shadow", "tiny") == "tiny has no shadow\n"
    thresholds = ("--share", "0.05", "--max-slowdown", "2", "--auto")
    said = run("shadow", "tiny", "2", *thresholds)
    assert run("shadow", "tiny") == said
    assert said.startswith("tiny@2 is asked 5% of the requests too; after 200 requests a server")
    assert said.endswith("promotes or refuses it: disagreement at most 0.5, slowdown at most 2\n")
    registry = Registry(root)
    plan = registry.shadow("tiny")
    assert plan is not None and plan.share == 0.05 and plan.auto
    assert registry.conclude_shadow("tiny", plan, "refused: too slow", promote=False)
    assert run("shadow", "tiny").endswith("too; refused: too slow\n")
    assert run("shadow", "tiny", "--stop") == "tiny@2 is no shadow any more\n"
    assert run("shadow", "tiny", "--stop") == "tiny has no shadow\n"
    assert run("shadow", "tiny") == "tiny has no shadow\n"
    assert run("shadow", "tiny", "9").startswith("error: no tiny@9 in ")
    assert run("shadow", "tiny", "2", "--share", "2").startswith("error: --share: Input should be")
    assert run("shadow", "other").startswith("error: no model 'other' in ")
