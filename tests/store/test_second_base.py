"""Nothing that a run does holds its base twice: bytes of a process, counted at their peak."""

import json
import os

import pytest

from tests.devices import run_on
from tests.interop import folders

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.by_day_on("newest"),
    pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells"),
]
WIDE = dict(vocab_size=64, hidden_size=768, intermediate_size=2048, num_attention_heads=12, head_dim=64)
WIDE |= {"num_key_value_heads": 12, "num_hidden_layers": 6}


def test_each_task_takes_a_part_of_the_base_at_most(tmp_path):
    folders.write(tmp_path / "small")
    folders.write(tmp_path / "large", folders.CONFIG | WIDE)
    found = json.loads(run_on(1, "tests.store.second_base", str(tmp_path)).splitlines()[-1])
    held, took = found["held"], found["took"]
    print(found)
    assert held > 150e6
    assert took.pop("load") < 1.5 * held  # itself among it
    for task, most in took.items():
        assert most < 0.4 * held, (task, most, held)
