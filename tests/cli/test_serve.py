"""`specdec serve`: it refuses before a model is loaded, and takes its key from the environment."""

from __future__ import annotations

import socket

import pytest

from specdec.cli.main import main, parser
from specdec.errors import SpecdecError


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_API_KEY", "sesame")
    assert parser("serve").parse_args(["serve"]).api_key == "sesame"
    monkeypatch.setenv("SPECDEC_API_KEY", "")
    assert parser("serve").parse_args(["serve"]).api_key is None


def test_a_key_has_no_space_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP takes it from headers: a key with a line's end could never be sent."""
    assert parser("serve").parse_args(["serve", "--api-key", " sesame\r"]).api_key == "sesame"
    monkeypatch.setenv("SPECDEC_API_KEY", "sesame\r")
    assert parser("serve").parse_args(["serve"]).api_key == "sesame"


def test_a_taken_port_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "no-such-model", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_of_two_servers_on_one_port_the_second_is_told() -> None:
    """Both may be bound to it, while they load their models."""
    listening = pytest.importorskip("specdec.server.listen", reason="needs the extra serve")
    with listening.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with listening.bind("127.0.0.1", port) as second:
            assert listening.listen(first) == f"http://127.0.0.1:{port}"
            with pytest.raises(SpecdecError, match=r"cannot listen: .*in use"):
                listening.listen(second)


def test_an_address_of_ipv6_can_be_asked() -> None:
    listening = pytest.importorskip("specdec.server.listen", reason="needs the extra serve")
    try:
        listener = listening.bind("::1", 0)
    except SpecdecError:
        pytest.skip("needs IPv6")
    with listener:
        assert listening.listen(listener) == f"http://[::1]:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--queue", "-1"),
        ("--request-timeout", "0"),
        ("--port", "99999"),
        ("--slots", "0"),
        ("--api-key", " "),
    ],
)
def test_wrong_values_are_told(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    assert main(["serve", flag, value]) == 2
    assert "specdec serve:" in capsys.readouterr().err
