"""Certificates for the port: checked before a model is loaded, with one sentence for whatever is wrong with them."""

import ssl
from pathlib import Path
from typing import Any

from headway.config import ConfigError, DoorSettings


def tls_options(settings: DoorSettings) -> dict[str, Any]:
    """What uvicorn is told; nothing without a certificate. Raises ConfigError."""
    files = {name: getattr(settings, name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")}
    if files["ssl_certfile"] is None:
        given = next((name for name, value in files.items() if value is not None), None)
        if given is not None or settings.ssl_cert_reqs:
            named = _flag(given or "ssl_cert_reqs")
            raise ConfigError(f"{named} is of no use without --ssl-certfile: give that too, or leave it out.")
        return {}
    for name, path in files.items():
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{_flag(name)} {path} is no file: give one that holds PEM.")
    _check(files["ssl_certfile"], files["ssl_keyfile"], files["ssl_ca_certs"])
    if settings.ssl_cert_reqs and files["ssl_ca_certs"] is None:
        raise ConfigError("--ssl-cert-reqs needs --ssl-ca-certs, by which callers' certificates are checked.")
    return files | {"ssl_cert_reqs": settings.ssl_cert_reqs}


def _check(certificate: str, key: str | None, authorities: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except _Encrypted as error:
        raise ConfigError(
            "The key of --ssl-keyfile is encrypted: give one that is not, readable by the server only."
        ) from error
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"--ssl-certfile {certificate} cannot be used ({_reason(error)}): give a PEM certificate and the key that "
            "belongs to it."
        ) from error
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"--ssl-ca-certs {authorities} holds no PEM certificates ({_reason(error)}).") from error


class _Encrypted(Exception):
    """Somebody would have to type a password, and nobody is there."""


def _no_password() -> str:
    raise _Encrypted


def _reason(error: ssl.SSLError | OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return str(reason).lower().replace("_", " ")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
