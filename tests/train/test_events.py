"""Event files, read back by a reader of this file's own: TFRecord frames, protocol buffers, and TensorBoard's purge."""

import math
import struct
import sys

import numpy as np
import pytest

from rslora_jax.train.events import event_file


def crc32c(data):
    """The Castagnoli checksum (RFC 3720, appendix B.4), bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frames(data):
    """Yield the contents of a file of TFRecords."""
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        assert struct.unpack_from("<I", data, at + 8) == (masked(data[at : at + 8]),)
        content = data[at + 12 : at + 12 + size]
        assert struct.unpack_from("<I", data, at + 12 + size) == (masked(content),)
        yield content
        at += 16 + size
    assert at == len(data)


def fields(data):
    """Return a message of protocol buffers as (field, value); a message in it stays bytes."""
    at, found = 0, []

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            value = data[at : at + size]
            at += size
            value = struct.unpack("<d" if kind == 1 else "<f", value)[0] if kind in (1, 5) else value
        found.append((key >> 3, value))
    return found


STEP, FILE_VERSION, SUMMARY, SESSION_LOG = 2, 3, 5, 7  # of an Event


def shown(folder):
    """Return {tag: [(step, value)]} as TensorBoard shows a folder: a session's start drops what was after it."""
    found = []
    for path in sorted(folder.iterdir()):
        assert path.name.startswith("events.out.tfevents.")
        events = [dict(fields(frame)) for frame in frames(path.read_bytes())]
        assert events[0][FILE_VERSION] == b"brain.Event:2"
        for event in events:
            step = event.get(STEP, 0)
            if SESSION_LOG in event and dict(fields(event[SESSION_LOG])) == {1: 1}:
                found = [entry for entry in found if entry[1] < step]
            for _, value in fields(event.get(SUMMARY, b"")):
                value = dict(fields(value))
                found.append((value[1].decode(), step, value.get(2, 0.0)))
    tags = dict.fromkeys(tag for tag, *_ in found)
    return {tag: [(step, value) for name, step, value in found if name == tag] for tag in tags}


def test_the_reader_knows_a_published_checksum():
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


def test_every_number_of_a_record_is_a_scalar_at_its_step(tmp_path):
    with event_file(tmp_path) as append:
        append({"step": 0, "heldout_loss": 2.5})
        append({"step": 1, "loss": 3.25, "perplexity": 26, "tokens_per_second": 1e4, "seconds": 0.5})
        append({"step": 300, "loss": np.float32(1.5), "note": "nan", "finite": True, "extra": None})
    assert shown(tmp_path) == {
        "heldout/loss": [(0, 2.5)],
        "train/loss": [(1, 3.25), (300, 1.5)],
        "train/perplexity": [(1, 26)],
        "speed/tokens_per_second": [(1, 1e4)],
        "speed/seconds": [(1, 0.5)],
    }


def test_a_resumed_run_does_not_show_what_it_does_again(tmp_path):
    def go(start, stop, add):
        with event_file(tmp_path, start) as append:
            if start == 0:
                append({"step": 0, "heldout_loss": add})
            for step in range(start + 1, stop + 1):
                append({"step": step, "loss": step + add})

    go(0, 6, 0.0)
    go(4, 9, 0.25)  # at once: the file of the first must not be written over
    go(8, 10, 0.5)
    assert len([*tmp_path.iterdir()]) == 3
    losses = [1, 2, 3, 4, 5.25, 6.25, 7.25, 8.25, 9.5, 10.5]
    assert shown(tmp_path) == {"heldout/loss": [(0, 0)], "train/loss": [*enumerate(losses, 1)]}
    go(0, 2, 0.75)  # begun anew, as where nothing had been saved
    assert shown(tmp_path) == {"heldout/loss": [(0, 0.75)], "train/loss": [(1, 1.75), (2, 2.75)]}


def test_numbers_that_are_not_finite_are_written_and_break_nothing(tmp_path):
    with event_file(tmp_path) as append:
        for step, value in enumerate((math.nan, math.inf, -math.inf, 1e300, 0.5)):
            append({"step": step, "loss": value})
    (_, nan), *rest = shown(tmp_path)["train/loss"]
    assert math.isnan(nan) and rest == [(1, math.inf), (2, -math.inf), (3, math.inf), (4, 0.5)]


def test_an_error_in_the_run_loses_no_event(tmp_path):
    with pytest.raises(OSError, match="gone"), event_file(tmp_path) as append:
        for step in range(50):
            append({"step": step, "loss": 0.5})
        raise OSError("gone")
    assert len(shown(tmp_path)["train/loss"]) == 50


def test_without_tensorboardx_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'rslora_jax\[tensorboard\]'"), event_file(tmp_path):
        pass
