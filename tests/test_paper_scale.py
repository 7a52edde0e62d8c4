"""The parts of scripts/paper_scale.py that need no TPU compiler: counts of programs, and the 7B as shapes."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from rslora_jax.models.configs import LLAMA2_7B
from rslora_jax.models.decoder import DecoderConfig
from rslora_jax.parallel import sharding

pytestmark = pytest.mark.by_day_on("newest")

SCRIPTS = Path(__file__).parent.parent / "scripts"
DOCS = SCRIPTS.parent / "docs" / "scale"
PAPER = "Llama 2 7B"
SMALL = DecoderConfig(
    vocab_size=40,
    width=16,
    mlp_width=24,
    num_layers=5,
    num_heads=2,
    num_kv_heads=2,
    tie_head=False,
    scan_layers=True,
    remat="full",
    param_dtype="bfloat16",
)


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import paper_scale
    from benchmarks import hlo, scale

    return hlo, scale, paper_scale


def seven_billion(scale, rank, axes, **changes):
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return scale.Job(dataclasses.replace(LLAMA2_7B, remat="full"), mesh, rank, 32, 512, **changes)


def test_the_7b_is_wrapped_as_shapes_with_its_adapters(parts):
    _, scale, _ = parts
    job = seven_billion(scale, 64, {"fsdp": 16})
    per_rank = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # q, k, v, o; gate, up, down
    assert len(job.lora.sites) == 7 and job.lora.num_parameters == 64 * per_rank == 159_907_840


def test_what_lies_on_a_device_is_the_count_by_hand(parts):
    _, scale, _ = parts
    whole = 6_738_415_616 * 2 + 3 * 4 * 2048 * 32 * (4 * 8192 + 3 * 15104)  # the base, adapters and two moments
    one = seven_billion(scale, 2048, {"fsdp": 1})
    assert (
        scale.bytes_on_a_device((one.params, one.state)) == whole + 4 + 4 + 4 + 1
    )  # step, Adam's count, skipped, finite
    # Along the rank too, all but the 65 norms of 4096 is split evenly.
    split = seven_billion(scale, 2048, {"fsdp": 4, "tensor": 4}, split_rank=True)
    norms = 65 * 4096 * 2
    assert scale.bytes_on_a_device((split.params, split.state)) == (whole - norms) // 16 + norms + 13
    # As the weights lie, an A that is split over fsdp is whole over tensor.
    kept = seven_billion(scale, 2048, {"fsdp": 4, "tensor": 4})
    adapters = scale.bytes_on_a_device(kept.state.adapters)
    assert adapters == 4 * scale.bytes_on_a_device(split.state.adapters)


@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.nightly)])
def test_the_flops_of_a_scanned_step_are_the_count_by_hand(parts, compile_fast, remat):
    hlo, scale, _ = parts
    mesh = sharding.make_mesh("fsdp=1", jax.devices()[:1])
    job = scale.Job(dataclasses.replace(SMALL, remat=remat), mesh, rank=3, rows=2, length=8)
    compiled = job.train_step().compile()
    counts, (_, by_hand) = hlo.count(compiled.as_text()), job.flops()
    assert counts.flops == by_hand
    assert counts.flops_once < counts.flops / 3  # five layers, counted once
    assert counts.collectives == ()


@pytest.mark.parametrize("base", ["nf4", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_a_step_over_a_base_in_few_bits_is_lowered_and_counted(parts, compile_fast, monkeypatch, base):
    hlo, scale, paper_scale = parts
    tiny = dataclasses.replace(SMALL, width=64, mlp_width=128, num_layers=3, num_kv_heads=1, head_dim=32, max_len=4096)
    monkeypatch.setitem(paper_scale.MODELS, "tiny", tiny)
    case = paper_scale.Case("", "fsdp=1", 3, model="tiny", base=base, rows=1, length=2048, attention="chunked")
    job = paper_scale.make_job(case, devices=jax.devices()[:1])
    # q and o (64, 64), k and v (64, 32), three of (64, 128); NF4: a scale of 8 bits for 64 numbers, and for each matrix
    # one of 32 bits for 256 of these, and a mean.
    numbers = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    nested = 3 * 4 * (7 * 1 + 7)
    packed = numbers // 2 + numbers // 64 + nested if base == "nf4" else 2 * numbers
    assert scale.bytes_on_a_device(job.params) == packed + 2 * (2 * 40 * 64 + 7 * 64)
    counts = hlo.count(job.train_step().compile().as_text())
    assert counts.flops == job.flops()[1]
    assert counts.collectives == ()


def test_a_run_can_go_on_and_name_what_it_compiles(parts, tmp_path):
    _, _, paper_scale = parts

    def chosen(*words):
        return paper_scale.chosen(paper_scale.parser().parse_args([*words, "--out", str(tmp_path)]))

    assert chosen() == list(paper_scale.CASES)
    eight = chosen("--models", "Llama 3.1 8B", "--bases", "nf4")
    assert {(c.model, c.base, c.mesh) for c in eight} == {("Llama 3.1 8B", "nf4", "fsdp=1")}
    assert {case.length for case in eight} == {2048, 4096}
    (long,) = chosen("--models", "Llama 3.1 8B", "--attention", "xla", "--ranks", "64")[1:]
    assert (long.length, long.attention, long.topology) == (8192, "xla", "v5e:2x4")
    (one,) = chosen("--topology", "v5e:4x4", "--ranks", "8", "--models", "Llama 3.3 70B", "--length", "64")
    assert (one.rank, one.model, one.base, one.length) == (8, "Llama 3.3 70B", "bfloat16", 64)
    first, second = (r for r in paper_scale.scale_report.read_csv(DOCS / "scale.csv")[:2])
    paper_scale.scale_report.merge_csv(tmp_path / "scale.csv", [second, first], paper_scale.ORDER)
    rest = chosen("--missing")
    assert [paper_scale.key(c) for c in rest] == paper_scale.ORDER[2:]
    again = dataclasses.replace(first, compile_s=1.0)
    assert paper_scale.scale_report.merge_csv(tmp_path / "scale.csv", [again], paper_scale.ORDER) == [again, second]


def test_a_loop_that_xla_says_nothing_of_is_counted_by_its_counter(parts):
    hlo, _, _ = parts
    text = """
        %body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
          %p = (s32[], f32[4,8]{1,0}) parameter(0)
          %i = s32[] get-tuple-element(%p), index=0
          %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
          %two = s32[] constant(2)
          %next = s32[] add(%i, %two)
          %w = f32[8,8]{1,0} constant({...})
          %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
          ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%next, %y)
        }

        %condition (q: (s32[], f32[4,8])) -> pred[] {
          %q = (s32[], f32[4,8]{1,0}) parameter(0)
          %j = s32[] get-tuple-element(%q), index=0
          %end = s32[] constant(8)
          ROOT %less = pred[] compare(%j, %end), direction=LT
        }

        ENTRY %main (a: f32[4,8]) -> (s32[], f32[4,8]) {
          %a = f32[4,8]{1,0} parameter(0)
          %one = s32[] constant(1)
          %begin = s32[] copy(%one)
          %start = (s32[], f32[4,8]{1,0}) tuple(%begin, %a)
          ROOT %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body
        }
    """
    counts = hlo.count(textwrap.dedent(text))
    assert (counts.flops, counts.flops_once) == (4 * 2 * 4 * 8 * 8, 2 * 4 * 8 * 8)  # at 1, 3, 5, 7
    with pytest.raises(ValueError, match="the loop loop does not say how often it turns"):
        hlo.count(textwrap.dedent(text).replace("constant(2)", "parameter(1)"))


@pytest.mark.parametrize("stride, dilate, pad", [(1, 1, (2, 2)), (2, 1, (1, 0)), (3, 4, (2, 3)), (5, 6, (0, 0))])
def test_the_flops_of_a_convolution_are_xlas(parts, stride, dilate, pad):
    hlo, _, _ = parts
    x, w = jnp.ones((2, 7, 3)), jnp.ones((5, 3, 4))
    conv = jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (stride,), [pad], (dilate,), dimension_numbers=("NWC", "WIO", "NWC")
        )
    )
    lowered = conv.lower(x, w)
    out = jax.eval_shape(conv, x, w).shape
    rest = (
        f"%x, %w), window={{size=5 stride={stride} pad={pad[0]}_{pad[1]} lhs_dilate={dilate}}}, dim_labels=b0f_0io->b0f"
    )
    assert hlo.convolution_flops(rest, x.shape, w.shape, out) == lowered.cost_analysis()["flops"]


PROGRAM = """
    import json, jax, jax.numpy as jnp
    from jax.sharding import PartitionSpec as P
    from benchmarks import hlo
    from rslora_jax.parallel.sharding import make_mesh

    mesh = make_mesh("fsdp=4")
    def layers(x, ws):
        def layer(x, w):
            return jax.lax.psum(x @ jax.lax.all_gather(w, "fsdp", tiled=True), "fsdp"), None
        return jax.lax.scan(layer, x, ws)[0]
    mapped = jax.jit(jax.shard_map(layers, mesh=mesh, in_specs=(P(), P(None, "fsdp")), out_specs=P(), check_vma=False))
    text = mapped.lower(jnp.ones((3, 8)), jnp.ones((6, 8, 8))).compile().as_text()
    print(json.dumps([[c.kind, c.shapes[0][1], c.times, c.bytes] for c in hlo.count(text).collectives]))
