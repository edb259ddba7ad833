"""An authority that signs certificates into files, and a TLS door in front of a plain server."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trustme

from forepage.settings import TlsSettings


class Authority:
    """A certificate authority with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def signed(self, name: str) -> tuple[Path, Path]:
        """Certificate and key for a host name or address."""
        issued = self._ca.issue_cert(name)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key

    def settings(self, name: str, *, server_name: str | None = None) -> TlsSettings:
        """The `tls` section of a process with this name."""
        cert, key = self.signed(name)
        return TlsSettings(cert=cert, key=key, ca=self.ca, server_name=server_name)

    def trusting(self) -> ssl.SSLContext:
        """A client's context that believes this authority only."""
        return ssl.create_default_context(cafile=str(self.ca))


@contextmanager
def tls_door(authority: Authority, upstream_port: int) -> Iterator[int]:
    """The port of a server on loopback that asks for a client certificate and passes the bytes on."""
    cert, key = authority.signed("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.load_verify_locations(authority.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    ports: list[int] = []
    opened = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while part := await reader.read(1 << 16):
                writer.write(part)
                await writer.drain()
        except (OSError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", upstream_port)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(passed_on(reader, back), passed_on(there, writer))

    async def run() -> None:
        server = await asyncio.start_server(meet, "127.0.0.1", 0, ssl=context)
        ports.append(server.sockets[0].getsockname()[1])
        opened.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert opened.wait(10.0)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
