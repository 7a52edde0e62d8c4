"""The LoRA cases of PEFT's own custom models (its tests/test_custom_models.py): the same outputs, or a reason."""

from __future__ import annotations

import copy
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rslora_jax as rslora
from rslora_jax.interop import Weight
from rslora_jax.interop.peft import load_peft, read_config, replace, save_peft

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
nn = torch.nn
pytestmark = [
    pytest.mark.reference,
    pytest.mark.xdist_group("reference"),
    pytest.mark.usefixtures("compile_fast"),
    pytest.mark.by_day_on("oldest"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

FLOATS = np.arange(90, dtype=np.float32).reshape(9, 10) / 45 - 1
IDS = np.arange(90, dtype=np.int32).reshape(9, 10)


class Chain(nn.Module):
    """Some modules, and what is done with them."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class OwnParameter(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self, width, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.ones(out))

    def forward(self, x):
        return x @ self.weight + self.bias


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x, pad=0, groups=1):
    """Convolve as torch does, (batch, channels, *places); the kernel is ours, (*window, in, out)."""
    places = "DHW"[-(x.ndim - 2) :]
    layout = (f"NC{places}", f"{places}IO", f"NC{places}")
    ends = [(pad, pad)] * len(places)
    out = lax.conv_general_dilated(
        x, p["kernel"], (1,) * len(places), ends, dimension_numbers=layout, feature_group_count=groups
    )
    return out + p["bias"].reshape(-1, *(1 for _ in places))


def head(p, x):
    """Do what all these models end with; PEFT's have a relu, of which a small model may give zeros alone."""
    return jax.nn.log_softmax(dense(p, jnp.tanh(x).reshape(x.shape[0], -1)))


def torch_head(linear, x):
    return torch.log_softmax(linear(torch.tanh(x).flatten(1)), -1)


def volume(x):
    """Make two volumes of the data, as PEFT's model does."""
    return np.stack([x] * 3, axis=-1).reshape(-1, 5, 3, 3, 3)


def some_of_attention(p, x):
    """Use the weights: what comes of them is never compared, as no adapter of them is read."""
    return dense(p["lin0"], x @ p["mha"]["in_proj_weight"][:10])


GROUPED = FLOATS.reshape(-1)[: 2 * 3 * 15].reshape(2, 45)
# torch's model, its twin here over the same names, and the input.
MODELS = {
    "MLP": (
        lambda: Chain(lambda m, x: torch_head(m.lin1, m.lin0(x)), lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2)),
        lambda p, x: head(p["lin1"], dense(p["lin0"], x)),
        FLOATS,
    ),
    "EmbConv1D": (
        lambda: Chain(
            lambda m, x: torch_head(m.lin0, m.conv1d(m.emb(x))),
            emb=nn.Embedding(100, 5),
            conv1d=transformers.pytorch_utils.Conv1D(1, 5),
            lin0=nn.Linear(10, 2),
        ),
        lambda p, x: head(p["lin0"], dense(p["conv1d"], p["emb"]["embedding"][x])),
        IDS,
    ),
    "Conv1d": (
        lambda: Chain(
            lambda m, x: torch_head(m.lin0, m.conv1d(x[:, None])), conv1d=nn.Conv1d(1, 1, 2), lin0=nn.Linear(9, 2)
        ),
        lambda p, x: head(p["lin0"], conv(p["conv1d"], x[:, None])),
        FLOATS,
    ),
    "Conv2d": (
        lambda: Chain(
            lambda m, x: torch_head(m.lin0, m.conv2d(x.reshape(-1, 5, 3, 3))),
            conv2d=nn.Conv2d(5, 10, 3),
            lin0=nn.Linear(10, 2),
        ),
        lambda p, x: head(p["lin0"], conv(p["conv2d"], x.reshape(-1, 5, 3, 3))),
        FLOATS,
    ),
    "Conv2dGroups": (
        lambda: Chain(
            lambda m, x: torch_head(m.lin1, m.conv2d(m.lin0(x).reshape(-1, 16, 3, 3))),
            lin0=nn.Linear(45, 144),
            conv2d=nn.Conv2d(16, 16, 3, groups=8),
            lin1=nn.Linear(16, 2),
        ),
        lambda p, x: head(p["lin1"], conv(p["conv2d"], dense(p["lin0"], x).reshape(-1, 16, 3, 3), groups=8)),
        GROUPED,
    ),
    "Conv2dGroups2": (
        lambda: Chain(
            lambda m, x: torch_head(m.lin0, m.conv2d(x.reshape(1, 16, 2, 2))),
            conv2d=nn.Conv2d(16, 32, 3, padding=1, groups=2),
            lin0=nn.Linear(128, 2),
        ),
        lambda p, x: head(p["lin0"], conv(p["conv2d"], x.reshape(1, 16, 2, 2), pad=1, groups=2)),
        FLOATS.reshape(-1)[:64],
    ),
    "Conv3d": (
        lambda: Chain(lambda m, x: torch_head(m.lin0, m.conv3d(x)), conv3d=nn.Conv3d(5, 10, 3), lin0=nn.Linear(10, 2)),
        lambda p, x: head(p["lin0"], conv(p["conv3d"], x)),
        volume(FLOATS),
    ),
    "MHA": (
        lambda: Chain(lambda m, x: m.lin0(m.mha(x, x, x)[0]), mha=nn.MultiheadAttention(10, 2), lin0=nn.Linear(10, 2)),
        some_of_attention,
        FLOATS,
    ),
    "MlpUsingParameters": (
        lambda: Chain(lambda m, x: torch_head(m.lin1, m.lin0(x)), lin0=OwnParameter(10, 20), lin1=OwnParameter(20, 2)),
        lambda p, x: head(p["lin1"], dense(p["lin0"], x)),
        FLOATS,
    ),
}


def velora(kind):
    return peft.VeloraConfig(num_groups=2, init_type=kind)


LIN0, BOTH = dict(target_modules=["lin0"]), dict(target_modules=["lin0", "lin1"])
CASES = {
    "MLP 1": ("MLP", dict(target_modules="lin0")),
    "MLP 2": ("MLP", LIN0),
    "MLP 3": ("MLP", dict(target_modules=["lin1"])),
    "MLP 4": ("MLP", BOTH),
    "MLP 5": ("MLP", LIN0 | dict(modules_to_save=["lin1"])),
    "MLP 6": ("MLP", LIN0 | dict(lora_alpha=4, lora_dropout=0.1)),
    "MLP 7 DoRA": ("MLP", LIN0 | dict(use_dora=True)),
    "MLP 8 DoRA": ("MLP", BOTH | dict(use_dora=True)),
    "MLP 1 KaSA": ("MLP", lambda: LIN0 | dict(kasa_config=peft.KasaConfig(), r=4)),
    "MLP 1 MiCA": ("MLP", LIN0 | dict(init_lora_weights="mica", r=4)),
    "MLP 9 DoRA": ("MLP", dict(target_modules="lin1", use_dora=True, lora_alpha=32)),
    "MLP 10 VeLoRA": ("MLP", lambda: LIN0 | dict(velora_config=velora("random"))),
    "MLP 11 VeLoRA": ("MLP", lambda: BOTH | dict(velora_config=velora("batch_average"))),
    "MLP 12 VeLoRA": ("MLP", lambda: LIN0 | dict(velora_config=velora("batch_average_once"))),
    "EmbConv1D 1": ("EmbConv1D", dict(target_modules=["conv1d"])),
    "EmbConv1D 2": ("EmbConv1D", dict(target_modules=["emb"])),
    "EmbConv1D 3": ("EmbConv1D", dict(target_modules=["emb", "conv1d"])),
    "EmbConv1D 1 DoRA": ("EmbConv1D", dict(target_modules=["conv1d"], use_dora=True)),
    "EmbConv1D 2 DoRA": ("EmbConv1D", dict(target_modules=["emb"], use_dora=True)),
    "EmbConv1D 3 DoRA": ("EmbConv1D", dict(target_modules=["emb", "conv1d"], use_dora=True)),
    "EmbConv1D tokens": ("EmbConv1D", dict(target_modules=["conv1d"], trainable_token_indices={"emb": [0, 10]})),
    "MLP biases": ("MLP", LIN0 | dict(bias="all", use_rslora=True, lora_alpha=5)),
    "MLP biases of its own": ("MLP", LIN0 | dict(bias="lora_only")),
    "MLP biases and saved": ("MLP", LIN0 | dict(bias="all", modules_to_save=["lin1"])),
    "MLP one bias and saved": ("MLP", LIN0 | dict(bias="lora_only", modules_to_save=["lin1"])),
    "Conv2d biases": ("Conv2d", dict(target_modules=["conv2d"], bias="all", use_dora=True)),
    "EmbConv1D saved": (
        "EmbConv1D",
        dict(target_modules=["conv1d"], modules_to_save=["emb", "lin0"], bias="lora_only"),
    ),
    "Conv1d": ("Conv1d", dict(target_modules=["conv1d"])),
    "Conv1d DoRA": ("Conv1d", dict(target_modules=["conv1d"], use_dora=True)),
    "Conv2d 1": ("Conv2d", dict(target_modules=["conv2d"])),
    "Conv2d 2": ("Conv2d", dict(target_modules=["conv2d", "lin0"])),
    "Conv2d 1 DoRA": ("Conv2d", dict(target_modules=["conv2d"], use_dora=True)),
    "Conv2d 2 DoRA": ("Conv2d", dict(target_modules=["conv2d", "lin0"], use_dora=True)),
    "Conv2d Groups": ("Conv2dGroups", dict(target_modules=["conv2d"])),
    "Conv2d Groups2": ("Conv2dGroups2", dict(target_modules=["conv2d"])),
    "Conv2d Groups DoRA": ("Conv2dGroups", dict(target_modules=["conv2d"], use_dora=True)),
    "Conv2d Groups2 DoRA": ("Conv2dGroups2", dict(target_modules=["conv2d"], use_dora=True)),
    "Conv3d 1": ("Conv3d", dict(target_modules=["conv3d"])),
    "Conv3d 2": ("Conv3d", dict(target_modules=["conv3d", "lin0"])),
    "Conv3d 1 DoRA": ("Conv3d", dict(target_modules=["conv3d"], use_dora=True)),
    "Conv3d 2 DoRA": ("Conv3d", dict(target_modules=["conv3d", "lin0"], use_dora=True)),
    "MLP bias": ("MLP", BOTH | dict(lora_bias=True, lora_alpha=32)),
    "Conv2d bias": ("Conv2d", dict(target_modules=["conv2d"], lora_bias=True, lora_alpha=32)),
    "Conv3d bias": ("Conv3d", dict(target_modules=["conv3d"], lora_bias=True, lora_alpha=32)),
    "MHA 1": ("MHA", dict(target_modules=["mha"])),
    "MHA 2": ("MHA", dict(target_modules=["mha", "lin0"])),
    "parameters 1": ("MlpUsingParameters", dict(target_modules=[], target_parameters=["lin0.weight"])),
    "parameters 2": ("MLP", LIN0 | dict(target_parameters=["lin1.weight"])),
    "MonteCLoRA": ("MLP", lambda: LIN0 | dict(monteclora_config=peft.MontecloraConfig(num_samples=2))),
}
# What is not computed here, by the field that asks for it; the message names it.
REFUSED = ("lora_bias", "kasa_config", "monteclora_config", "target_parameters")
# Adapters that are no change of the one weight: of all channels beside a kernel of groups, of a fused projection.
SHAPED = {
    "Conv2dGroups": "in [28] groups, of which PEFT's adapter has another form",
    "Conv2dGroups2": "in [28] groups, of which PEFT's adapter has another form",
    "MHA": "adapts no module of this model|holds .*mha",
}
DAY = ("MLP biases and saved", "MLP 5", "EmbConv1D 3", "Conv2d 2", "Conv3d 1 DoRA")


def twin(model):
    """Give a model's parameters as ours, and the table of their names."""
    params: dict = {}
    names: dict = {}
    for module, part in model.named_children():
        for leaf, array in part.named_parameters(recurse=False):
            array = array.detach().numpy()
            plain = isinstance(part, (transformers.pytorch_utils.Conv1D, OwnParameter))
            ours = {"weight": "embedding" if isinstance(part, nn.Embedding) else "kernel"}.get(leaf, leaf)
            if ours == "kernel" and not plain:
                array = np.moveaxis(array, (1, 0), (-2, -1))
            params.setdefault(module, {})[ours] = jnp.array(array)
            name = f"{module}.{leaf}"
            stays = (plain and leaf == "weight") or leaf == "in_proj_weight"
            names[f"{module}/{ours}"] = Weight(name, transposed=False) if stays else name
    return params, names


def outputs(model, x):
    with torch.no_grad():
        return model(torch.tensor(x, dtype=torch.long if x.dtype == np.int32 else None)).numpy()


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("case", [c if c in DAY else pytest.param(c, marks=pytest.mark.nightly) for c in CASES])
def test_a_case_of_pefts_gives_its_outputs_here_and_again_in_peft(case, tmp_path):
    kind, config = CASES[case]
    config = config() if callable(config) else config
    make, fn, x = MODELS[kind]
    torch.manual_seed(0)
    base = make().eval()
    params, names = twin(base)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn(weight.shape)
    theirs.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    reason = next((field for field in REFUSED if config.get(field)), SHAPED.get(kind))
    if reason:
        with pytest.raises(ValueError, match=reason) as caught:
            lora = rslora.wrap(fn, params, x, config=read_config(tmp_path / "theirs", params, names))
            load_peft(tmp_path / "theirs", lora, names)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        return
    want = outputs(theirs, x)
    assert np.abs(want - outputs(base, x)).max() > 1e-3 * np.abs(want).max()
    close(fn(params, x), outputs(base, x))
    lora = rslora.wrap(fn, params, x, config=read_config(tmp_path / "theirs", params, names))
    adapters, replaced = load_peft(tmp_path / "theirs", lora, names)
    close(lora.apply(replace(params, replaced), adapters, x), want)
    save_peft(tmp_path / "again", lora, adapters, names, task_type=None, replaced=replaced, params=params)
    back = rslora.wrap(fn, params, x, config=read_config(tmp_path / "again", params, names))
    assert back.sites == lora.sites
    jax.tree.map(np.testing.assert_array_equal, tuple(load_peft(tmp_path / "again", back, names)), (adapters, replaced))
    close(outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval(), x), want)


