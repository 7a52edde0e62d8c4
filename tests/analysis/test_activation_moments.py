"""The script that measures how large adapters' outputs are along a run."""

import csv
import json
import math
from pathlib import Path

import pytest

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import activation_moments

    return activation_moments


def test_the_first_step_of_adam_gives_outputs_in_proportion_to_gamma(script, tmp_path, capsys):
    """It moves every entry of B by the rate, whatever the gradient's size, and A by nothing: B was zero."""
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{n}+{n}=", "completion": f"{2 * n}"}) for n in range(40)))
    options = f"--model tiny --steps 2 --every 2 --ranks 7 --max-len 24 --data {data} --out {tmp_path}".split()
    assert script.main([*options, "--learning-rate", "1e-3"]) == 0
    said = capsys.readouterr().out
    assert "run 2 of 2, LoRA of rank 7, step 2/2: loss " in said and "about 0:00 left" in said
    rows = list(csv.DictReader((tmp_path / "activations.csv").open()))
    assert [(row["scaling"], row["step"]) for row in rows] == [
        (scaling, step) for scaling in ("rslora", "lora") for step in ("1", "2")
    ]
    for key, power in (("mean", 0.5), ("square", 1.0), ("largest", 0.5)):
        assert float(rows[0][key]) / float(rows[2][key]) == pytest.approx(7**power, rel=0.02)  # a layer feeds the next
    assert all(float(row["mean"]) <= math.sqrt(float(row["square"])) for row in rows)  # Jensen
    assert (tmp_path / "activations.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        script.main(["--ranks", "0"])
    assert "--ranks are to be at least 1" in capsys.readouterr().err


def test_the_claim_is_judged_by_the_largest_mean_of_each_run(script):
    from paper import claims

    def verdict(*means):
        rows = [{"scaling": "rslora", "rank": "7", "step": f"{n}", "mean": f"{m}"} for n, m in enumerate(means, 1)]
        return claims.moments(rows)

    assert verdict(0.1, 0.3, 0.2).verdict == "small: yes, and stable, of one seed"
    assert verdict(0.1, 0.2, 0.4).verdict == "small: yes; stable: still growing at the end, of one seed"
    assert "after 3 steps: rsLoRA's 0.2 at r = 7" in verdict(0.1, 0.3, 0.2).measured
    assert "at most 1.50 times" in verdict(0.1, 0.3, 0.2).measured
    assert verdict(0.1, 0.5, 0.2).verdict == verdict(0.1, 1.1).verdict == "no, of one seed"
    assert claims.moments([]).measured == claims.UNMEASURED


def test_the_time_left_knows_what_a_rank_costs(script):
    import jax.numpy as jnp

    import rslora_jax as rslora

    variables = {"w": jnp.ones((8, 12)), "bias": jnp.ones(4)}
    config = rslora.LoraConfig(rank=3, alpha=7, targets=["w"])
    lora = rslora.wrap(lambda p, x: x @ p["w"], variables, jnp.ones((2, 8)), config=config)
    # A rank is 8 + 12 numbers at 6 operations, the base 100 at 4.
    assert script.cost_of_a_rank(lora, 3, variables) == pytest.approx(20 * 6 / (100 * 4))
