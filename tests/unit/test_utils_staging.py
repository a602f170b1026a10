"""Copies of slides on a local disk: order, bounds, formats of several files, failures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils import staging
from utils.errors import ItemFailed, Refused
from utils.staging import Staging, companions


@pytest.fixture
def slides(tmp_path: Path) -> list[Path]:
    """Five single-file slides of different contents."""
    folder = tmp_path / "slow"
    folder.mkdir()
    for index in range(5):
        (folder / f"s{index}.svs").write_bytes(bytes([index]) * 1000)
    return sorted(folder.iterdir())


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def copies(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.svs"))


def test_copies_are_made_ahead_kept_while_used_and_removed(tmp_path: Path,
                                                           slides: list[Path]) -> None:
    cache = tmp_path / "cache"
    with Staging(cache, slides, ahead=2) as stage:
        assert eventually(lambda: copies(cache) == ["s0.svs", "s1.svs"])
        time.sleep(0.1)
        assert copies(cache) == ["s0.svs", "s1.svs"]  # two ahead, not more
        local = stage.fetch(slides[0])
        assert local.name == slides[0].name and local.read_bytes() == slides[0].read_bytes()
        assert cache in local.parents
        assert eventually(lambda: copies(cache) == ["s0.svs", "s1.svs", "s2.svs"])
        assert stage.fetch(slides[0]) == local  # a second reader of the same slide
        stage.release(slides[0])
        assert local.exists()
        stage.release(slides[0])
        assert not local.exists()
        stage.release(slides[1])  # skipped: makes room for the next
        assert eventually(lambda: copies(cache) == ["s2.svs", "s3.svs"])
    assert list(cache.iterdir()) == []


def test_any_order_and_any_thread(tmp_path: Path, slides: list[Path]) -> None:
    found: dict[Path, bytes] = {}

    def read(path: Path) -> None:
        found[path] = stage.fetch(path).read_bytes()
        stage.release(path)

    with Staging(tmp_path / "cache", slides[:4], ahead=1) as stage:
        threads = [threading.Thread(target=read, args=(path,)) for path in reversed(slides)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert copies(tmp_path / "cache") == []
    assert found == {path: path.read_bytes() for path in slides}


def test_without_a_cache_folder_slides_are_read_in_place(slides: list[Path]) -> None:
    with Staging(None, slides) as stage:
        assert stage.fetch(slides[0]) == slides[0]
        stage.release(slides[0])


def test_no_space_is_one_line_and_reads_in_place(
        tmp_path: Path, slides: list[Path], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(staging, "free_bytes", lambda folder: staging.RESERVE_BYTES + 999)
    with Staging(tmp_path / "cache", slides[:1]) as stage:
        assert stage.fetch(slides[0]) == slides[0]
        stage.release(slides[0])
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "s0.svs" in warnings[0] and "no space" in warnings[0]


def test_a_disk_that_fills_up_in_the_middle(
        tmp_path: Path, slides: list[Path], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """A file-size limit stands for it; the other slides are copied."""
    import resource
    import signal

    slides[0].write_bytes(b"x" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with Staging(tmp_path / "cache", slides) as stage:
            assert stage.fetch(slides[0]) == slides[0]
            assert stage.fetch(slides[1]) != slides[1]
            assert copies(tmp_path / "cache").count("s0.svs") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert "s0.svs: not copied" in capsys.readouterr().err


def test_a_missing_slide_is_left_to_its_reader(tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent.svs"
    with Staging(tmp_path / "cache", [absent]) as stage:
        assert stage.fetch(absent) == absent
    assert "No such file" in capsys.readouterr().err


def test_slides_of_several_files_come_whole(tmp_path: Path) -> None:
    folder = tmp_path / "slow"
    (folder / "m").mkdir(parents=True)
    for name in ("m.mrxs", "m/Slidedat.ini", "m/Data0000.dat", "v.jpg", "v_map.jpg", "other.jpg"):
        (folder / name).write_bytes(name.encode())
    (folder / "v.vms").write_text("[Virtual Microscope Specimen]\nImageFile=v.jpg\n"
                                  "ImageFile(1,0)=absent.jpg\nMapFile=v_map.jpg\nNoLayers=1\n")
    (folder / "d").mkdir()
    (folder / "d" / "1.dcm").write_bytes(b"1")
    (folder / "z.zarr" / "0").mkdir(parents=True)
    (folder / "z.zarr" / "0" / "0.0").write_bytes(b"z")
    paths = [folder / name for name in ("m.mrxs", "v.vms", "d", "z.zarr")]
    with Staging(tmp_path / "cache", paths) as stage:
        mirax, hamamatsu, dicom, zarr = map(stage.fetch, paths)
        assert (mirax.parent / "m" / "Data0000.dat").read_bytes() == b"m/Data0000.dat"
        assert sorted(os.listdir(hamamatsu.parent)) == ["v.jpg", "v.vms", "v_map.jpg"]
        assert (dicom / "1.dcm").read_bytes() == b"1"
        assert (zarr / "0" / "0.0").read_bytes() == b"z"
        stage.release(paths[0])
        assert not mirax.parent.exists()


@pytest.mark.parametrize("name", ["a.dcm", "a.vsi", "a.companion.ome"])
def test_formats_that_cannot_be_followed_are_read_in_place(
        name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(ItemFailed, match="several files"):
        companions(path)
    with Staging(tmp_path / "cache", [path]) as stage:
        assert stage.fetch(path) == path
    assert "read where it is" in capsys.readouterr().err


def test_what_a_killed_run_left_is_swept(tmp_path: Path, slides: list[Path]) -> None:
    cache = tmp_path / "cache"
    code = ("import os, sys; from pathlib import Path; from utils.staging import Staging\n"
            "with Staging(Path(sys.argv[1]), [Path(sys.argv[2])]) as stage:\n"
            "    stage.fetch(Path(sys.argv[2])); os.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, "-c", code, str(cache), str(slides[0])], cwd=ROOT)
    assert copies(cache) == ["s0.svs"]
    with Staging(cache, slides[1:2]) as stage:
        with Staging(cache, slides[1:2]) as second:  # as another process would, at the same time
            assert stage.fetch(slides[1]) != second.fetch(slides[1])
        assert copies(cache) == ["s1.svs"]
    assert copies(cache) == []


def test_an_unwritable_cache_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Refused, match="--cache_dir"), Staging(tmp_path / "file", []):
        pass


def test_the_end_does_not_wait_for_a_long_copy(tmp_path: Path, slides: list[Path],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 100)  # so that this one would take long
    slides[0].write_bytes(b"x" * 200_000_000)
    start = time.monotonic()
    with Staging(tmp_path / "cache", slides) as stage:
        assert eventually(lambda: copies(tmp_path / "cache") == ["s0.svs"])
    assert time.monotonic() - start < 2
    assert stage.fetch(slides[0]) == slides[0]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_copy_that_hangs_holds_nobody_up_for_long(tmp_path: Path, slides: list[Path]) -> None:
    """A pipe that nobody writes into is a read that hangs."""
    hanging = tmp_path / "slow" / "hanging.svs"
    os.mkfifo(hanging)
    with Staging(tmp_path / "cache", [hanging, *slides], patience_s=0.2) as stage:
        start = time.monotonic()
        assert stage.fetch(hanging) == hanging
        assert stage.fetch(slides[0]) == slides[0]  # at once: the disk is known to hang
        assert 0.15 < time.monotonic() - start < 2
        stage.release(slides[0])
        with hanging.open("wb"):
            pass  # it answers at last
        assert eventually(lambda: "s1.svs" in copies(tmp_path / "cache"))
        assert stage.fetch(slides[1]) != slides[1]
