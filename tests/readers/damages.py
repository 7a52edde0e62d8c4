"""Damage to files: blind, of their bytes, and by structure, which leaves a file that says something else."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.readers.files import ARRAY, F32, STRING, U32, U64, gguf, gguf_parts

Damage = Callable[[random.Random, bytes], bytes]

RAW = "@raw@"  # where it stands in JSON, a text is put that `json.dumps` would not write
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 1000000, 10**12, 2**31, 2**63, 2**64, "", "0", "²", "llama"),
    *([], {}, [[]], [None], [1, 2], ["a"], [{}], {"a": {}}, {"content": 5}, {"content": "<pad>"}, {"content": None}),
    *(
        "x" * 3000,
        "\ud800",
        "\x1b[31m",
        "ü",
        "(",
        "(a+)+$",
        "{{",
        "{% for",
        "sliding_attention",
        ["full_attention"] * 2,
    ),
    *({"factor": 2.0}, {"rope_type": "llama3", "factor": "a"}, {"rope_theta": -1.0}, ["x" * 200] * 300, [10**30]),
]
RAWS = [
    *("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1" + "0" * 400, "1" + "0" * 5000, "1e-400", "01", "'a'"),
    *(
        "[" * 3000 + "]" * 3000,
        "[" * 300_000,
        '{"a":' * 3000 + "1" + "}" * 3000,
        "",
        "undefined",
        '"\\ud800"',
        '"\x00"',
    ),
]


def blind(rng: random.Random, data: bytes) -> bytes:
    """Damage some bytes, whatever they are."""
    kind = rng.choice(["flip", "flip", "flip", "set", "set", "cut", "splice", "zeros", "ones", "insert", "drop", "all"])
    at, size = (rng.randrange(max(len(data), 1)) for _ in range(2))
    # The beginning of a file says what the rest is.
    at = rng.randrange(min(len(data), 200) or 1) if rng.random() < 0.3 else at
    size = size % rng.choice([4, 16, 200]) + 1
    if kind in ("flip", "set"):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            if changed:
                changed[at] = changed[at] ^ 1 << rng.randrange(8) if kind == "flip" else rng.randrange(256)
                at = rng.randrange(len(data))
        return bytes(changed)
    part = {
        "cut": data[:at],
        "splice": data[:at] + data[rng.randrange(len(data) or 1) :][:size] + data[at + size :],
        "zeros": data[:at] + b"\0" * size + data[at + size :],
        "ones": data[:at] + b"\xff" * size + data[at + size :],
        "insert": data[:at] + rng.randbytes(size) + data[at:],
        "drop": data[:at] + data[at + size :],
    }
    return part.get(kind, rng.choice([b"", b"\0", b"\0" * 64, rng.randbytes(size), b"\xff\xfe" + data, data + data]))


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Give every place of a tree of JSON, as (what holds it, its key there)."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


def json_object(*keys: str, values: tuple[Any, ...] = ()) -> Damage:
    """Make a damage of a JSON object: a value, a key or its text; `keys` are such as a reader looks for too."""

    def damage(rng: random.Random, data: bytes) -> bytes:
        tree, raw = json.loads(data), None
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            places = list(_places(tree))
            own = [place for place in places if place[0] is tree]  # large parts of a file are not to get it all
            holder, key = rng.choice(own if rng.random() < 0.5 else places) if places else (tree, "a")
            if keys and rng.random() < 0.4:
                holder, key = tree, rng.choice(keys)
            kind = rng.choice(["odd", "odd", "odd", "odd", "raw", "raw", "delete", "rename", "swap"])
            if kind == "odd":
                holder[key] = copy.deepcopy(rng.choice([*ODD, *values]))
            elif kind == "raw":
                holder[key], raw = RAW, rng.choice(RAWS)
            elif kind == "swap" and places:
                other, its = rng.choice(places)
                holder[key] = copy.deepcopy(other[its]) if its in other or isinstance(other, list) else None
            elif isinstance(holder, dict) and key in holder:
                value = holder.pop(key)
                if kind == "rename":
                    holder[rng.choice([f"{key}2", "", "a" * 3000, "\x1b]0;a\x07", *keys])] = value
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
        text = text.replace(json.dumps(RAW), raw if raw is not None else "0")
        if rng.random() < 0.15:  # a key twice
            whole = json.loads(data)
            doubled = rng.choice([*whole, *keys])
            value = rng.choice([rng.choice(ODD), whole.get(doubled), rng.choice([*whole.values()])])
            text = text.rstrip()[:-1] + f", {json.dumps(doubled)}: {json.dumps(value)}}}"
        coding = rng.choice(["utf-8"] * 12 + ["utf-16", "utf-8-sig", "latin-1", "utf-32"])
        return text.encode(coding, "surrogatepass" if coding != "latin-1" else "replace")

    return damage


def within_safetensors(word: str, damage: Damage) -> Damage:
    """Make a damage of a safetensors file: of the bytes of one tensor whose name has a word."""

    def within(rng: random.Random, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        one = rng.choice([name for name in header if word in name])
        start, stop = header[one]["data_offsets"]
        part = damage(rng, body[start:stop])
        more = len(part) - (stop - start)
        for name, about in header.items():
            if name != "__metadata__" and about["data_offsets"][0] >= stop:
                about["data_offsets"] = [at + more for at in about["data_offsets"]]
        header[one] |= {"shape": [len(part)], "data_offsets": [start, start + len(part)]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + body[:start] + part + body[stop:]

    return within


def safetensors_header(rng: random.Random, data: bytes) -> bytes:
    """Change what a safetensors file says of its tensors."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    start, stop = header[one]["data_offsets"]
    kind = rng.choice(_HEADERS)
    more = b""
    if kind == "overlap":
        size = stop - start
        first = header[other]["data_offsets"][0]
        header[one]["data_offsets"] = [first, first + size]
    elif kind == "shift":
        by = rng.choice([-8, -4, -1, 1, 4, 8, len(body), -start - 4, 2**62])
        header[one]["data_offsets"] = [start + by, stop + by]
    elif kind == "shift all":
        by = rng.choice([-4, 4, 64])
        for name in names:
            header[name]["data_offsets"] = [at + by for at in header[name]["data_offsets"]]
        body = body if by < 0 else body + b"\0" * rng.choice([0, by])
    elif kind == "hole":
        del header[one]
    elif kind == "swap":
        header[one]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], [start, stop]
    elif kind == "dtype":
        header[one]["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I32", "U8", "F8_E4M3", "f32", "", 5, None, "X" * 3000]
        )
    elif kind == "shape":
        shape = header[one]["shape"]
        odd = [shape[::-1], [*shape, 1], [math.prod(shape)], [], [0], [-n for n in shape], [2**32, 2**32], [2.0], "8"]
        header[one]["shape"] = rng.choice([*odd, [True, *shape], shape * 2, [10**30], None, [1] * 5000])
    elif kind == "odd":
        header[one] = rng.choice([*ODD, header[other]])
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(ODD)
    elif kind == "new":
        header[rng.choice(["", "a" * 5000, "\x1b[2J", one + "2"])] = copy.deepcopy(header[one])
    elif kind == "numbers":
        at = rng.randrange(0, len(body) - 4, 4)
        number = struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf]))
        body = body[:at] + number + body[at + 4 :]
    elif kind == "longer":
        more = rng.choice([b"\0" * 4, body, b"x"])
    text = json.dumps(header).encode()
    if kind == "twice":
        text = text[:-1] + b", " + json.dumps({one: header[other]}).encode()[1:]
    text += b" " * (-len(text) % 8)
    length = (
        len(text) if kind != "length" else rng.choice([0, 1, len(text) - 8, len(text) + 8, 2**40, 2**63, 2**64 - 1])
    )
    return length.to_bytes(8, "little") + text + body + more


