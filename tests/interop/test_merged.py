"""Merged folders: their numbers against numpy in float64, what is refused, and that nothing is written half."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rslora_jax.cli import main
from rslora_jax.interop import DECODER, load_model, merged, rounding, streamed
from rslora_jax.models.decoder import DecoderConfig
from rslora_jax.sites import named_leaves
from rslora_jax.store.about import sealed

from .conftest import HEADS, KV_HEADS, LAYERS, MLP, TOKENS, WIDTH
from .runs import make_run

safetensors = pytest.importorskip("safetensors")
pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NAMES = {ours: name for ours, (name, _) in DECODER.names.items()}
GEMMA = ("attn_post_norm/scale", "mlp_pre_norm/scale", "mlp_post_norm/scale")
FLAX = {
    theirs: ours
    for ours, (theirs, _) in DECODER.names.items()
    if (ours.startswith("params/layers/") or "{i}" not in theirs) and not ours.endswith(GEMMA)
}


def read(folder):
    """Return a folder's tensors by name, in float64, through the format's library and the index."""
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert files == {path.name for path in folder.glob("*.safetensors")}
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    found = {}
    for file in files:
        for name, t in safetensors.deserialize((folder / file).read_bytes()):
            found[name] = np.frombuffer(t["data"], kinds[t["dtype"]]).reshape(t["shape"]).astype(np.float64)
    return found


def exact(name, variables, adapters, scale):
    """Return W and gamma A B of a Hugging Face parameter, in its layout, from scanned variables."""
    parts = name.split(".")
    layer = int(parts[2]) if parts[1] == "layers" else None
    path = FLAX[name if layer is None else ".".join([*parts[:2], "{i}", *parts[3:]])]

    def take(x):
        return np.asarray(x if layer is None else x[layer], np.float64)

    weight = take(named_leaves(variables)[path])
    update = scale * take(adapters[path]["a"]) @ take(adapters[path]["b"]) if path in adapters else None

    def turn(x):
        return x.T if path.endswith("kernel") else x

    return turn(weight), None if update is None else turn(update)


@pytest.fixture
def tiny_path(tiny, tmp_path):
    return tiny.write(tmp_path / "tiny.gguf")


@pytest.fixture
def run(tiny_path, tmp_path):
    return make_run(tmp_path / "run", tiny_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_the_exact_sum_rounded_once_and_the_figures_say_by_how_much(dtype, run, tmp_path):
    lora, (config, variables, tokenizer), adapters = run
    roundings = merged.write_merged(
        tmp_path / "out", lora, variables, adapters, config=config, tokenizer=tokenizer, dtype=dtype
    )
    found = read(tmp_path / "out")
    here = [n for n in FLAX if not n.endswith((".bias", "q_norm.weight", "k_norm.weight"))]
    assert set(found) == {
        *(n for n in here if "{i}" not in n),
        *(n.replace("{i}", str(i)) for n in here for i in range(LAYERS) if "{i}" in n),
    }
    by_name = {rounding.name: rounding for rounding in roundings}
    assert len(by_name) == len(roundings) == 7 * LAYERS
    squares = np.zeros(2)
    for name, tensor in found.items():
        weight, update = exact(name, variables, adapters, 7 / math.sqrt(3))
        if update is None:
            assert (tensor == weight.astype(DTYPES[dtype]).astype(np.float64)).all(), name
            continue
        assert (tensor == (weight + update).astype(DTYPES[dtype]).astype(np.float64)).all(), name
        sizes = np.linalg.norm(tensor - (weight + update)), np.linalg.norm(update)
        assert by_name[name].relative == pytest.approx(sizes[0] / sizes[1], rel=1e-9)
        assert by_name[name].weight == pytest.approx(np.linalg.norm(weight))
        squares += np.square(sizes)
    total = rounding.together("all", roundings)
    assert total.relative == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-9)
    step = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]  # half the step next to 1
    assert step / 5 < total.error / total.weight < step
    kinds = {kind.name: kind for kind in rounding.by_kind(roundings)}
    assert len(kinds) == 7 and all(kind.count == LAYERS for kind in kinds.values())
    # The library's own merge sums in float32.
    for path, leaf in named_leaves(lora.merge(variables, adapters)).items():
        if path.endswith("q_proj/kernel") and dtype == "float32":
            theirs = np.stack([found[f"model.layers.{i}.self_attn.q_proj.weight"].T for i in range(LAYERS)])
            assert np.abs(theirs - np.asarray(leaf)).max() < 3e-7 * np.abs(theirs).max()


def test_an_update_below_the_dtypes_steps_is_said_to_be_lost(tiny_path, tmp_path, capsys):
    make_run(tmp_path / "run", tiny_path, size=0.004)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "most of what was learned may be rounded away" in said and "float16 or float32" in said
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "rounding to float32 moves the merged weights by" in said and "rounded away" not in said


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"targets": ["*/embedding", "*/lm_head/kernel", "*/q_proj/kernel"]},
        {"targets": ["*/layers_{1}/*/kernel"], "rank_pattern": {"*/q_proj/*": 2}},
    ],
)
def test_looped_layers_tables_and_heads_give_what_stacked_ones_do(scan, changes, tiny_path, tmp_path):
    lora, (config, variables, tokenizer), adapters = make_run(tmp_path / "run", tiny_path, scan=scan, **changes)
    merged.write_merged(
        tmp_path / "out", lora, variables, adapters, config=config, tokenizer=tokenizer, dtype="float32"
    )
    found, want = read(tmp_path / "out"), named_leaves(lora.merge(variables, adapters))
    for path, leaf in want.items():
        leaf = np.asarray(leaf, np.float64)
        name = NAMES.get(path)
        if scan and path.startswith("params/layers/"):
            pairs = [(NAMES[path].replace("{i}", str(i)), leaf[i]) for i in range(LAYERS)]
        elif name is None:
            number = path.split("/")[1].removeprefix("layers_")
            pairs = [(NAMES[path.replace(f"layers_{number}", "layers_{i}")].replace("{i}", number), leaf)]
        else:
            pairs = [(name, leaf)]
        for hf, value in pairs:
            value = value.T if path.endswith("kernel") else value
            assert np.allclose(found.pop(hf), value, rtol=0, atol=1e-6), hf
    assert not found


@pytest.mark.parametrize(
    ("dtype", "number", "said"),
    [
        ("float32", math.nan, "holds numbers that are not finite"),
        ("bfloat16", math.inf, "holds numbers that are not finite"),
        ("float16", 1e5, "overflows float16: its largest number is"),
        ("bfloat16", 3.4e38, "overflows bfloat16"),
    ],
)
@pytest.mark.parametrize("where", ["params/layers/mlp/up_proj/kernel", "params/norm/scale", "b"])
def test_what_is_not_finite_is_refused_by_name_and_nothing_is_left(dtype, number, said, where, run, tmp_path):
    lora, (config, variables, tokenizer), adapters = run
    before = set(tmp_path.iterdir())
    name = {"params/norm/scale": "model.norm.weight"}.get(where, "model.layers.1.mlp.up_proj.weight")
    if where == "b":
        factors = adapters["params/layers/mlp/up_proj/kernel"]
        b = factors["b"].copy()
        b[1, 0, 5] = number
        factors["a"][1, :, 0] = 1.0
        adapters = adapters | {"params/layers/mlp/up_proj/kernel": factors | {"b": b}}
    else:
        last = (1,) if where.startswith("params/layers") else ()

        def put(path, leaf):
            return leaf.at[(*last, *(3,) * (leaf.ndim - len(last)))].set(number)

        def named(p):
            return "/".join(str(k.key) for k in p)

        variables = jax.tree_util.tree_map_with_path(
            lambda p, leaf: put(p, leaf) if named(p) == where else leaf, variables
        )
    with pytest.raises(ValueError, match=said) as caught:
        merged.write_merged(
            tmp_path / "out", lora, variables, adapters, config=config, tokenizer=tokenizer, dtype=dtype
        )
    assert str(caught.value).startswith(name)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(error, run, tmp_path, monkeypatch, capsys):
    before = set(tmp_path.iterdir())
    calls = []

    def rounded(name, weight, dtype, round=streamed.rounded):
        calls.append(name)
        if len(calls) == 9:
            raise error
        return round(name, weight, dtype)

    monkeypatch.setattr(streamed, "rounded", rounded)
    status = main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert len(calls) == 9 and set(tmp_path.iterdir()) == before
    assert status == (130 if error is KeyboardInterrupt else 2) and err.count("\n") == 1
    assert ("nothing was written" if status == 130 else "no space left on device") in err


def test_the_command_merges_the_step_asked_for_into_files_of_the_size_asked_for(tiny_path, tmp_path, capsys):
    _, loaded, last = make_run(tmp_path / "run", tiny_path, steps=(2, 4))
    flags = ["--dtype", "float32", "--max-shard-size", "20KB"]
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *flags]) == 0
    said = capsys.readouterr().out
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 22_000
    assert "model.layers.{0..1}.self_attn.q_proj.weight" in said and f"{len(sizes)} files of weights" in said
    name = "model.layers.1.mlp.down_proj.weight"
    weight, update = exact(name, loaded.variables, last, 7 / math.sqrt(3))
    assert (read(tmp_path / "out")[name] == (weight + update).astype(np.float32)).all()
    # The least held-out loss is that of step 2, and a checkpoint's own folder does as well as its number.
    for n, arguments in enumerate(
        ([str(tmp_path / "run"), "--step", "best"], [str(tmp_path / "run" / "checkpoints" / "2")])
    ):
        out = tmp_path / f"best{n}"
        assert main(["merge", *arguments, "--out", str(out), "--dtype", "float32"]) == 0
        assert np.abs(read(out)[name] - (weight + update)).max() > 0.01
        assert (read(out)[name] == read(tmp_path / "best0")[name]).all()
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "out is not empty: give another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "missing is not a folder"),
        (["."], "has no checkpoint"),
        (["run", "--step", "9"], "has no checkpoint of step 9: it has steps 4"),
        (["run", "--step", "first"], "--step first is neither"),
        (["run", "--max-shard-size", "5X"], "'5X' is not a size"),
        (["run", "--model", "other.gguf"], "was trained with another base"),
        (["run/checkpoints/4", "--step", "last"], "holds one state of adapters and no steps"),
        (["silent"], "does not tell on which model it was trained"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, said, tiny, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = dataclasses.replace(tiny, weights=tiny.weights | {"output_norm.weight": np.zeros(WIDTH, np.float32)})
    other.write(tmp_path / "other.gguf")
    if arguments == ["silent"]:
        import shutil

        shutil.copytree("run", "silent")
        about = next((tmp_path / "silent").rglob("about/metadata"))
        text = json.loads(about.read_text())
        about.write_text(json.dumps(sealed(text | {"settings": {}})))
    before = set(tmp_path.iterdir())
    assert main(["merge", *arguments, "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_base_held_in_bfloat16_is_taken_as_it_was_trained_on(tiny, tmp_path, capsys):
    tiny.weights["blk.0.attn_q.weight"] = tiny.weights["blk.0.attn_q.weight"] * np.float32(1.001)
    _, loaded, adapters = make_run(tmp_path / "run", tiny.write(tmp_path / "tiny.gguf"), dtype="bfloat16")
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, update = exact(name, loaded.variables, adapters, 7 / math.sqrt(3))
    assert (read(tmp_path / "out")[name] == (weight + update).astype(np.float32)).all()


def test_the_folder_says_what_the_model_is(run, tmp_path):
    lora, (config, variables, tokenizer), adapters = run
    tokenizer = dataclasses.replace(tokenizer, chat_template="{{ messages }} ü", bos_id=2)
    merged.write_merged(tmp_path / "out", lora, variables, adapters, config=config, tokenizer=tokenizer)

    def read(name):
        return json.loads((tmp_path / "out" / name).read_text("utf-8"))

    about = read("config.json")
    assert about["architectures"] == ["LlamaForCausalLM"] and about["torch_dtype"] == "bfloat16"
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [about[name] for name in sizes] == [WIDTH, MLP, LAYERS, HEADS, KV_HEADS]
    assert (about["vocab_size"], about["head_dim"], about["max_position_embeddings"]) == (len(TOKENS), 16, 77)
    assert (about["rope_theta"], about["rms_norm_eps"], about["tie_word_embeddings"]) == (500.0, 0.125, False)
    ids = {"bos_token_id": 2, "eos_token_id": 0, "pad_token_id": 1}
    assert about.items() >= ids.items() and read("generation_config.json") == ids
    said = read("tokenizer_config.json")
    assert (said["bos_token"], said["eos_token"], said["pad_token"]) == ("h", "<end>", "<pad>")
    assert said["chat_template"] == "{{ messages }} ü"


def test_what_config_json_cannot_say_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(DecoderConfig):
        stretch: float = 1.0

    sizes = dict(vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2)
    assert DECODER.write_config(Other(**sizes), "float32")["hidden_size"] == 16
    with pytest.raises(ValueError, match=r"stretch=2\.0 cannot be written"):
        DECODER.write_config(Other(**sizes, stretch=2.0), "float32")


def test_a_hugging_face_bases_own_files_are_kept_with_only_the_dtype_changed(run, tmp_path):
    lora, (config, variables, tokenizer), adapters = run
    base = tmp_path / "base"
    base.mkdir()
    about = {"model_type": "qwen9", "torch_dtype": "float32", "rope_scaling": {"factor": 8.0}, "z": 1}
    files = {"config.json": json.dumps(about), "tokenizer.json": "{ }", "merges.txt": "a b", "notes.md": "no"}
    for name, text in files.items():
        (base / name).write_text(text)
    out = tmp_path / "out"
    merged.write_merged(out, lora, variables, adapters, config=config, tokenizer=tokenizer, base=base, dtype="float16")
    kept = {"config.json", "tokenizer.json", "merges.txt", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == kept | {"generation_config.json"}
    # The base does not say where to stop; the tokenizer does.
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 0}
    assert json.loads((out / "config.json").read_text()) == about | {"torch_dtype": "float16"}
    assert (out / "tokenizer.json").read_text() == "{ }"
    # As transformers 5 writes it.
    (base / "config.json").write_text(json.dumps({"dtype": "float32"}))
    merged.write_merged(tmp_path / "5", lora, variables, adapters, config=config, tokenizer=tokenizer, base=base)
    assert json.loads((tmp_path / "5" / "config.json").read_text()) == {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config_eos", "generation", "said"),
    [
        # The template's end of a turn, <pad>, is not the eos <end>: both end an answer.
        ({"eos_token_id": 0, "pad_token_id": 3}, None, {"eos_token_id": [0, 1], "pad_token_id": 3}),
        ({}, {"eos_token_id": 0, "top_p": 0.8}, {"eos_token_id": [0, 1], "top_p": 0.8}),
        ({"eos_token_id": 0}, {"eos_token_id": [0, 1, 5]}, {"eos_token_id": [0, 1, 5]}),
        ({"eos_token_id": 0}, {"eos_token_id": [5]}, {"eos_token_id": [5, 0, 1]}),
    ],
)
def test_where_generation_stops_is_written_for_others(run, tmp_path, config_eos, generation, said):
    lora, (config, variables, tokenizer), adapters = run
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>\n{% endfor %}"
    tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    assert tokenizer.stop_ids == (0, 1)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"dtype": "float32", **config_eos}))
    if generation:
        (base / "generation_config.json").write_text(json.dumps(generation))
    for name, where in (("with", base), ("without", None)):
        files = dict(config=config, tokenizer=tokenizer, base=where)
        merged.write_merged(tmp_path / name, lora, variables, adapters, **files)
    assert json.loads((tmp_path / "with" / "generation_config.json").read_text()) == said
    assert json.loads((tmp_path / "without" / "generation_config.json").read_text())["eos_token_id"] == [0, 1]
    assert load_model(tmp_path / "without").tokenizer.stop_ids == (0, 1)


def test_inspect_shows_a_run_beside_its_base_and_writes_its_files(run, tmp_path, capsys):
    lora, (_, variables, _), adapters = run
    assert main(["inspect", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "rank 3, alpha 7, gamma = alpha/sqrt(r), on all-linear" in said
    update = {
        p: np.asarray(m) - np.asarray(variables_leaf)
        for (p, m), variables_leaf in zip(
            named_leaves(lora.merge(variables, adapters)).items(), named_leaves(variables).values(), strict=True
        )
    }
    path = "params/layers/attn/o_proj/kernel"
    sizes = [
        np.linalg.norm(u) / np.linalg.norm(w) for u, w in zip(update[path], named_leaves(variables)[path], strict=True)
    ]
    line = next(line for line in said.splitlines() if line.startswith("attn/o_proj"))
    assert f"{np.mean(sizes):.2e} ({min(sizes):.2e} to {max(sizes):.2e})" in line and "4.041" in line
    assert {path.name for path in (tmp_path / "run").glob("spectrum*")} == {"spectrum.png", "spectrum.csv"}
    assert len((tmp_path / "run" / "spectrum.csv").read_text().splitlines()) == 1 + 7 * LAYERS
    out = tmp_path / "pictures"
    checkpoint = str(tmp_path / "run" / "checkpoints" / "4")
    assert main(["inspect", checkpoint, "--all", "--no-base", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "params/layers/attn/o_proj/kernel[1]" in said and "norms are absolute (--no-base)" in said
    assert {path.name for path in out.iterdir()} == {"spectrum.png", "spectrum.csv"}
    assert main(["inspect", checkpoint, "--no-base", "--model", "other.gguf"]) == 2


def test_the_model_loads_again_as_it_was_merged(run, tmp_path):
    lora, (config, variables, tokenizer), adapters = run
    merged.write_merged(
        tmp_path / "out", lora, variables, adapters, config=config, tokenizer=tokenizer, dtype="float32"
    )
    again = load_model(tmp_path / "out")
    assert again.config == config and again.family is DECODER
    for path, leaf in named_leaves(lora.merge(variables, adapters)).items():
        assert jnp.abs(named_leaves(again.variables)[path] - leaf).max() < 1e-6
