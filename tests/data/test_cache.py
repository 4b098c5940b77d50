"""The disk caches: exact, keyed, safe under several processes, kills and damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffkit.data.cache import EmbeddingCache, LatentCache, TensorCache
from diffkit.data.transforms import Transform
from diffkit.files import TEMPORARY_PREFIX

TENSORS = {
    "tokens": torch.randn(7, 16).to(torch.bfloat16),
    "mask": torch.arange(7),
    "pooled": torch.randn(16),
}

WRITER = """
import sys, torch
from diffkit.data.cache import TensorCache
cache = TensorCache(sys.argv[1], "fingerprint")
print("ready", flush=True)
sys.stdin.readline()
while True:
    for entry in range(int(sys.argv[2])):
        cache.write(f"{entry:032x}", {"moments": torch.full((8, 64, 64), float(entry))})
        assert cache.read(f"{entry:032x}") is not None
    if sys.argv[3] == "once":
        break
"""


def writer(folder, entries, mode):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(entries), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start(*processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


def test_entries_come_back_bit_by_bit(tmp_path):
    cache = TensorCache(tmp_path, "fingerprint")
    assert not cache.has("0" * 32) and cache.read("0" * 32) is None
    cache.write("0" * 32, TENSORS)
    assert cache.has("0" * 32)
    found = cache.read("0" * 32)
    assert found is not None and found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_views_of_one_tensor_are_stored_alone(tmp_path):
    """A row of a batch must not drag the whole batch into its file."""
    cache = TensorCache(tmp_path, "fingerprint")
    cache.write("0" * 32, {"row": torch.zeros(1000, 100)[3], "column": torch.ones(8, 4)[:, 1]})
    assert cache.path("0" * 32).stat().st_size < 1000
    assert torch.equal(cache.read("0" * 32)["column"], torch.ones(8))


def test_keys_hold_everything_that_decides_the_content(tmp_path):
    latents = LatentCache(tmp_path, "codec")
    views = [
        Transform(flip=flip).views((80, 60), target)[-1]
        for flip in (False, True)
        for target in ((32, 32), (16, 32))
    ]
    views.append(Transform("random").view((80, 60), (32, 32), 0, 0, 5))
    keys = {latents.key(name, view) for name in ("a|1|2", "a|1|3") for view in views}
    assert len(keys) == 2 * len(views)
    assert LatentCache(tmp_path, "other codec").key("a|1|2", views[0]) not in keys
    assert latents.key("a|1|2", views[0]) == LatentCache(tmp_path, "codec").key("a|1|2", views[0])
    texts = EmbeddingCache(tmp_path, "conditioner")
    assert texts.key("red apple") != texts.key("red apple ")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, 100, -1])
def test_truncated_files_are_absent_and_made_again(tmp_path, keep):
    cache = TensorCache(tmp_path, "fingerprint")
    cache.write("a" * 32, TENSORS)
    path = cache.path("a" * 32)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert not cache.has("a" * 32)
    assert cache.read("a" * 32) is None and not path.exists()
    cache.write("a" * 32, TENSORS)
    assert path.read_bytes() == whole


def test_garbage_and_flipped_bits_are_found_by_the_checksum(tmp_path):
    cache = TensorCache(tmp_path, "fingerprint")
    cache.write("a" * 32, TENSORS)
    path = cache.path("a" * 32)
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    assert cache.read("a" * 32) is None and not path.exists()
    path.write_bytes(b"\x00garbage" * 100)
    assert not cache.has("a" * 32) and cache.read("a" * 32) is None


def test_a_foreign_safetensors_file_is_not_trusted(tmp_path):
    from safetensors.torch import save_file

    cache = TensorCache(tmp_path, "fingerprint")
    cache.path("a" * 32).parent.mkdir(parents=True)
    save_file({"moments": torch.zeros(2)}, cache.path("a" * 32))
    assert not cache.has("a" * 32) and cache.read("a" * 32) is None


def test_two_processes_fill_one_folder_at_once(tmp_path):
    """Both write the same entries at the same time and read each back at once."""
    processes = [writer(tmp_path, 30, "once") for _ in range(2)]
    start(*processes)
    for process in processes:
        assert process.wait(60) == 0
    cache = TensorCache(tmp_path, "fingerprint")
    for entry in range(30):
        assert (cache.read(f"{entry:032x}")["moments"] == entry).all()
    assert not list(tmp_path.rglob(TEMPORARY_PREFIX + "*"))


def kill_while_writing(folder, delays):
    cache = TensorCache(folder, "fingerprint")
    for delay in delays:
        process = writer(folder, 4, "forever")
        start(process)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for entry in range(4):
            found = cache.read(f"{entry:032x}")
            assert found is None or (found["moments"] == entry).all()


def test_kill_while_writing(tmp_path):
    """Entries are rewritten all the time, so a kill falls into a write; what is there is whole."""
    kill_while_writing(tmp_path, [0.05])


@pytest.mark.slow
def test_many_kills_while_writing(tmp_path):
    kill_while_writing(tmp_path, [0.01 * k for k in range(1, 11)])


def test_threads_write_files_with_the_mode_of_the_process(tmp_path):
    """Eight writer threads once raced for the process's mask and left files writable by all."""
    cache = TensorCache(tmp_path, "fingerprint")
    usual = tmp_path / "usual"
    usual.touch()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: cache.write(f"{n:032x}", TENSORS), range(300)))
    finally:
        sys.setswitchinterval(interval)
    modes = {path.stat().st_mode for path in tmp_path.rglob("*.safetensors")}
    assert modes == {usual.stat().st_mode}
