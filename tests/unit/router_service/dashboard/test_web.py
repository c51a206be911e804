import pytest

from router_service.dashboard.web import is_own_host


@pytest.mark.parametrize(
    ("header", "host", "own"),
    [
        ("127.0.0.1:8080", "127.0.0.1", True),
        ("localhost:8080", "127.0.0.1", True),
        ("LOCALHOST", "127.0.0.1", True),
        ("[::1]:8080", "127.0.0.1", True),
        ("127.0.0.1:8080", "[::1]", True),
        ("127.9.9.9", "localhost", True),
        ("", "127.0.0.1", False),
        ("evil.example", "127.0.0.1", False),
        ("127.0.0.1.evil.example:8080", "127.0.0.1", False),
        ("localhost.evil.example", "127.0.0.1", False),
        ("user@evil.example", "127.0.0.1", False),
        ("127.0.0.1@evil.example", "127.0.0.1", False),
        ("10.0.0.5:8080", "127.0.0.1", False),
        ("[::1", "127.0.0.1", False),
        ("10.0.0.5:8080", "0.0.0.0", True),  # noqa: S104
        ("evil.example", "0.0.0.0", False),  # noqa: S104
        ("box.lan:8080", "box.lan", True),
        ("evil.example", "box.lan", False),
    ],
)
def test_only_names_that_nobody_else_can_make_lead_here(header: str, host: str, own: bool) -> None:
    assert is_own_host(header, host) is own
