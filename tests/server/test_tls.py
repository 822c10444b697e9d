"""HTTPS: served with a certificate, and one sentence for each that cannot be."""

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from desk import Desk, Network

from headway.config import ConfigError, DoorSettings
from headway.server.tls import tls_options

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here to make certificates with")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two.pem and two.key, one.pem and one.key, locked.key: each certificate is its own authority."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("one", "two"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
            + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{name}.key", "-out", f"{name}.pem"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:word", "-in", "one.key", "-out", "locked.key"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (folder / "text.pem").write_text("no certificate")
    return folder


def settings(made: Path, **given: str | int) -> DoorSettings:
    named = {name: str(made / value) if isinstance(value, str) else value for name, value in given.items()}
    return DoorSettings(**named)  # type: ignore[arg-type]


def test_served_with_a_certificate(made: Path) -> None:
    """Who trusts it is answered; who speaks plain HTTP to the port is not, and does no harm."""
    door = settings(made, ssl_certfile="one.pem", ssl_keyfile="one.key")
    with Network(Desk("ok"), tls_options(door)) as network:
        assert network.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(made / "one.pem"))
        with pytest.raises(httpx.HTTPError):
            httpx.get(network.url.replace("https", "http") + "/health")
        with pytest.raises(httpx.ConnectError):
            httpx.get(network.url + "/health")
        assert httpx.get(network.url + "/health", verify=trusting).json() == {"status": "live"}


def test_callers_may_have_to_show_one(made: Path) -> None:
    door = settings(made, ssl_certfile="one.pem", ssl_keyfile="one.key", ssl_ca_certs="two.pem", ssl_cert_reqs=2)
    with Network(Desk("ok"), tls_options(door)) as network:
        trusting = ssl.create_default_context(cafile=str(made / "one.pem"))
        with pytest.raises(httpx.HTTPError):
            httpx.get(network.url + "/health", verify=trusting)
        trusting.load_cert_chain(made / "two.pem", made / "two.key")
        assert httpx.get(network.url + "/health", verify=trusting).status_code == 200


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ssl_keyfile": "one.key"}, "--ssl-keyfile is of no use without --ssl-certfile"),
        ({"ssl_cert_reqs": 1}, "--ssl-cert-reqs is of no use without --ssl-certfile"),
        ({"ssl_certfile": "none.pem"}, "is no file"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "none.key"}, "--ssl-keyfile"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "two.key"}, "key values mismatch"),
        ({"ssl_certfile": "one.pem"}, "cannot be used"),
        ({"ssl_certfile": "text.pem", "ssl_keyfile": "one.key"}, "cannot be used"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "locked.key"}, "is encrypted"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "one.key", "ssl_ca_certs": "text.pem"}, "holds no PEM"),
        ({"ssl_certfile": "one.pem", "ssl_keyfile": "one.key", "ssl_cert_reqs": 2}, "needs --ssl-ca-certs"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(made: Path, given: dict[str, str | int], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        tls_options(settings(made, **given))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_plain_without_any() -> None:
    assert tls_options(DoorSettings()) == {}
