import pytest
from pydantic import ValidationError

from serving.settings import Settings


def test_the_environment_is_read_and_an_argument_beats_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CUTLINE_REGISTRY", str(tmp_path))
    monkeypatch.setenv("CUTLINE_PORT", "8123")
    settings = Settings(port=8124)
    assert (settings.registry, settings.port, settings.host) == (tmp_path, 8124, "127.0.0.1")


@pytest.mark.parametrize("wrong", [{"prot": 1}, {"port": 0}, {"threads": 0}, {"provider": "tpu"}])
def test_a_wrong_setting_names_itself(wrong):
    [name] = wrong
    with pytest.raises(ValidationError, match=name):
        Settings(**wrong)
