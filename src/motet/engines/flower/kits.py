"""Kits of a Flower deployment: what the server and each site need, and nothing of anybody else.

In:  the names of the sites, and the address at which the server will be found.
Out: a folder for each side. ``server`` holds the certificate, the sites' public keys and the SuperLink's state; a
     site's folder holds the certificate of the authority and the site's key, and nothing of another site.
"""

import contextlib
import os
import re
import shutil
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from motet.config import write_toml
from motet.errors import ConfigError

CONNECTION = "motet"
KIT, LOOPBACK = "kit.toml", "127.0.0.1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What a site may be called."""
PROXY = """\
server {{
    listen {host}:{port} ssl;
    ssl_certificate {kit}/superlink.crt;
    ssl_certificate_key {kit}/superlink.key;
    client_max_body_size 64m;
    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{port};
        proxy_ssl_trusted_certificate {kit}/ca.crt;
        proxy_ssl_name localhost;
        proxy_ssl_verify on;
    }}
    location / {{ return 403; }}
}}
"""


def provision(folder: Path, sites: Sequence[str], host: str = LOOPBACK, port: int = 8000, days: int = 730) -> None:
    """Write ``folder/server`` and a ``folder/NAME`` for every site: TLS, and a key of its own for each node.

    The authority signs one certificate, the server's, and is thrown away: a site proves itself with its key, so a later
    site needs no new certificate.

    The SuperLink listens on loopback whatever ``host`` is: whoever reaches its port may register keys and submit apps,
    that is, run code at every site. What sites on other machines need is below ``/v1/fleet/``; ``proxy.conf`` in the
    server's kit is a configuration of nginx that lets only that through.

    Args:
        folder: Where the kits go; it must not hold any yet.
        sites: Names of the sites, as their site.toml says them.
        host: The name or the address under which the sites reach the server.
        port: The SuperLink's one port.
        days: How long the certificate holds.

    Raises:
        ConfigError: A name is no folder's name or comes twice, or there are kits already.
    """
    for name in sites:
        if not NAME.fullmatch(name) or name == "server" or list(sites).count(name) > 1:
            raise ConfigError(
                f"a site's name must be letters, digits, '-', '_' and '.', once each and not 'server', got {name!r}"
            )
    kits = [folder / "server", *(folder / name for name in sites)]
    for kit in kits:
        if kit.exists():
            raise ConfigError(f"{kit} is there already; kits are never written over, name another folder")
    for kit in kits:
        kit.mkdir(parents=True, mode=0o700)
    server = kits[0]
    (server / "keys").mkdir()
    authority = _certificates(server, host, days)
    write_toml(server / KIT, {"listen": LOOPBACK, "port": port})
    if host not in {LOOPBACK, "localhost"}:
        (server / "proxy.conf").write_text(PROXY.format(host=host, port=port, kit=server.resolve()), encoding="utf-8")
    (server / "flower").mkdir()
    connection = {"address": f"{LOOPBACK}:{port}", "root-certificates": str((server / "ca.crt").resolve())}
    write_toml(server / "flower" / "config.toml", {"superlink": {"default": CONNECTION, CONNECTION: connection}})
    for kit in kits[1:]:
        (kit / "ca.crt").write_bytes(authority)
        _node_key(kit)
        shutil.copy(kit / "node.pub", server / "keys" / f"{kit.name}.pub")
        write_toml(kit / KIT, {"site": kit.name, "superlink": f"{host}:{port}"})


def read_kit(kit: Path) -> dict[str, Any]:
    """What a kit says of itself.

    Raises:
        ConfigError: This is no kit.
    """
    try:
        return tomllib.loads((kit / KIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{kit} is no kit of motet's: it holds no {KIT} that can be read") from None


def _node_key(kit: Path) -> None:
    """A site's EC key, as Flower wants it: OpenSSH's format, P-384."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    _secret(kit / "node.key", key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()))
    (kit / "node.pub").write_bytes(
        key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH) + b"\n"
    )


def _certificates(server: Path, host: str, days: int) -> bytes:
    """The SuperLink's certificate and key, and the authority's certificate, which is returned too."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    def signed(
        key: Any, issuer: Any, name: str, issued_by: str, authority: bool, more: Sequence[tuple[Any, bool]]
    ) -> Any:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issued_by)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        )
        for extension, critical in more:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(issuer, hashes.SHA256())

    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    signs = x509.KeyUsage(False, False, False, False, False, True, False, False, False)
    proves = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address(LOOPBACK))]
    with contextlib.suppress(ValueError):
        names.append(x509.IPAddress(ip_address(host)))
    if len(names) == 2:
        names.append(x509.DNSName(host))
    is_server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    more = [(x509.SubjectAlternativeName(list(dict.fromkeys(names))), False), (is_server, False), (proves, True)]
    authority = signed(root, root, "motet authority", "motet authority", True, [(signs, True)])
    certificate = signed(own, root, "motet SuperLink", "motet authority", False, more)
    (server / "ca.crt").write_bytes(authority.public_bytes(form.Encoding.PEM))
    (server / "superlink.crt").write_bytes(certificate.public_bytes(form.Encoding.PEM))
    _secret(
        server / "superlink.key",
        own.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()),
    )
    return (server / "ca.crt").read_bytes()


def _secret(path: Path, content: bytes) -> None:
    """A file that only its owner reads, from its first byte on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
