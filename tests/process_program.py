"""Train the tiny model in several processes, each with a device or more; every process prints what it found.

python -m tests.process_program PORT PROCESSES PROCESS FOLDER STEPS MESH [resume] [stop-at-step]
"""

import faulthandler
import json
import os
import signal
import sys
import time

import jax
import numpy as np


def main() -> None:
    faulthandler.dump_traceback_later(120, exit=True)
    port, count, index, folder, steps, mesh_text, *rest = sys.argv[1:]
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    from rslora_jax import train
    from rslora_jax.models.decoder import SHARDING_RULES
    from rslora_jax.parallel import sharding
    from tests.train.tiny import Run

    run = Run()
    mesh = sharding.make_mesh(mesh_text)
    run.params = jax.device_put(run.params, sharding.param_shardings(run.params, mesh, SHARDING_RULES))
    run.adapters = jax.device_put(run.adapters, sharding.adapter_shardings(run.lora.sites, run.params))
    where = sharding.batch_sharding(mesh, 4)
    share = sharding.process_rows(where, 4)
    stop = next((int(word) for word in rest if word.isdigit()), None)

    class Batches:
        def __getitem__(self, n):
            if n == stop and int(index) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop is not None and n > stop:
                time.sleep(1.0)  # a signal takes its time to reach the others
            return jax.tree.map(lambda rows: rows[share], run.batches[n])

    held = train.heldout_batches(run.held, batch_size=4)
    result = run.fit(
        folder,
        int(steps),
        batches=Batches(),
        heldout=[jax.tree.map(lambda rows: rows[share], batch) for batch in held],
        batch_sharding=where,
        resume="resume" in rest,
        show="show" in rest,
    )
    whole = jax.jit(lambda tree: tree, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    found = {
        "process": jax.process_index(),
        "devices": jax.device_count(),
        "rows": [share.start, share.stop],
        "step": result.step,
        "signal": result.signal,
        "losses": [r["loss"] for r in result.records if "loss" in r],
        "heldout": list(result.heldout.values()),
        "adapters": [np.ravel(x).tolist() for x in jax.tree.leaves(whole(result.adapters))],
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
