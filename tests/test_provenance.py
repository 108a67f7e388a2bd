"""Content credentials: what is signed into a file, and that no change of it goes unnoticed."""

from __future__ import annotations

import datetime
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("c2pa")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from runtime.__main__ import main
from runtime.certificates import Signer, development_signer, find_signer
from runtime.clips import Clip, runs
from runtime.engines.store import cache_root
from runtime.provenance import Input, _manifest, check_sealable, inputs_of, read, seal, settings_hash, told
from runtime.reading import read_video
from runtime.request import Request
from runtime.video import Video

MADE = {
    "model": "demo",
    "model_hash": "f",
    "seed": 3,
    "task": "text",
    "settings_hash": "ab",
    "created": "2026-11-22T06:00:00+00:00",
}


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return development_signer(tmp_path_factory.mktemp("keys") / "credentials")


def film(path: Path, *inputs: Input, signer: Signer, seed: int = 3) -> Path:
    """Write a signed file of noise."""
    count = 1 if path.suffix == ".png" else 5
    frames = np.random.default_rng(seed).integers(0, 255, (count, 64, 64, 3), dtype=np.uint8)
    video = Video(frames, fps=8, num_frames=count, height=64, width=64)
    return video.save(path, seal=lambda file: seal(file, path.name, MADE | {"seed": seed}, inputs, signer))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, signer: Signer) -> Path:
    return film(tmp_path_factory.mktemp("signed") / "film.mp4", signer=signer)


@pytest.mark.parametrize("suffix", [".mp4", ".png", ".gif"])
def test_what_is_signed_is_read_again(tmp_path: Path, signer: Signer, suffix: str) -> None:
    path = film(tmp_path / f"film{suffix}", signer=signer)
    found = read(path)
    assert (found.state, found.trusted, found.problems, found.made) == ("valid", False, [], MADE)
    assert found.generator.startswith("dit-runtime ") and found.actions == ["c2pa.created"] and not found.ingredients
    assert read(path, signer.anchor).trusted
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "nothing is left beside it"
    assert read_video(path).num_frames == (1 if suffix == ".png" else 5)


