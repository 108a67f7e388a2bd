"""Whose name stands on a result: an operator's certificate, or one for development that is made at first use."""

from __future__ import annotations

import datetime
import os
import re
import secrets
import shutil
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography import x509

DAYS = 3650
ISSUER = "dit-runtime development"
KEY_USES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip
FILES = ("certificate.pem", "private-key.pem", "authority.pem")
PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)


@dataclass(frozen=True)
class Signer:
    """A certificate with those that vouch for it, its own first, as PEM; its key; C2PA's name of the signature."""

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str

    @property
    def anchor(self) -> bytes:
        """The last certificate of the chain: who trusts it trusts what is signed."""
        return PEM.findall(self.chain)[-1]


def find_signer(certificate: Path | None, private_key: Path | None, folder: Path) -> Signer:
    """Return the operator's signer, or the one for development in a folder; ValueError where one of two is missing."""
    if (certificate is None) != (private_key is None):
        raise ValueError("a certificate and its private key belong together; give both or none of them")
    if certificate is None or private_key is None:
        return development_signer(folder)
    return read_signer(certificate, private_key)


def signer_files(certificate: Path | None, private_key: Path | None, folder: Path) -> tuple[Path, Path]:
    """Return where the certificate and the key lie of the signer that `find_signer` returns."""
    return certificate or folder / FILES[0], private_key or folder / FILES[1]


def check_installed() -> None:
    """ValueError where the libraries for content credentials are not installed."""
    for name in ("c2pa", "cryptography"):
        if find_spec(name) is None:
            raise ValueError(f"content credentials need {name}: pip install 'dit-runtime[provenance]'")


def check_anchors(anchors: bytes) -> None:
    """ValueError for what holds no certificate in PEM, which nobody can be trusted by."""
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(anchors)
    except ValueError as error:
        raise ValueError(
            "what is to be trusted holds no certificate in PEM; legal: such as an authority.pem"
        ) from error


def read_signer(certificate: Path, private_key: Path) -> Signer:
    """Return the signer of an operator's PEM files; ValueError where they do not fit, or cannot sign."""
    check_installed()
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    chain, key = certificate.read_bytes(), private_key.read_bytes()
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise ValueError(f"{certificate} holds no certificates in PEM, the signer's first") from error
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{private_key} holds no private key in PEM without a password") from error
    if _public(private.public_key()) != _public(leaf.public_key()):
        raise ValueError(f"{private_key} is not the key of the first certificate in {certificate}")
    now = datetime.datetime.now(datetime.UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise ValueError(f"{certificate} is valid from {leaf.not_valid_before_utc} to {leaf.not_valid_after_utc} only")
    if leaf.issuer == leaf.subject:
        raise ValueError(f"{certificate} is signed by itself; C2PA takes one that another certificate vouches for")
    return Signer(chain, key, _algorithm(private))


def development_signer(folder: Path) -> Signer:
    """Return the signer kept in a folder, made at first use; nobody trusts it but who is given `authority.pem`."""
    check_installed()
    certificate, key, _ = (folder / name for name in FILES)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        made.mkdir(mode=0o700)
        try:
            for name, content in zip(FILES, _develop(), strict=True):
                with os.fdopen(os.open(made / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
                    handle.write(content)
                    handle.flush()
                    os.fsync(handle.fileno())
            made.rename(folder)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            if not certificate.exists():  # else another process was first, and its own is as good
                raise
    return read_signer(certificate, key)


def _develop() -> tuple[bytes, bytes, bytes]:
    """Return (chain, private key, authority) as PEM; the authority's own key is forgotten at once."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _certificate(authority_key, authority_key, None)
    leaf = _certificate(key, authority_key, authority)
    pem = serialization.Encoding.PEM
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return leaf.public_bytes(pem) + authority.public_bytes(pem), plain, authority.public_bytes(pem)


def _certificate(key: Any, signing: Any, authority: x509.Certificate | None) -> x509.Certificate:
    """Return a certificate as C2PA asks for: of an authority, or of a signer that one vouches for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    own, now = authority is None, datetime.datetime.now(datetime.UTC)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ISSUER),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{ISSUER} {'authority' if own else 'certificate'}"),
        ]
    )
    uses = dict.fromkeys(KEY_USES, False)
    uses |= {"key_cert_sign": True, "crl_sign": True} if own else {"digital_signature": True}
    made = (
        x509.CertificateBuilder(name if authority is None else authority.subject, name, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(own, None), critical=True)
        .add_extension(x509.KeyUsage(**uses), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    if not own:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return made.sign(signing, hashes.SHA256())


def _algorithm(key: Any) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return curves[key.curve.name]
    raise ValueError("the private key cannot sign; legal: P-256, P-384, P-521, Ed25519, RSA of at least 2048 bits")


def _public(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
