"""A disk that fills up at every write of a run: said in words, and the run goes on once there is space.

A small file system in memory, which root alone can mount, is made as large as all that an undisturbed run had written by
the middle of one of its files; this for each of its files.

    make torture [FILES=N]    N files, evenly spread, instead of all
"""

import os
import subprocess

import pytest
from conftest import write_tiny_overlay
from processes import Command, preload
from test_kills import outcome, straight

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")

FILES = int(os.environ.get("FILES", "0"))
PAGE = 4096
FLAGS = ["--max_steps", "2", "--save_steps", "1", "--heldout_prompts", "2", "--eval_strategy", "no"]


@pytest.fixture(scope="module")
def commands():
    return preload()


@pytest.fixture
def small(tmp_path):
    """Mounts a file system of so many bytes, anew each time."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, again=False):
        if not again and os.path.ismount(folder):
            subprocess.run(["umount", folder], check=True)
        options = f"{'remount,' if again else ''}size={size}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def sizes_at_every_file(run, store):
    """Name of each file and the bytes on disk, in pages, when half of it had been written; of a file
    of one page, before it."""
    files = [path for path in run.rglob("*") if path.is_file()] + [store]
    found, total = [], 0
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        pages = -(-path.stat().st_size // PAGE) * PAGE
        middle = total + pages // 2 // PAGE * PAGE  # no file system has less than a page
        found.append((str(path.relative_to(run.parent)), max(PAGE, middle)))
        total += pages
    return found


def test_a_run_on_a_full_disk_says_so_and_goes_on(
    commands, tmp_path, teacher_folder, model_cache, small
):
    overlay = write_tiny_overlay(tmp_path, teacher_folder)

    def command(folder, log):
        words = ["recipes/sft.yaml", str(overlay), *FLAGS, "--output_dir", str(folder / "run")]
        words += ["--completion_store", str(folder / "store.sqlite")]
        return Command(commands["train"], words, tmp_path / log)

    plain = tmp_path / "plain"
    straight(command(plain, "plain.log"))
    expected = outcome(plain / "run")
    places = sizes_at_every_file(plain / "run", plain / "store.sqlite")
    if FILES:
        places = places[:: max(1, len(places) // FILES)]
    failed = 0
    for number, (name, size) in enumerate(places):
        folder = small(size)
        limited = command(folder, f"{number}.log")
        status = limited.finish()
        told = limited.log.read_text()
        if status == 0:
            print(f"\n{size / 1e3:.0f} kB, in {name}: it was enough")
            continue
        failed += 1
        place = f"{size} bytes, in {name}: {told[-3000:]}"
        assert status in (1, 2), place
        assert "No space left on device" in told, place
        assert "Traceback" not in told, place
        assert not (folder / "run/COMPLETE").exists(), place
        small(256 * 2**20, again=True)
        resumed = ["--resume"] * (folder / "run/recipe.yaml").exists()
        assert limited.finish(*resumed) == 0, limited.log.read_text()[-3000:]
        assert outcome(folder / "run") == expected, place
        print(f"\n{size / 1e3:.0f} kB, in {name}: refused, then finished alike")
    print(f"\nfull at {failed} of {len(places)} places")
    assert failed > len(places) // 2
