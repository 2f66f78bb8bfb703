"""Certificates for tests, by an authority that nobody else trusts."""

from __future__ import annotations

from pathlib import Path

import trustme

from outrider.config import Tls


def identity(
    authority: trustme.CA, folder: Path, *names: str, trusted: trustme.CA | None = None
) -> Tls:
    """Files of somebody with certificates for these names."""
    folder.mkdir(exist_ok=True)
    issued = authority.issue_cert(*names)
    tls = Tls(folder / "cert.pem", folder / "key.pem", folder / "ca.pem")
    tls.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(tls.private_key)
    (trusted or authority).cert_pem.write_to_path(tls.authority)
    return tls
