"""What all commands share: statuses, folders, damaged files, settings, messages, what is imported."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import efficientvit_kernels.tasks as tasks
from efficientvit_kernels import _library
from efficientvit_kernels.nn import FusedLiteMLA
from efficientvit_kernels.tasks import batch, job, options
from tests.processes import python
from tests.tasks.commands import Colours, Nearest, results, run, use_model
from tests.tasks.pictures import Image, noise, read, write

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "efficientvit-sr-w1.0"


def test_odd_images_in_one_process(tmp_path: Path) -> None:
    """All that a folder may hold, from a shell: good ones are done, bad ones named, status 1."""
    folder = tmp_path / "in"
    write(folder / "grey.png", noise(40, 50)[..., 0])
    write(folder / "sub/grey.png", noise(30, 20)[..., 0])
    write(folder / "dot.png", noise(1, 1))
    write(folder / "strip.png", noise(17, 10000))
    write(folder / "alpha.webp", np.concatenate([noise(30, 30), noise(30, 30, 1)[..., :1]], axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(20, 60)).save(folder / "side.jpg", exif=exif)
    whole = (folder / "grey.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    (tmp_path / "none").mkdir()
    arguments = ("classify", str(folder), str(tmp_path / "none"), "--model", "efficientvit-b0", "--size", "64")
    done = python("-m", "efficientvit_kernels", *arguments, "--out", str(tmp_path / "out"), OMP_NUM_THREADS="1")
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert "warning: random weights: the output means nothing" in lines
    assert f"skipped: {tmp_path / 'none'}: is a folder without images" in lines
    assert f"skipped: {folder / 'text.jpg'}: is not an image of a known format" in lines
    assert any(line.startswith(f"skipped: {folder / 'cut.png'}: cannot be read: ") for line in lines)
    assert lines[-1] == "efficientvit_kernels classify: 3 skipped, see above"
    content = results(tmp_path / "out")
    sizes = {Path(record["image"]).relative_to(folder).as_posix(): record for record in content["images"]}
    assert {name: (record["width"], record["height"]) for name, record in sizes.items()} == {
        "alpha.webp": (30, 30),
        "dot.png": (1, 1),
        "grey.png": (50, 40),
        "side.jpg": (20, 60),
        "strip.png": (10000, 17),
        "sub/grey.png": (20, 30),
    }
    assert [Path(skipped["image"]).name for skipped in content["skipped"]] == ["none", "cut.png", "text.jpg"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["classify.csv", "classify.json"]


def test_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for command in options.COMMANDS:
        model = {"segment": "efficientvit-seg-l2-ade20k", "sam": "efficientvit-sam-xl1"}.get(command, "efficientvit-b3")
        model = {"reconstruct": "dc-ae-f128c512-in-1.0", "upscale": MODEL}.get(command, model)
        assert run(command, model, tmp_path / "out", tmp_path / "empty", tmp_path / "gone.png") == 1
        error = capsys.readouterr().err
        assert f"skipped: {tmp_path / 'empty'}: is a folder without images" in error
        assert f"skipped: {tmp_path / 'gone.png'}: does not exist" in error
    assert not (tmp_path / "out").exists()


def test_equal_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, Nearest())
    images = {name: noise(4, 5, seed) for seed, name in enumerate(("a/x.png", "b/x.png", "x_upscaled.png"))}
    for name, image in images.items():
        write(tmp_path / name, image)
    assert run("upscale", MODEL, tmp_path / "out", *(tmp_path / name for name in ("a", "b", "x_upscaled.png"))) == 0
    files = [record["files"] for record in results(tmp_path / "out")["images"]]
    assert len({name for pair in files for name in pair}) == 6 == len(list((tmp_path / "out").iterdir())) - 1
    for pair, image in zip(files, images.values(), strict=True):
        np.testing.assert_array_equal(read(tmp_path / "out" / pair[0])[::2, ::2], image)


def test_images_are_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_model(monkeypatch, Nearest())
    write(tmp_path / "x.png", noise(4, 5))
    before = write(tmp_path / "x_upscaled.png", noise(4, 5)).read_bytes()
    assert run("upscale", MODEL, tmp_path, tmp_path) == 1
    assert "x_upscaled.png is an image to be read: --out must be another folder" in capsys.readouterr().err
    assert (tmp_path / "x_upscaled.png").read_bytes() == before


def test_no_suffix_ends_in_another() -> None:
    """Otherwise two images could have results of one name; see Job.path."""
    suffixes = ["overlay.png", "labels.png", "mask_000.png", "mask_1000.png", "masks.npz", "reconstructed.png"]
    suffixes += ["upscaled.png", "bicubic.png"]
    for a in suffixes:
        assert not any(b != a and b.endswith(f"_{a}") for b in suffixes)


def test_twice_into_a_folder_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, Nearest())
    write(tmp_path / "x.png", noise(4, 5))
    for _ in range(2):
        assert run("upscale", MODEL, tmp_path / "out", tmp_path) == 0
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "upscale.json", "x_bicubic.png", "x_upscaled.png",
        ]  # fmt: skip


SEGMENT = ("segment", "--model", "efficientvit-seg-b0-cityscapes", "--out", "OUT", "IMAGE")
SAM = ("sam", "--model", "efficientvit-sam-l0", "--out", "OUT", "IMAGE")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("classify",), 2, "required: IMAGE, --model, --out"),
        (("classify", "IMAGE", "--out", "OUT"), 2, "required: --model"),
        (
            ("classify", "IMAGE", "--out", "OUT", "--model", "resnet18"),
            2,
            "--model must be one of efficientvit-b0, eff",
        ),
        (("classify", "IMAGE", "--out", "OUT", "--model", "efficientvit-b1-r999"), 2, "got 'efficientvit-b1-r999'"),
        (("classify", "IMAGE", "--out", "OUT", "--model", "efficientvit-sam-l0"), 2, "--model must be one of"),
        (("classify", "IMAGE", "--out", "OUT", "--model", "efficientvit-b0", "--top", "0"), 2, "must be a positive"),
        (("upscale", "IMAGE", "--out", "OUT", "--model", "dc-ae-f32c32-in-1.0"), 2, "efficientvit-sr-w0.75, eff"),
        (("classify", "IMAGE", "--out", "OUT", "--model", "efficientvit-b0", "--names", "gone"), 1, "gone"),
        ((*SEGMENT, "--dtype", "int8"), 2, "invalid choice: 'int8'"),
        ((*SEGMENT, "--backend", "fast"), 2, "invalid choice: 'fast'"),
        ((*SEGMENT, "--device", "tpu"), 2, "invalid choice: 'tpu'"),
        ((*SEGMENT, "--backend", "cpu", "--attention", "reference"), 2, "--backend must be auto with --attention ref"),
        ((*SEGMENT, "--backend", "cuda"), 1, "backend must be one that can run here, got 'cuda'"),
        ((*SEGMENT, "--weights", "gone.pt"), 1, "CheckpointError: checkpoint gone.pt: does not exist"),
        ((*SEGMENT, "--weights", "IMAGE"), 1, "its suffix must be one of"),
        ((*SAM, "--point", "5"), 2, "must be x,y or x,y,label, got '5'"),
        ((*SAM, "--point", "5,nan"), 2, "must be x,y or x,y,label, got '5,nan'"),
        ((*SAM, "--point", "5,6,2"), 2, "label must be 1 (on the object) or 0 (off it), got '5,6,2'"),
        ((*SAM, "--box", "1,2,3"), 2, "must be x0,y0,x1,y1, got '1,2,3'"),
        ((*SAM, "--box", "5,5,5,9"), 2, "must have x0 < x1 and y0 < y1, got '5,5,5,9'"),
    ],
    ids=str,
)
def test_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, text: str
) -> None:
    from efficientvit_kernels.__main__ import main

    image = write(tmp_path / "x.png", noise(4, 4))
    places = {"IMAGE": str(image), "OUT": str(tmp_path / "out")}
    try:
        found = main([places.get(argument, argument) for argument in arguments])
    except SystemExit as error:
        found = int(str(error.code))
    error_text = capsys.readouterr().err
    assert (found, text in error_text) == (status, True), error_text
    assert image.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("upscale", MODEL, tmp_path / "out", write(tmp_path / "x.png", noise(4, 4)), "--device", "cuda") == 1
    assert "torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("attention", "backend", "dtype"), [("fused", "cpu", "bfloat16"), ("reference", "auto", "float32")]
)
def test_settings_reach_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str, backend: str, dtype: str
) -> None:
    made: list[torch.nn.Module] = []
    create = job.create_model
    monkeypatch.setattr(job, "create_model", lambda *args, **options: made.append(create(*args, **options)) or made[-1])
    path = write(tmp_path / "x.png", noise(32, 32))
    settings = ("--attention", attention, "--backend", backend, "--dtype", dtype, "--device", "cpu", "--resize", "none")
    state = torch.get_rng_state()
    assert run("segment", "efficientvit-seg-b0-cityscapes", tmp_path / "out", path, *settings) == 0
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    (model,) = made
    assert not model.training
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    fused = [module for module in model.modules() if isinstance(module, FusedLiteMLA)]
    assert [module.backend for module in fused] == ([backend] * 4 if attention == "fused" else [])
    content = results(tmp_path / "out")
    assert (content["attention"], content["backend"], content["dtype"]) == (attention, backend, dtype)


def test_backends_are_the_libraries() -> None:
    assert ("auto", *_library.BACKENDS) == options.BACKENDS


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = """
import sys
from efficientvit_kernels.__main__ import main
try:
    main(["segment", "--help"])
