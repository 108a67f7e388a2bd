"""The command line as a user meets it: processes, exit codes, sentences, files left behind."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from runtime.__main__ import main
from runtime.video import Video

QUICK = ["--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "7"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ.copy())


def test_generate_writes_a_video_and_a_receipt(tmp_path: Path) -> None:
    done = run(
        "generate", "a red ball", "-o", tmp_path / "ball.mp4", *QUICK, "--fps", 12, "--receipt", tmp_path / "r.json"
    )
    assert done.returncode == 0, done.stderr
    with av.open(str(tmp_path / "ball.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height, stream.frames) == ("h264", 64, 64, 5)
        assert stream.average_rate == 12
    assert "ball.mp4: 5 frames, 64x64, 12 fps, seed 7, demo on cpu in float32" in done.stdout
    assert "seconds: load" in done.stdout
    assert "denoising: step 2/2" in done.stderr
    receipt = json.loads((tmp_path / "r.json").read_text())
    assert receipt["request"]["fps"] == 12
    assert {"load", "text", "denoise", "decode", "save"} <= receipt["stages"].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ball.mp4", "r.json"]


def test_kept_latents_decode_to_the_same_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, first, second = (tmp_path / name for name in ("x.safetensors", "a.mp4", "b.mp4"))
    command = ["generate", "a red ball", *QUICK, "--fps", "12", "--quiet"]
    assert main([*command, "-o", str(first), "--latents", str(kept)]) == 0
    monkeypatch.setattr("runtime.model.load_transformers", None)  # which decoding needs nothing of
    assert main(["decode", str(kept), "-o", str(second), "--quiet"]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "x.safetensors"]
    assert main(["decode", str(kept), "-o", str(second), "--dtype", "bfloat16", "--quiet"]) == 0
    assert first.read_bytes() != second.read_bytes()
    assert main(["decode", str(kept), "-o", str(second), "--dtype", "int8"]) == 2
    assert "legal: auto, float32, bfloat16, float16" in capsys.readouterr().err
    assert main(["decode", str(first), "-o", str(second)]) == 2
    assert "does not hold latents" in capsys.readouterr().err
    assert main(["decode", str(tmp_path / "gone"), "-o", str(second)]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["decode", str(kept), "-o", str(second), "--tile", "64x64"]) == 2
    assert "halo" in capsys.readouterr().err


def test_latents_survive_a_decode_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("runtime.decoding._decode_on", fail)
    command = ["generate", "a red ball", *QUICK, "-o", str(tmp_path / "a.mp4"), "--latents", str(tmp_path / "x")]
    assert main([*command, "--quiet"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["clip.webm", "clip.gif", "frames", "still.png"])
def test_other_formats(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    frames = "1" if name.endswith("png") else "5"
    code = main(["generate", "a red ball", "-o", str(tmp_path / name), *QUICK, "--frames", frames, "--quiet"])
    assert (code, *capsys.readouterr()) == (0, "", "")
    assert (tmp_path / name).exists()
    if name == "frames":
        assert len(list((tmp_path / name).glob("*.png"))) == 5
    if name == "still.png":
        assert np.asarray(Image.open(tmp_path / name)).std() > 5


def test_same_seed_same_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        assert main(["generate", "a red ball", "-o", str(tmp_path / name), *QUICK, "--quiet"]) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "demo"]) == 0
    told = capsys.readouterr().out
    for line in ("family    wan", "7.02 M parameters, bfloat16", "width 160", "missing   nothing", "from 16x16 on"):
        assert line in told


def test_info_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = shutil.copytree(Path(__file__).parent.parent / "runtime/demo", tmp_path / "model")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert main(["info", "--model", str(folder)]) == 0
    assert "vae/diffusion_pytorch_model.safetensors" in capsys.readouterr().out.splitlines()[-1]
    assert main(["generate", "a", "--model", str(folder), "-o", str(tmp_path / "x.mp4")]) == 2
    assert "lacks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([""], "the prompt is empty"),
        (["a", "--size", "65x64"], "take 64x64 or 66x64"),
        (["a", "--frames", "6"], "take 5 or 9"),
        (["a", "--guidance", "nan"], "guidance is nan"),
        (["a", "--steps", "0"], "at least 1"),
        (["a", "--device", "cuda:9"], "NVIDIA GPU"),
        (["a", "--dtype", "int4"], "legal: auto"),
        (["a", "--model", "no/such"], "there is no model"),
        (["a", "-o", "missing/folder/x.mp4"], "missing/folder"),
        (["a", "-o", "x.avi"], ".avi"),
        (["a", "-o", "x.png"], "folder"),
        (["a", "--frames", "4000", "--window", "4001"], "take 3997 or 4001"),
        (["a", "--frames", "5001", "--window", "5001"], "4093 at most"),
        (["a", "--receipt", "missing/r.json"], "receipt"),
        (["a", "--guidance-2", "3"], "one expert"),
        (["half a \udc80 character"], "holds no text at 7"),
        (["a", "--model", ""], "name is empty"),
        (["a", "--steps", "100000000"], "up to 10000"),
        (["a", "--fps", "1e9"], "up to 1000"),
        (["a", "-o", "x.gif", "--fps", "60"], "at most 50"),
        (["a", "--image", ""], "FRAME:FILE"),
        (["a", "--image", "end:"], "FRAME:FILE"),
        (["a", "-o", "same.mp4", "--preview", "same.mp4"], "written twice"),
        (["a", "-o", "r.png", "--receipt", "./r.png"], "written twice"),
    ],
)
def test_mistakes_end_with_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "a", "--size", "big"], "legal: WIDTHxHEIGHT"),
        (["generate", "a", "--size", "1280*720"], "legal: WIDTHxHEIGHT"),
        (["generate", "a", "--frames", "2.5"], "no whole number"),
        (["generate", "a", "--fps", "fast"], "no number"),
        (["image", "a", "--frames", "5"], "unrecognized"),
        (["fill", "a.mp4", "a", "--missing", "0-99999999999"], "no range"),
        (["remote", "generate", "a", "--steps", "x"], "no whole number"),
        (["bogus"], "generate"),
        ([], "COMMAND"),
    ],
)
def test_words_that_mean_nothing(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and sentence in err and "--help" in err


def write_clip(path: Path) -> bytes:
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    Video(frames, fps=8, num_frames=9, height=64, width=64).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["extend", "a.mp4", "a", "-o", "a.mp4"],
        ["edit", "a.mp4", "a", "-o", "./a.mp4"],
        ["loop", "a.mp4", "-o", "link.mp4"],
        ["connect", "b.mp4", "a.mp4", "a", "-o", "a.mp4"],
        ["fill", "a.mp4", "a", "--missing", "3", "-o", "a.mp4"],
        ["generate", "a", "--image", "a.mp4", "--preview", "a.mp4"],
        ["edit", "b.mp4", "a", "--mask", "a.mp4", "-o", "a.mp4"],
        ["remote", "edit", "a.mp4", "a", "-o", "a.mp4"],
    ],
)
def test_nothing_that_is_read_is_replaced(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = write_clip(tmp_path / "a.mp4")
    write_clip(tmp_path / "b.mp4")
    (tmp_path / "link.mp4").hardlink_to("a.mp4")
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "is read and would be replaced" in err and err.count("\n") == 1
    assert (tmp_path / "a.mp4").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "link.mp4"]


def test_a_receipt_is_not_replaced_by_its_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a red ball", *QUICK, "--receipt", "d.json", "--quiet"]) == 0
    assert main(["finish", "d.json", "--receipt", "d.json"]) == 2
    assert "is read and would be replaced" in capsys.readouterr().err


def test_nobody_reads_what_is_printed() -> None:
    """As under `| head -1`, and on a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "runtime", "embed"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1


