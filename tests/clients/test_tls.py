"""TLS, mutual TLS and the API key, with certificates made for the test."""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from nanoserve_client import Tls, Unavailable


@dataclass(frozen=True)
class Party:
    """A key and the certificate for it."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def certify(name: str, issuer: Party | None = None) -> Party:
    """A certificate for 127.0.0.1, signed by `issuer`, or by itself as an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(issuer.key if issuer else key, hashes.SHA256())
    )
    return Party(key, certificate)


@dataclass(frozen=True)
class Certificates:
    """An authority, the server's credentials, and the files that a client takes."""

    authority: Party
    server: Party
    root: Path
    client_certificate: Path
    client_key: Path

    def server_credentials(self, asks_client: bool) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.server.key_pem, self.server.certificate_pem)],
            root_certificates=self.authority.certificate_pem if asks_client else None,
            require_client_auth=asks_client,
        )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    authority = certify("authority")
    client = certify("client", authority)
    files = {
        "root.pem": authority.certificate_pem,
        "client.pem": client.certificate_pem,
        "client.key": client.key_pem,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Certificates(authority, certify("server", authority), *(folder / name for name in files))


async def test_tls_with_the_authority_of_the_server(face, serve, certificates):
    server = serve(certificates.server_credentials(asks_client=False))
    client = face.connect(server.target, tls=Tls(certificates.root), api_key="sesame")
    assert (await face.call(client.generate("x").result)).text == "Hello"
    assert server.script.metadata[0]["authorization"] == "Bearer sesame"


async def test_server_of_an_unknown_authority_is_not_spoken_to(face, serve, certificates, tmp_path):
    server = serve(certificates.server_credentials(asks_client=False))
    stranger = tmp_path / "stranger.pem"
    stranger.write_bytes(certify("stranger").certificate_pem)
    for tls in (Tls(stranger), Tls(), None):
        with pytest.raises(Unavailable):
            await face.deltas(face.connect(server.target, tls=tls, api_key="sesame").generate("x", timeout=20))
    assert server.script.requests == []


async def test_mutual_tls_takes_the_certificate_of_the_client(face, serve, certificates):
    server = serve(certificates.server_credentials(asks_client=True))
    tls = Tls(certificates.root, certificates.client_certificate, certificates.client_key)
    assert (await face.call(face.connect(server.target, tls=tls).generate("x").result)).text == "Hello"


async def test_mutual_tls_refuses_a_client_without_certificate(face, serve, certificates):
    server = serve(certificates.server_credentials(asks_client=True))
    with pytest.raises(Unavailable):
        await face.deltas(face.connect(server.target, tls=Tls(certificates.root)).generate("x", timeout=20))
    assert server.script.requests == []


async def test_certificate_without_its_key_is_a_mistake(face, certificates):
    with pytest.raises(ValueError, match="go together"):
        face.connect("127.0.0.1:1", tls=Tls(client_certificate=certificates.client_certificate))


async def test_file_that_is_not_there_is_named(face, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pem"):
        face.connect("127.0.0.1:1", tls=Tls(tmp_path / "missing.pem"))