except SystemExit:
    pass
print(*sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "PIL", "tqdm"}), file=sys.stderr)
"""
    done = python("-c", code)
    assert done.stderr.strip() == ""
    assert "--resize" in done.stdout


@pytest.mark.parametrize(("module", "package"), [("PIL", "pillow"), ("numpy", "numpy")])
def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, package: str
) -> None:
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run("upscale", MODEL, tmp_path / "out", tmp_path / "x.png") == 1
    text = f"upscale needs {package}, which cannot be imported: pip install {package}"
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_public_names() -> None:
    for name in tasks.__all__:
        assert getattr(tasks, name).__doc__, name
    assert set(tasks.__all__) <= set(dir(tasks))
    with pytest.raises(AttributeError, match="has no attribute 'paint'"):
        _ = tasks.paint


class FakeBar:
    """tqdm's, as far as it is used."""

    made: list[FakeBar]

    def __init__(self, **settings: Any) -> None:
        self.total, self.count, self.lines, self.closed = settings["total"], 0, [], False
        FakeBar.made.append(self)

    def set_postfix_str(self, text: str, refresh: bool) -> None: ...

    def update(self) -> None:
        self.count += 1

    def write(self, text: str, file: Any) -> None:
        self.lines.append(text)

    def close(self) -> None:
        self.closed = True


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, with tqdm, for more than one image; messages pass above the bar."""
    tqdm = pytest.importorskip("tqdm", reason="tqdm is in the extra `tasks`")
    FakeBar.made = []
    monkeypatch.setattr(tqdm, "tqdm", FakeBar)
    paths = [write(tmp_path / "a.png", noise(2, 2)), tmp_path / "gone.png", write(tmp_path / "b.png", noise(2, 2))]

    def count(*, progress: bool = True, upto: int = 3) -> int:
        return len(list(batch.each_image(paths[:upto], lambda path, pixels: path, [], progress)))

    assert count() == 2  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert count(progress=False) == 2
    assert count(upto=1) == 1
    assert not FakeBar.made
    assert count() == 2
    (bar,) = FakeBar.made
    assert (bar.total, bar.closed, bar.lines) == (3, True, [f"skipped: {paths[1]}: does not exist"])
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert count() == 2
    assert len(FakeBar.made) == 1


def test_lines_do_not_run_into_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tqdm = pytest.importorskip("tqdm", reason="tqdm is in the extra `tasks`")
    batch.say("first")
    lines: list[str] = []
    monkeypatch.setattr(tqdm.tqdm, "write", lines.append)
    batch.say("second")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    batch.say("third")
    assert (lines, capsys.readouterr().out) == (["second"], "first\nthird\n")


def test_a_failing_image_does_not_end_the_others(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.png", noise(2, 2)) for name in "abc"]

    def work(path: Path, _: Any) -> str:
        if path.stem == "b":
            raise torch.OutOfMemoryError("no memory left")
        return path.stem

    problems: list[tasks.Problem] = []
    assert list(batch.each_image(paths, work, problems)) == ["a", "c"]
    assert [problem.cause for problem in problems] == ["OutOfMemoryError: no memory left"]
    with pytest.raises(torch.OutOfMemoryError):
        list(batch.each_image(paths, work))


def test_a_full_disk_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_model(monkeypatch, Nearest())
    path = write(tmp_path / "x.png", noise(2, 2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run("upscale", MODEL, tmp_path / "out", path) == 1
    assert "OSError: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_out_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_model(monkeypatch, Colours())
    path = write(tmp_path / "x.png", noise(2, 2))
    assert run("segment", "efficientvit-seg-b0-cityscapes", path, path) == 1
    assert "FileExistsError" in capsys.readouterr().err


def test_nothing_outside_out_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, Nearest())
    path = write(tmp_path / "in/x.png", noise(2, 2))
    opened: list[str] = []
    original = builtins.open

    def watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            opened.append(os.fspath(file))
        return original(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    assert run("upscale", MODEL, tmp_path / "out/deep", path) == 0
    assert opened
    assert all(Path(name).parent == tmp_path / "out/deep" for name in opened)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "upscale.json", "x.png", "x_bicubic.png", "x_upscaled.png",
    ]  # fmt: skip
