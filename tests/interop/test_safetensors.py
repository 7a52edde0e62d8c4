"""The files of weights that are written, read by the format's own library."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.interop import shards as ours

theirs = pytest.importorskip("safetensors")
TENSORS = {
    "wide": np.arange(12, dtype=np.float32).reshape(3, 4) - 5.5,
    "turned": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "scalar": np.float32(3.25).reshape(()),
    "long": np.linspace(-1, 1, 101, dtype=np.float32),
    "ünnamed": np.float32([[1e-3]]),
}


def read(path):
    """Return (tensors as bits, dtypes, metadata) by the library."""
    blob = path.read_bytes()
    found = dict(theirs.deserialize(blob))
    with theirs.safe_open(path, framework="np") as file:
        return {n: (bytes(t["data"]), t["dtype"], tuple(t["shape"])) for n, t in found.items()}, file.metadata()


def kind_of(tensor):
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)


@pytest.mark.parametrize(("dtype", "name"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
@pytest.mark.parametrize("most", [10**9, 50, 1])
def test_the_library_reads_what_was_written(dtype, name, most, tmp_path):
    tensors = {key: np.asarray(value).astype(jnp.dtype(dtype)) for key, value in TENSORS.items()}
    asked = []

    def make(key):
        return asked.append(key) or tensors[key]

    files = ours.write_folder(tmp_path, {key: {key: kind_of(t)} for key, t in tensors.items()}, make, most=most)
    assert asked == list(TENSORS)
    found = {}
    for file in files:
        shard, metadata = read(file)
        assert metadata == {"format": "pt"} and not set(shard) & set(found)
        assert len(shard) == 1 or sum(len(data) for data, _, _ in shard.values()) <= most
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        found |= {key: (value, file.name) for key, value in shard.items()}
    for key, tensor in tensors.items():
        assert found[key][0] == (np.ascontiguousarray(tensor).tobytes(), name, tensor.shape)
    index = tmp_path / "model.safetensors.index.json"
    if most == 10**9:
        assert [file.name for file in files] == ["model.safetensors"] and not index.exists()
    else:
        about = json.loads(index.read_text())
        assert about["weight_map"] == {key: found[key][1] for key in tensors}
        total = sum(t.size for t in tensors.values())
        assert about["metadata"] == {
            "total_size": total * np.dtype(jnp.dtype(dtype)).itemsize,
            "total_parameters": total,
        }
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0", "five"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        ours.parse_size(text)
