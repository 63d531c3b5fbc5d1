"""Certificates for tests, made by a real authority of their own: good ones, and those that must be refused."""

from __future__ import annotations

import ssl
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


class Authority:
    """A certificate authority, and the servers and clients it vouches for; files go to `directory`."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self._directory = directory
        directory.mkdir(exist_ok=True)
        self.ca_file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca_file)

    def server(self, *names: str, expired: bool = False) -> ssl.SSLContext:
        """A server's context, with a certificate for `names`."""
        end = datetime.now(UTC) - timedelta(days=1) if expired else None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*names, not_before=end and end - timedelta(days=2), not_after=end).configure_cert(context)
        return context

    def strict_server(self, *names: str) -> ssl.SSLContext:
        """As `server`, for one that asks its clients for a certificate of this authority."""
        context = self.server(*names)
        context.verify_mode = ssl.CERT_REQUIRED
        self._ca.configure_trust(context)
        return context

    def old_server(self, *names: str) -> ssl.SSLContext:
        """As `server`, for one that speaks nothing newer than TLS 1.1."""
        context = self.server(*names)
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        return context

    def client(self, name: str = "gateway.internal") -> dict[str, str]:
        """The `cert_file` and `key_file` of a client's certificate."""
        issued = self._ca.issue_cert(name)
        certificate, key = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return {"cert_file": str(certificate), "key_file": str(key)}

    def trust(self, shown: dict[str, str]) -> ssl.SSLContext:
        """A client's context that trusts this authority and shows these files."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(shown["cert_file"], shown["key_file"])
        return context
