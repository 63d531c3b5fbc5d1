"""What the gateway demands of the servers it connects to, and what it shows them: certificates and keys."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from app.errors import ConfigurationError
from app.settings import Auth, Redis, Tls

SECRET_MAX_BYTES = 8 * 1024


class TlsContexts:
    """Builds the contexts of a configuration, one for all servers with the same certificates.

    TLS 1.2 at least, and no way to leave the certificate unverified. HTTP/1.1 is what is offered by ALPN, so that no
    proxy on the way answers in HTTP/2.
    """

    def __init__(self) -> None:
        self._built: dict[tuple[object, ...], ssl.SSLContext] = {}

    def of(self, tls: Tls) -> ssl.SSLContext:
        """The context for `tls`. Raises ConfigurationError, with the file's name."""
        key = (tls.ca_file, tls.cert_file, tls.key_file, tls.verify)
        if key not in self._built:
            self._built[key] = _context(tls)
        return self._built[key]


def _context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=_certificates(tls.ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = tls.verify == "full"
    context.set_alpn_protocols(["http/1.1"])
    if tls.cert_file is not None:
        try:
            # No password: a prompt for one would hang a server that nobody sits at.
            context.load_cert_chain(tls.cert_file, tls.key_file, password=b"")
        except OSError as error:
            raise ConfigurationError(f"{tls.key_file or tls.cert_file}: {_why(error)}") from None
    return context


def _certificates(path: Path | None) -> str | None:
    """`path`, once it is seen to hold certificates; None for the system's authorities."""
    if path is None:
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        raise ConfigurationError(f"{path}: {_why(error)}") from None
    return str(path)


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return "not a certificate or key in PEM form, or they do not belong together"
    return error.strerror or str(error)


def read_secret(file: Path | None, variable: str | None) -> str:
    """A secret from a file's first line or from an environment variable; empty where neither is named.

    Raises ConfigurationError, which never holds any of it.
    """
    if file is not None:
        try:
            with file.open("rb") as opened:
                secret = opened.read(SECRET_MAX_BYTES + 1).decode("ascii", "replace").strip()
        except OSError as error:
            raise ConfigurationError(f"{file}: {error.strerror or error}") from None
        return _checked(secret, str(file))
    if variable is not None:
        return _checked(os.environ.get(variable, ""), f"${variable}")
    return ""


def server_secret(auth: Auth) -> bytes:
    """What digests of keys and cache salts are made with; empty if there is none. Raises ConfigurationError."""
    if auth.secret is not None:
        return auth.secret.get_secret_value().encode()
    return read_secret(auth.secret_file, None).encode()


def redis_password(redis: Redis) -> str | None:
    """What is shown to the server for the url's user; None: what the url says. Raises ConfigurationError."""
    return read_secret(redis.password_file, None) or None


def _checked(secret: str, where: str) -> str:
    if not secret or len(secret) > SECRET_MAX_BYTES or not all("!" <= char <= "~" for char in secret):
        raise ConfigurationError(f"{where}: expected one line of visible ASCII characters")
    return secret


def tls_failure(error: BaseException | None) -> str | None:
    """What TLS had against a connection, in one line, or None when that is not why it failed."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"TLS: {error.verify_message}"
        if isinstance(error, ssl.SSLError):
            return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
        error = error.__cause__ or error.__context__
    return None