def test_a_signed_film_still_starts_at_once_and_shows_the_same(tmp_path: Path, signer: Signer, signed: Path) -> None:
    plain = Video(read_video(signed).frames, fps=8, num_frames=5, height=64, width=64).save(tmp_path / "plain.mp4")
    content = signed.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    seal(again := plain.rename(tmp_path / "again.mp4"), "again.mp4", MADE, [], signer)
    assert again.read_bytes() != content and b"trainedAlgorithmicMedia" in content


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_noticed(tmp_path: Path, signer: Signer, signed: Path, data: st.DataObject) -> None:
    """Anywhere in what is shown: the index and the frames (C2PA leaves the first box, the brand, out)."""
    content = bytearray(signed.read_bytes())
    place = data.draw(st.integers(content.index(b"moov") - 4, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    changed = tmp_path / "changed.mp4"
    changed.write_bytes(content)
    assert read(changed, signer.anchor).state == "tampered"


def test_a_changed_claim_is_noticed(tmp_path: Path, signer: Signer, signed: Path) -> None:
    content = signed.read_bytes()
    (changed := tmp_path / "changed.mp4").write_bytes(
        content.replace(b"trainedAlgorithmicMedia", b"trainedAlgorithmicMedic")
    )
    found = read(changed, signer.anchor)
    assert found.state == "tampered" and not found.trusted


def test_what_is_written_anew_has_lost_them(tmp_path: Path, signed: Path) -> None:
    with av.open(str(signed)) as source, av.open(str(tmp_path / "copy.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert read(tmp_path / "copy.mp4").state == "missing"
    (tmp_path / "text.mp4").write_text("no film")
    assert read(tmp_path / "text.mp4").state == "unsupported"


def test_a_chain_of_inputs(tmp_path: Path, signer: Signer, signed: Path) -> None:
    """An extension of a remix of a film that shows a picture: each is found again, and a changed one is told."""
    picture = film(tmp_path / "start.png", signer=signer, seed=1)
    first = film(tmp_path / "first.mp4", Input(picture, "inputTo"), signer=signer, seed=2)
    remix = film(tmp_path / "remix.mp4", Input(first, "parentOf"), signer=signer, seed=4)
    extended = film(tmp_path / "longer.mp4", Input(remix, "parentOf"), signer=signer, seed=5)
    found = read(extended, signer.anchor)
    assert (found.state, found.trusted, found.actions) == ("valid", True, ["c2pa.opened", "c2pa.edited"])
    chain, each = [], found.to_dict()
    while each["ingredients"]:
        (each,) = each["ingredients"]
        chain.append((each["title"], each["relation"], each["state"], each["made"]["seed"]))
    assert chain == [
        ("remix.mp4", "parentOf", "valid", 4), ("first.mp4", "parentOf", "valid", 2),
        ("start.png", "inputTo", "valid", 1),
    ]  # fmt: skip
    content = bytearray(first.read_bytes())
    content[-10] ^= 1
    (broken := tmp_path / "broken.mp4").write_bytes(content)
    webm = read_video(first).save(tmp_path / "plain.webm")
    joined = read(
        film(tmp_path / "joined.mp4", Input(broken, "componentOf"), Input(webm, "componentOf"), signer=signer)
    )
    assert joined.state == "valid" and joined.actions == ["c2pa.created", "c2pa.placed"]
    assert [each["state"] for each in joined.ingredients] == ["tampered", "missing"]
    assert "broken.mp4 (tampered" in told("joined.mp4", joined) and "seed 1" in told("longer.mp4", found)


def test_nothing_is_fetched_for_a_file(tmp_path: Path, signer: Signer) -> None:
    """A file may name a manifest elsewhere: nobody goes there, neither to read it nor to take it as an input."""
    asked: list[str] = []

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        from c2pa import Builder, C2paSignerInfo, Context
        from c2pa import Signer as Sealer

        url = f"http://127.0.0.1:{server.server_port}/manifest.c2pa"
        plain = Video(np.zeros((1, 64, 64, 3), np.uint8), fps=8, num_frames=1, height=64, width=64).save(
            tmp_path / "a.png"
        )
        builder = Builder(_manifest("b.png", MADE, []), Context())
        builder.set_no_embed()
        builder.set_remote_url(url)
        with plain.open("rb") as source, (tmp_path / "b.png").open("w+b") as target:
            info = C2paSignerInfo(signer.algorithm.encode(), signer.chain, signer.key, None)
            builder.sign(Sealer.from_info(info), "image/png", source, target)
        asked.clear()
        assert url.encode() in (tmp_path / "b.png").read_bytes(), "the file does name it"
        assert read(tmp_path / "b.png").state in ("missing", "tampered")
        film(tmp_path / "c.mp4", Input(tmp_path / "b.png", "inputTo"), signer=signer)
        assert asked == []
    finally:
        server.shutdown()
        server.server_close()


def test_a_failed_signature_leaves_nothing(tmp_path: Path, signer: Signer) -> None:
    other = Signer(signer.chain, b"no key", signer.algorithm)
    with pytest.raises(ValueError, match=r"film\.mp4 cannot be signed"):
        film(tmp_path / "film.mp4", signer=other)
    assert list(tmp_path.iterdir()) == []
    for path in ("film.webm", "frames/", "frames"):
        with pytest.raises(ValueError, match="content credentials"):
            check_sealable(path)


@pytest.mark.parametrize("moment", ["before it is signed", "before the signed one takes its place", "after that"])
def test_killed_while_it_is_signed(tmp_path: Path, signer: Signer, moment: str) -> None:
    """Whenever the process dies, no file has the name: an older one of it is still there, unchanged."""
    (tmp_path / "film.mp4").write_bytes(b"older")
    development_signer(tmp_path / "keys")
    kill = {
        "before it is signed": "os.kill(os.getpid(), 9); real(file)",
        "before the signed one takes its place": "Path.replace = lambda *_: os.kill(os.getpid(), 9); real(file)",
        "after that": "real(file); os.kill(os.getpid(), 9)",
    }[moment]
    code = (
        "import os\nfrom pathlib import Path\nimport numpy as np\nfrom runtime.certificates import development_signer\n"
        "from runtime.provenance import seal\nfrom runtime.video import Video\n"
        f"os.chdir({str(tmp_path)!r})\nsigner = development_signer(Path('keys'))\n"
        f"def real(file):\n    seal(file, 'film.mp4', {MADE!r}, [], signer)\n"
        f"def dying(file):\n    {kill}\n"
        "frames = np.zeros((2, 64, 64, 3), np.uint8)\n"
        "Video(frames, fps=8, num_frames=2, height=64, width=64).save('film.mp4', seal=dying)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "film.mp4").read_bytes() == b"older"
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"film.mp4", "keys"}


def test_the_certificate_for_development(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "credentials"
    signers: list[Signer] = []
    threads = [threading.Thread(target=lambda: signers.append(development_signer(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each.key for each in signers}) == 1 and len(signers) == 4, "all take the first one's"
    assert development_signer(folder) == signers[0] and list(folder.parent.iterdir()) == [folder]
    assert (folder / "private-key.pem").stat().st_mode & 0o777 == 0o600
    assert signers[0].key.decode()[40:80] not in repr(signers[0])
    assert (folder / "authority.pem").read_bytes() == signers[0].anchor


def operator(folder: Path, key: Any, *, days: int = 10, own: bool = False) -> tuple[Path, Path]:
    """Write a certificate of another authority, and its key."""
    authority = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "O")])
        for n in ("A", "S")
    ]

    def certificate(subject: Any, issuer: Any, public: Any, signing: Any, leaf: bool) -> bytes:
        uses = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        ) | {"digital_signature": leaf, "key_cert_sign": not leaf, "crl_sign": not leaf}
        made = (
            x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=20)).not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(not leaf, None), critical=True)
            .add_extension(x509.KeyUsage(**uses), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        )  # fmt: skip
        if leaf:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        digest = None if isinstance(signing, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        return made.sign(signing, digest).public_bytes(serialization.Encoding.PEM)

    leaf = certificate(names[1], names[1 if own else 0], key.public_key(), key if own else authority, True)
    chain = leaf if own else leaf + certificate(names[0], names[0], authority.public_key(), authority, False)
    (folder / "chain.pem").write_bytes(chain)
    pem = serialization.Encoding.PEM
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "chain.pem", folder / "key.pem"


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "p384", "ed25519", "rsa"],
)  # fmt: skip
def test_an_operators_certificate(tmp_path: Path, key: Any, signer: Signer) -> None:
    certificate, private = operator(tmp_path, key)
    own = find_signer(certificate, private, tmp_path / "none")
    found = read(film(tmp_path / "film.png", signer=own), own.anchor)
    assert (found.state, found.trusted, found.signer) == ("valid", True, "S")
    assert not read(tmp_path / "film.png", signer.anchor).trusted and not (tmp_path / "none").exists()