_HEADERS = (
    *(
        "overlap",
        "shift",
        "shift all",
        "hole",
        "swap",
        "dtype",
        "shape",
        "odd",
        "metadata",
        "new",
        "numbers",
        "numbers",
    ),
    *("longer", "twice", "length"),
)


def companions(rng: random.Random, data: bytes) -> bytes:
    """Change what lies beside a matrix that bitsandbytes wrote: its values, its size, its name, or whose it is."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    ends = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".SCB", "__nf4", "__fp4", "_format")
    beside = [name for name in header if name.endswith(ends)]
    for _ in range(rng.choice([1, 1, 2])):
        one = rng.choice(beside)
        start, stop = header[one]["data_offsets"]
        alike = [name for name in beside if name != one and name.rpartition(".")[2] == one.rpartition(".")[2]]
        kind = rng.choice(["values", "values", "values", "other's", "name", "dtype", "shape", "matrix"])
        if kind == "values":
            size = 4 if header[one]["dtype"] == "F32" else 1
            numbers = (math.nan, math.inf, -math.inf, -1.0, 0.0, 3e38, 1e-45, 1e-38)
            at = rng.randrange(start, stop, size)
            body[at : at + size] = struct.pack("<f", rng.choice(numbers)) if size == 4 else rng.randbytes(1)
        elif kind == "other's" and alike:
            header[one] = copy.deepcopy(header[rng.choice(alike)])
        elif kind == "name":
            header[rng.choice([f"{one}2", one.replace("layers.0", "layers.1"), "SCB", f"x{one}"])] = header.pop(one)
            break
        elif kind == "dtype":
            header[one]["dtype"] = rng.choice(["F16", "BF16", "U8", "I8", "F64", "F32"])
        elif kind == "shape":
            count = math.prod(header[one]["shape"])
            header[one]["shape"] = rng.choice([[count, 1], [1, count], [count // 2, 2], [], [count + 1]])
        elif kind == "matrix":
            of = next(
                name for name in header if one.startswith(name.removesuffix("weight")) and name.endswith("weight")
            )
            header[of]["shape"] = rng.choice([[1, *header[of]["shape"]], header[of]["shape"][::-1], [7], [2, 1]])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def gguf_parts_changed(rng: random.Random, data: bytes) -> bytes:
    """Change an entry or a tensor of a GGUF file."""
    entries, tensors = gguf_parts()
    counts: dict[str, int] = {}
    for _ in range(rng.choice([1, 1, 1, 2])):
        kind, entry, tensor = rng.choice(_GGUFS), rng.choice(entries), rng.choice(tensors)
        if kind == "type":
            entry[1:] = rng.choice(_VALUES)
        elif kind == "same type":
            entry[2] = rng.choice([value for kind, value in _VALUES if kind == entry[1]] or [entry[2]])
        elif kind == "new":
            entries.append([rng.choice(_MORE), *rng.choice(_VALUES)])
        elif kind == "twice":
            entries.append([entry[0], *rng.choice(_VALUES)])
        elif kind == "delete":
            entries.remove(entry)
        elif kind == "name":
            entry[0] = rng.choice([b"\xff", "", "a" * 70_000, "\x1b[2J", entry[0] + "2"])
        elif kind == "count":
            counts[rng.choice(["entry_count", "tensor_count"])] = rng.choice([0, 1, 2**31, 2**60, 2**64 - 1, 20])
        elif kind == "offset":
            tensor["offset"] = rng.choice([0, 32, 4, 1, 64, 2**60, 2**63, 2**64 - 32])
        elif kind == "dims":
            odd = [tensor["dims"][::-1], [2**60, 2**60], [0, 32], [], [32], [1] * 5000, [math.prod(tensor["dims"])]]
            tensor["dims"] = rng.choice([*odd, [*tensor["dims"], 1], [2**32, 2**32]])
        elif kind == "kind":
            tensor["kind"] = rng.choice([1, 2, 8, 12, 16, 24, 30, 99, 2**32 - 1])
        elif kind == "tensor name":
            tensor["name"] = rng.choice(
                [tensors[0]["name"], "", b"\xff\xfe", "a" * 3000, "blk.0.x", "blk.99999999.attn_q.weight"]
            )
        elif kind == "numbers":
            number = struct.pack("<f", rng.choice([math.nan, math.inf]))
            at = rng.randrange(0, len(tensor["data"]) - 4, 4)
            tensor["data"] = tensor["data"][:at] + number + tensor["data"][at + 4 :]
        elif kind == "hole":
            tensors.remove(tensor) if rng.random() < 0.5 else tensors.reverse()
    return gguf(entries, tensors, **counts)


_GGUFS = (
    *(*["type"] * 4, *["same type"] * 3, "new", "new", "twice", "delete", "name", "count", "count"),
    *("offset", "offset", "dims", "kind", "numbers", "hole", "tensor name"),
)
_VALUES: list[tuple[int, Any]] = [
    *((U32, n) for n in (0, 1, 2, 3, 32, 1_000_000, 2**31, 2**32 - 1)),
    *((U64, n) for n in (2**60, 2**63, 2)),
    *((F32, x) for x in (math.inf, math.nan, -1.0, 0.0, 1e30, 1e-40)),
    *((5, -1), (7, True), (7, False), (12, 1e300), (12, math.inf), (99, b"\0" * 8)),
    *(
        (STRING, text)
        for text in (
            "",
            "llama",
            "gpt2",
            "x" * 70_000,
            b"\xff\xff",
            "\x1b[2J",
            "{{ 1",
            "yarn",
            "gemma3",
            "qwen2",
            "llama-bpe",
        )
    ),
    *((ARRAY, (STRING, items)) for items in ([], ["a"] * 10, ["h i", "h"], ["a b c"], ["<end>"] * 3)),
    *((ARRAY, (U32, items)) for items in ([], [1], [2**32 - 1] * 10, [3] * 10_000)),
    *((ARRAY, (F32, [1.0])), (ARRAY, (ARRAY, [(U32, [1])] * 4)), (ARRAY, (7, [True]))),
    (ARRAY, struct.pack("<IQ", U32, 2**60)),
    (ARRAY, struct.pack("<IQ", STRING, 2**60)),
    (ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQ", U32, 0)),
    (ARRAY, struct.pack("<IQ", 77, 3)),
]
_MORE = [
    *("general.alignment", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.expert_count", "llama.x"),
    *("llama.attention.value_length", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.scores", "general.name"),
    *("tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_eos_token", "llama.rope.scale_linear"),
]


def json_lines(rng: random.Random, data: bytes) -> bytes:
    """Damage one line of JSON lines by its structure."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    keys = ("prompt", "completion", "messages", "text", "question", "answer", "role", "content")
    lines[at] = json_object(*keys)(rng, lines[at]).replace(b"\n", b" ")
    return b"\n".join(lines * rng.choice([1, 1, 1, 50])) + b"\n"


def array_file(rng: random.Random, data: bytes) -> bytes:
    """Write other arrays than a reader of .npz files looks for."""
    import io

    file = io.BytesIO()
    names = ["ids_N", "is_learnt_N", "lengths_S", "sequences_E", "x"]
    odd = [np.zeros(3), np.array(["a"]), np.zeros((2, 2), bool), np.int64(3), np.zeros(0), np.array([2**62] * 2)]
    np.savez(file, **{name: rng.choice(odd) for name in rng.sample(names, rng.randint(0, 5))})
    return file.getvalue()
