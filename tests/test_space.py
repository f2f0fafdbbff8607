"""Streams in memory or in files: the same tensors, no file left, and a full disk that says so."""

import os

import pytest
import torch

from ptq161.space import Space


@pytest.mark.parametrize("files", [False, True])
def test_tensors_hold_what_is_put_into_them(files, tmp_path):
    space = Space(tmp_path if files else None)
    one, other = space.empty((2, 3, 5)), space.empty((2, 3), torch.bfloat16)
    one.copy_(torch.arange(30.0).view(2, 3, 5))
    other.fill_(7)
    assert one.sum() == 435 and other.dtype == torch.bfloat16 and other.sum() == 42
    copied = space.copy(one)
    copied.add_(1)
    assert one.sum() == 435 and copied.sum() == 465
    assert space.like(one).shape == one.shape
    assert space.empty((0, 3)).shape == (0, 3)


def test_files_have_no_name_and_go_with_their_tensor(tmp_path):
    tensor = Space(tmp_path).empty((1000,))
    assert list(tmp_path.iterdir()) == []

    def mapped():
        with open("/proc/self/maps") as maps:
            return str(tmp_path) in maps.read()

    if os.path.exists("/proc/self/maps"):
        assert mapped()
        del tensor
        assert not mapped()


def test_a_full_disk_is_an_error_when_the_tensor_is_made(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Space(tmp_path).empty((4,))
    assert list(tmp_path.iterdir()) == []