TRAINED = {
    "modules": ("MLP", "lin0/kernel", ["lin1/*"], ("none", ["lin1"])),
    "all biases": ("MLP", "lin0/kernel", ["*/bias"], ("all", None)),
    "biases of adapted ones": ("MLP", "lin0/kernel", ["lin0/bias"], ("lora_only", None)),
    "both": ("MLP", "lin0/kernel", ["lin0/bias", "lin1/*"], ("lora_only", ["lin1"])),
    "a bias alone": ("MLP", "lin0/kernel", ["lin1/bias"], ("none", ["lin1"])),
    "a kernel alone": ("Conv2d", "lin0/kernel", ["conv2d/kernel"], ("none", ["conv2d"])),
    "a table": ("EmbConv1D", "conv1d/kernel", ["emb/*"], ("none", ["emb"])),
    "nothing adapted": ("MLP", (), ["lin1/*"], "no weight has an adapter of a rank"),
    "some of the adapted ones": ("MLP", "*/kernel", ["lin0/bias"], "lin0.bias is trained and lin1.bias is not"),
}


@pytest.mark.parametrize("case", [c if c == "both" else pytest.param(c, marks=pytest.mark.nightly) for c in TRAINED])
def test_what_is_trained_whole_here_gives_its_outputs_in_peft(case, tmp_path):
    kind, targets, trained, wanted = TRAINED[case]
    make, fn, x = MODELS[kind]
    torch.manual_seed(0)
    base = make().eval()
    params, names = twin(base)
    config = rslora.LoraConfig(rank=3, alpha=7, targets=targets, trained=trained, allow_large_rank=True)
    lora = rslora.wrap(fn, params, x, config=config)
    rng = np.random.default_rng(0)
    fresh = lora.init(jax.random.key(0), params)
    adapters = jax.tree.map(lambda leaf: (leaf + 0.2 * rng.standard_normal(leaf.shape)).astype("float32"), fresh)
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            save_peft(tmp_path / "out", lora, adapters, names, task_type=None, params=params)
        return
    if case.endswith("alone"):
        with pytest.raises(ValueError, match=r"PEFT saves whole modules, and of (lin1|conv2d) its"):
            save_peft(tmp_path / "out", lora, adapters, names, task_type=None)
    save_peft(tmp_path / "out", lora, adapters, names, task_type=None, params=params)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["bias"], said["modules_to_save"]) == wanted
    want = np.asarray(lora.apply(params, adapters, x))
    close(outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval(), x), want)
    back = rslora.wrap(fn, params, x, config=read_config(tmp_path / "out", params, names))
    again = load_peft(tmp_path / "out", back, names)
    assert set(lora.sites) <= set(back.sites) and not again.replaced
    jax.tree.map(np.testing.assert_array_equal, {path: again.adapters[path] for path in lora.sites}, adapters)
    close(back.apply(params, again.adapters, x), want)
    with pytest.raises(ValueError, match=r"vLLM serves no weight that is trained whole"):
        save_peft(tmp_path / "vllm", lora, adapters, names, params=params, server="vllm")