def test_what_is_no_text_no_certificate_no_tile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"\x82\xff")
    assert main(["calibrate", "--prompts", str(file)]) == 2
    assert "a prompt in each line" in capsys.readouterr().err
    assert main(["verify", str(file), "--trust", str(file)]) == 2
    assert "no certificate in PEM" in capsys.readouterr().err
    assert main(["plan", "--tile", "8x8"]) == 2
    assert "legal: at least 72x72" in capsys.readouterr().err


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        command = ["generate", "a red ball", "-o", str(disk / "frames"), "--frames", "17", "--steps", "1", "--quiet"]
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "error: " in told
        assert "full" in told
        assert told.count("\n") == 1
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SMALL_FILES = """
import resource, signal, sys
from runtime.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def test_latents_outlive_a_video_that_cannot_be_written(tmp_path: Path) -> None:
    """The picture files grow beyond what may be written while frames are still decoded."""
    assert main(["plan", "--model", "demo", "--gpu", "cpu"]) == 0  # calibrates this machine, which writes larger files
    kept, target = tmp_path / "x.safetensors", tmp_path / "ball.gif"
    command = ["generate", "a red ball", "-o", str(target), "--size", "64x64", "--frames", "17"]
    command += ["--steps", "1", "--latents", str(kept)]
    done = subprocess.run([sys.executable, "-c", SMALL_FILES, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert main(["decode", str(kept), "-o", str(target), "--quiet"]) == 0
    assert target.stat().st_size > 50000


def test_memory_that_the_host_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("runtime.pipeline.denoise", fail)
    assert main(["generate", "a"]) == 2
    assert "smaller --size" in capsys.readouterr().err


def test_latents_that_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import SafetensorError

    def fail(*_: object) -> None:
        raise SafetensorError('I/O error: Os { code: 28, message: "No space left on device" }')

    monkeypatch.setattr("runtime.weights.save_file", fail)
    command = ["generate", "a red ball", *QUICK, "-o", str(tmp_path / "a.mp4"), "--latents", str(tmp_path / "x")]
    assert main([*command, "--quiet"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written" in said and said.endswith(f"the video is in {tmp_path / 'a.mp4'}")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]  # what was made is not lost with them


def test_our_fault_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        int("x")  # a ValueError, but a library's

    monkeypatch.setattr("runtime.pipeline.plan_task", fail)
    assert main(["generate", "a"]) == 1
    told = capsys.readouterr().err
    assert "a fault of dit-runtime" in told
    assert "Traceback" not in told
    assert main(["generate", "a", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("runtime.pipeline.denoise", fail)
    assert main(["generate", "a"]) == 2
    assert "smaller --size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "number"), [("mp4", signal.SIGINT), ("gif", signal.SIGTERM), ("folder", signal.SIGHUP)]
)
def test_interrupting_leaves_no_half_file(tmp_path: Path, kind: str, number: signal.Signals) -> None:
    target = tmp_path / ("frames" if kind == "folder" else f"ball.{kind}")
    command = [
        sys.executable,
        "-u",
        "-m",
        "runtime",
        "generate",
        "a red ball",
        "-o",
        str(target),
        "--frames",
        "401",
        "--steps",
        "1",
    ]
    listening = partial(signal.signal, number, signal.SIG_DFL)  # a shell's background jobs start deaf to it
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ.copy(), preexec_fn=listening)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.iterdir()):  # until the writer has begun
        time.sleep(0.02)
    assert list(tmp_path.iterdir())
    child.send_signal(number)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert "no partial file is left" in told
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "runtime", "generate", "a red ball", "-o", str(tmp_path / "x.mp4"), *QUICK]
    child = subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL, env=os.environ.copy())
    os.close(terminal)
    told = b""
    while True:
        try:
            part = os.read(reader, 4096)
        except OSError:
            break
        if not part:
            break
        told += part
    assert child.wait(timeout=60) == 0
    assert b"denoising: 100%" in told
    assert b"2/2" in told
    assert b"s/step" in told or b"step/s" in told


def test_help_names_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "generate" in done.stdout
    assert "info" in done.stdout
