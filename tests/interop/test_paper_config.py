"""The paper's experiment as a config file, on a tiny random Llama and 32 made-up examples; files that are refused."""

import json

import pytest

from rslora_jax.cli import main
from rslora_jax.store import checkpoint

pytestmark = pytest.mark.by_day_on("newest")

PAPER = "configs/rslora_paper.toml"


@pytest.fixture
def small(tiny, tmp_path):
    """The flags that make the experiment a small one."""
    model, data = tiny.write(tmp_path / "tiny.gguf"), tmp_path / "made-up.jsonl"
    lines = [{"prompt": "hi " * n + "1 2", "completion": "hi!" if n % 2 else "a 2 hi"} for n in range(32)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {"model": model, "data": data, "rank": 6, "steps": 3, "batch-size": 4, "heldout": 2, "eval-every": 2}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def test_the_papers_experiment_runs(small, compile_fast, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", "--config", PAPER, *small, "--out", out]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    settings = checkpoint.load_about(out)["settings"]
    want = {"alpha": 16.0, "optimizer": "adamw", "schedule": "constant", "learning_rate": 5e-5, "warmup": 0.0}
    want |= {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full", "max_len": 512, "rank": 6, "steps": 3}
    assert {name: settings[name] for name in want} == want
    config, adapters = checkpoint.load_adapters(out)
    assert (config.rank, config.alpha, config.scaling) == (6, 16.0, "rslora")
    assert len(adapters) == 7 and {leaf.dtype.name for pair in adapters.values() for leaf in pair.values()} == {
        "float32"
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak = 3", "bad.toml has rnak, which is no flag of `rslora train`; did you mean rank?"),
        ("resume = true", "bad.toml has resume, which is no flag"),
        ('rank = "3"', "bad.toml: rank = '3' is not of the kind that --rank takes"),
        ("alpha = true", "alpha = True is not of the kind"),
        ("rank = ", "bad.toml cannot be read as TOML"),
        ("rank = 0", "rank = 0: argument --rank: 0 is not a whole number of at least 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(text, said, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(text + "\n")
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
