"""The reader of GGUF files beside the one of the library `gguf`, which is not ours, and files that are not sound."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize

from rslora_jax.interop.gguf_file import read_gguf

pytestmark = pytest.mark.by_day_on("newest")

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
ENTRIES = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60000,
    "int16": -30000,
    "uint32": 4_000_000_000,
    "int32": -2_000_000_000,
    "float32": 0.1,
    "uint64": 1 << 60,
    "int64": -(1 << 60),
    "float64": 0.1,
    "bool": True,
    "string": "ünnamed",
}


def write(path, kind, shape, alignment=None):
    """Write one tensor of random blocks, with a metadata entry of each type."""
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, value in ENTRIES.items():
        getattr(writer, f"add_{name}")(f"entry.{name}", value)
    writer.add_array("entry.texts", ["a", "", "ü" * 300])
    writer.add_array("entry.numbers", [1, -2, 3])
    writer.add_array("entry.flags", [True, False])
    block, size = GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 120, (*shape[:-1], shape[-1] // block * size)).astype(np.uint8)
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("it", data, raw_shape=data.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 512), (256,), (2, 3, 256)])
def test_metadata_and_rows_are_those_of_the_librarys_reader(kind, shape, tmp_path):
    kind = GGMLQuantizationType[kind]
    path = write(tmp_path / "a.gguf", kind, shape, alignment=64 if len(shape) == 2 else None)
    theirs = GGUFReader(path)
    found = read_gguf(path)
    wanted = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert found.metadata == wanted and [*found.tensors] == ["before", "it"]
    tensor, its = found.tensors["it"], next(one for one in theirs.tensors if one.name == "it")
    whole = dequantize(its.data, its.tensor_type).reshape(shape)
    assert tensor.shape == shape and tensor.dtype == whole.dtype == np.float32
    for first, stop in ((0, shape[0]), (1, shape[0]), (0, 1)):
        np.testing.assert_array_equal(tensor.rows(first, stop), whole[first:stop])
    order = np.random.default_rng(1).permutation(shape[0])
    if len(shape) > 1:
        turned = dataclasses.replace(tensor, order=order)
        np.testing.assert_array_equal(turned.rows(0, shape[0]), whole[order])
        np.testing.assert_array_equal(turned.rows(1, shape[0]), whole[order][1:])


@pytest.mark.nightly
def test_the_real_file_is_read_as_by_the_librarys_reader(smollm2_path):
    theirs, found = GGUFReader(smollm2_path), read_gguf(smollm2_path)
    wanted = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert found.metadata == wanted and [*found.tensors] == [one.name for one in theirs.tensors]
    for one in theirs.tensors[:8]:
        np.testing.assert_array_equal(found.tensors[one.name].rows(0, 2), dequantize(one.data, one.tensor_type)[:2])


def doubled_entry(data):
    return data.replace(b"entry.uint8", b"entry.bool2").replace(b"entry.int16", b"entry.bool2")


BROKEN = {
    "doubled entry": (doubled_entry, "entry.bool2 is there twice"),
    "doubled tensor": (lambda data: data.replace(b"\6" + b"\0" * 7 + b"before", b"\2" + b"\0" * 7 + b"it"), "twice"),
    "version": (lambda data: data[:4] + b"\1" + data[5:], "version 1"),
    "big end first": (lambda data: data[:4] + b"\0\0\0\3" + data[8:], "big end first"),
    "no text": (lambda data: data.replace("ünnamed".encode(), b"\xff\xffnnamed"), "utf-8"),
    "many entries": (lambda data: data[:16] + b"\xff" * 8 + data[24:], "is damaged|is cut off within its header"),
    "long name": (lambda data: data[:24] + b"\xff" * 8 + data[32:], "is cut off within its header"),
    "alignment": (lambda data: data.replace(b"alignment\4\0\0\0\x40", b"alignment\4\0\0\0\x41"), "alignment is 65"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_sound_is_refused_in_one_sentence(case, tmp_path):
    change, said = BROKEN[case]
    path = write(tmp_path / "a.gguf", GGMLQuantizationType.F32, (2, 4), alignment=64)
    data = path.read_bytes()
    assert change(data) != data
    path.write_bytes(change(data))
    with pytest.raises(ValueError, match=said) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_any_damage_to_the_header_is_one_sentence_or_passes(tmp_path):
    path = write(tmp_path / "a.gguf", GGMLQuantizationType.Q4_0, (2, 64))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(4, 900, rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_gguf(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