"""


def test_collectives_in_a_loop_are_counted_as_often_as_it_turns():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = sorted(json.loads(done.stdout.splitlines()[-1]))
    assert found == [["all-gather", [8, 8], 6, 6 * 8 * 8 * 4], ["all-reduce", [3, 8], 6, 6 * 3 * 8 * 4]]


def test_a_gathered_weight_is_told_from_gathered_activations(parts):
    hlo, scale, paper_scale = parts
    params = seven_billion(scale, 64, {"fsdp": 4, "tensor": 4}).params

    def gathers(*sizes):
        return hlo.Counts(0, 0, (hlo.Collective("all-gather", (("bf16", sizes),), 2),))

    for weight in [(32, 4096, 11008), (32, 4096, 2752), (1, 4096, 2752), (4096, 4096), (32000, 1024)]:
        assert paper_scale.weight_gathers(gathers(*weight), params) == 2 * 2 * math.prod(weight)
    for other in [(32, 512, 4096), (8, 512, 11008), (4096, 64), (32, 512, 2752)]:
        assert paper_scale.weight_gathers(gathers(*other), params) == 0


def test_what_is_not_as_it_must_be_is_said(parts):
    _, _, paper_scale = parts
    case = paper_scale.Case("v5e:4x4", "fsdp=16", 64, fits=True)
    good = next(
        r
        for r in paper_scale.scale_report.read_csv(DOCS / "scale.csv")
        if r.flops and r.base_moved_bytes and r.rank == 64
    )
    assert paper_scale.wrong(case, good) == []
    for change, complaint in [
        ({"flops": None, "total_bytes": None, "complaint": "needs 9GiB"}, "said to fit and does not: needs 9GiB"),
        ({"total_bytes": good.memory_bytes + 1}, "on a device of"),
        ({"weights_gathered": good.base_weights_gathered + 8}, "of base weights that the base alone does not"),
        ({"moved_bytes": good.base_moved_bytes + 13 * 10**9}, "moves 13.000 GB beside the base alone"),
    ]:
        (found,) = paper_scale.wrong(case, dataclasses.replace(good, **change))
        assert complaint in found


def test_the_page_shows_the_table_that_the_file_holds(parts):
    _, _, paper_scale = parts
    rows = paper_scale.scale_report.read_csv(DOCS / "scale.csv")
    assert {row.key for row in rows} >= set(paper_scale.ORDER)
    page = (DOCS / "README.md").read_text()
    report = paper_scale.scale_report
    for section in (PAPER, report.LONG, report.BITS, report.KEPT):
        assert len(report.table(rows, section)[1]) > 5 and report.markdown(rows, section) in page
    for row in rows:
        # What compiles fits; what a step needs is what lies there and what the compiler adds.
        assert (row.total_bytes is None) == bool(row.complaint)
        assert row.flops is None or row.total_bytes is not None
        assert (row.kernel_flops > 0) == (row.attention == "pallas")
        assert re.fullmatch(r"[\w.,=]+", row.mesh) and row.argument_bytes > 0
        if row.total_bytes is not None:
            assert row.argument_bytes < row.total_bytes <= row.memory_bytes