def test_certificates_that_cannot_sign(tmp_path: Path, signer: Signer) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate, private = operator(tmp_path, key)
    (tmp_path / "other.pem").write_bytes(signer.key)
    (tmp_path / "text.pem").write_text("text")
    other, text = tmp_path / "other.pem", tmp_path / "text.pem"
    for pair, says in (
        ((certificate, other), "not the key"), ((certificate, text), "private key"), ((text, private), "certificates"),
        ((certificate, None), "both"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            find_signer(*pair, tmp_path / "none")
    odd = ec.generate_private_key(ec.SECP256K1())
    for made, says in (({"days": -1}, "valid from"), ({"own": True}, "itself"), ({"key": odd}, "cannot sign")):
        with pytest.raises(ValueError, match=says):
            find_signer(*operator(tmp_path, **({"key": key} | made)), tmp_path / "none")


def test_inputs_and_settings_of_a_request(tmp_path: Path, signed: Path, signer: Signer) -> None:
    picture = film(tmp_path / "a.png", signer=signer)

    def relations(**task: Any) -> list[tuple[str, str]]:
        request = Request(prompt="x", **task)
        return [(each.path.name, each.relation) for each in inputs_of(request)]

    clip, start = Clip(str(signed)), Clip(str(picture))
    assert relations() == []
    assert relations(clips=[start]) == [("a.png", "inputTo")]
    assert relations(clips=[clip], direction="forward") == [("film.mp4", "parentOf")]
    assert relations(clips=[clip], strength=0.5) == [("film.mp4", "parentOf")]
    assert relations(clips=[clip], periodic=True) == [("film.mp4", "parentOf")]
    assert relations(clips=[clip, clip], direction="between") == [("film.mp4", "componentOf")]
    assert relations(clips=runs(signed, {2})[0]) == [("film.mp4", "componentOf")]
    assert relations(clips=[Clip(np.zeros((1, 8, 8, 3), np.uint8))]) == []
    one, moved = ({"prompt": "x", "clips": [{"frames": path, "at": 0}]} for path in ("/a/b", "/c"))
    assert settings_hash(one) == settings_hash(moved) != settings_hash(one | {"prompt": "y"})


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = cache_root() / "credentials" / "authority.pem"
    monkeypatch.chdir(tmp_path)
    few = ["--size", "64x64", "--frames", "5", "--steps", "1", "--seed", "3", "--quiet"]
    assert main(["generate", "a ball", "-o", "plain.mp4", *few]) == 0
    assert main(["generate", "a ball", "-o", "signed.mp4", "--credentials", *few]) == 0
    assert main(["edit", "signed.mp4", "snow", "-o", "edited.mp4", "--credentials", "--steps", "2", "--quiet"]) == 0
    assert main(["generate", "x", "-o", "x.webm", "--credentials", *few]) == 2 and not Path("x.webm").exists()
    assert "webm" in capsys.readouterr().err
    assert (read_video("plain.mp4").frames == read_video("signed.mp4").frames).all()
    assert main(["verify", "plain.mp4"]) == 3
    capsys.readouterr()
    assert main(["verify", "edited.mp4", "--json", "--trust", str(authority)]) == 0
    found = json.loads(capsys.readouterr().out)
    (parent,) = found["ingredients"]
    assert found["trusted"] and (parent["title"], parent["relation"]) == ("signed.mp4", "parentOf")
    assert parent["made"]["seed"] == 3 and len(parent["made"]["settings_hash"]) == 64
    other = development_signer(tmp_path / "other")
    Path("other.pem").write_bytes(other.anchor)
    assert main(["verify", "signed.mp4", "--trust", "other.pem"]) == 5
    content = bytearray(Path("signed.mp4").read_bytes())
    content[-5] ^= 4
    Path("signed.mp4").write_bytes(content)
    assert main(["verify", "signed.mp4"]) == 4
    assert "not trusted" in capsys.readouterr().out
    assert main(["verify", "nothing.mp4"]) == 2
