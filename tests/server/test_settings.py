"""Settings are checked where they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_runtime import RequestError
from qwen_runtime.server.settings import ServerSettings, read_api_keys


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("host", "", "host must be an address or a host's name, got ''"),
        ("host", 1, "host must be an address"),
        ("port", 65536, r"port must be an integer in 0\.\.65535, got 65536"),
        ("port", True, "port must be an integer"),
        ("port", "80", "port must be an integer"),
        ("max_body_bytes", 0, "max_body_bytes must be an integer >= 1, got 0"),
        ("keep_alive_seconds", -1, "keep_alive_seconds must be an integer >= 0"),
        ("keep_alive_seconds", 1.5, "keep_alive_seconds must be an integer >= 0"),
        ("drain_seconds", float("nan"), "drain_seconds must be a finite number"),
        ("drain_seconds", float("inf"), "drain_seconds must be a finite number"),
        ("drain_seconds", -1, "drain_seconds must be a finite number of seconds >= 0, got -1"),
        ("drain_seconds", True, "drain_seconds must be a finite number"),
        ("protect_metrics", 1, "protect_metrics must be True or False, got 1"),
        ("page", "no", "page must be True or False"),
        ("log_format", "xml", 'log_format must be "text" or "json", got \'xml\''),
        ("served_model_name", " ", "served_model_name must be a printable name or None"),
        ("served_model_name", "a\nb", "served_model_name must be a printable name"),
        ("cors_origins", "*", r"cors_origins must be a tuple of texts, got '\*'"),
        ("cors_origins", ("example.com",), r'cors_origins must be "\*" or like https://'),
        ("cors_origins", ("https://a.org/path",), "cors_origins must be"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ServerSettings(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["sesame"], "api_keys must be a tuple of texts, got list"),
        (("good", "open sesame"), "number 2 is not"),
        (("",), "number 1 is not"),
        (("schlüssel",), "number 1 is not"),
        ((7,), "number 1 is not"),
    ],
)
def test_a_wrong_key_is_refused_by_its_place_and_not_repeated(keys: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ServerSettings(api_keys=keys)
    assert not any(str(key) in str(caught.value) for key in keys if key not in ("", 7))


def test_keys_do_not_show_in_the_settings_text() -> None:
    assert "sesame" not in repr(ServerSettings(api_keys=("sesame",)))


def test_a_key_file_holds_one_key_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst\n\n  second  \n")
    assert read_api_keys(file) == ("first", "second")


def test_a_key_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="missing is not: No such file or directory"):
        read_api_keys(tmp_path / "missing")
    file = tmp_path / "keys"
    file.write_text("# nobody\n")
    with pytest.raises(RequestError, match=r"must hold one key a line, but .*keys holds none"):
        read_api_keys(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="it is no UTF-8 text"):
        read_api_keys(file)
