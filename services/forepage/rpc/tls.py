"""Mutual TLS between our processes: what each shows its peers, and which peers it believes.

One certificate a process serves both sides: servers ask for the client's, and both must be signed by the
same authority. Files are read once, at the start; new ones are taken up by a restart.
"""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from forepage.settings import TlsSettings
from forepage.settings_environment import SettingsError


@dataclass(frozen=True)
class MutualTls:
    """PEM texts; `server_name` is what a server's certificate must name, None: its address."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes
    server_name: str | None = None

    @classmethod
    def read(cls, settings: TlsSettings) -> "MutualTls | None":
        """As configured; None: plain. Raises: SettingsError naming the file that can't be used."""
        if settings.cert is None or settings.key is None or settings.ca is None:
            return None
        check_pair(settings.cert, settings.key, names=("FOREPAGE_TLS__CERT", "FOREPAGE_TLS__KEY"))
        try:
            ssl.create_default_context(cafile=settings.ca)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"FOREPAGE_TLS__CA: {settings.ca} is no readable PEM of certificates ({error})"
            ) from error
        return cls(
            settings.cert.read_bytes(),
            settings.key.read_bytes(),
            settings.ca.read_bytes(),
            settings.server_name,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a client."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def channel_options(self) -> tuple[tuple[str, str], ...]:
        """For a client, beside its credentials."""
        return () if self.server_name is None else (("grpc.ssl_target_name_override", self.server_name),)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server, which takes no client without a certificate of the authority."""
        return grpc.ssl_server_credentials([(self.key, self.cert)], self.ca, require_client_auth=True)


def check_pair(cert: Path, key: Path, *, names: tuple[str, str]) -> None:
    """Raises: SettingsError when they can't be read, are no PEM, or don't belong together."""
    for path, name in zip((cert, key), names, strict=True):
        try:
            path.read_bytes()
        except OSError as error:
            raise SettingsError(f"{name}: cannot read {path}: {error.strerror}") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(
            f"{names[0]}: {cert} and {key} are not a PEM certificate chain and its key without a password "
            f"({error})"
        ) from error


def _no_password() -> str:
    raise ValueError("the key asks for a password")
