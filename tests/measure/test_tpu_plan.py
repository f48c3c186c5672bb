"""Plans for TPUs: names, XLA's text, the rule of what fits, rows that are not compiled twice."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dmf import data, sharding
from dmf.config import parse
from dmf.data import DataConfig
from dmf.errors import DmfError
from dmf.measure import hlo, roofline, topologies, tpu_plan
from tests import GOLDEN, ROOT
from tests.tiny import TINY, merged

# XLA's words for a TPU, shortened by hand. A loop of 28 rounds gathers a weight beside other work,
# as one chain in three fusions, and scatters the sum of a gradient.
# Around it are a sum over groups of four, a gather with start and end apart, and a permutation.
TEXT = (GOLDEN / "tpu_step.hlo").read_text()
FUSED = """\
%less.1 (x.8: s32[], y.8: s32[]) -> pred[] {
  %x.8 = s32[]{:T(128)} parameter(0)
  %y.8 = s32[]{:T(128)} parameter(1)
  ROOT %lt.8 = pred[]{:T(512)} compare(%x.8, %y.8), direction=LT
}

"""
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed (pip install "jax[tpu]")',
)


def test_collectives_are_counted_as_often_as_their_loop_runs_with_the_bytes_of_a_ring():
    module = hlo.parse(TEXT)
    found = {kind: (moved.count, moved.bytes) for kind, moved in hlo.collectives(module, 8).items()}
    piece, whole = 8 * 128 * 2, 64 * 128 * 4
    assert found == {
        "all-gather": (28 + 1, 29 * 7 * piece),  # the chain of two fusions is one gather
        "all-reduce": (1, 2 * 3 / 4 * whole),
        "collective-permute": (1, piece),
        "reduce-scatter": (28, 28 * 7 / 8 * whole),
    }


def test_the_rounds_of_a_loop_are_read_from_its_condition_or_from_what_xla_notes():
    def rounds(text):
        module = hlo.parse(text)
        (loop,) = [(where, i) for where, i, _ in hlo.walk(module) if i.opcode == "while"]
        return hlo.trips(module, loop[1], loop[0])

    assert rounds(TEXT) == 28
    assert (
        rounds(
            TEXT.replace(
                "%start.2 = s32[]{:T(128)} constant(0)", "%start.2 = s32[]{:T(128)} constant(3)"
            )
        )
        == 25
    )
    noted = 'body=%body.1, backend_config={"known_trip_count":{"n":"7"}}'
    assert rounds(TEXT.replace("body=%body.1", noted)) == 7
    # As a fusion of the comparison, with the bound given to it or within it.
    given = "fusion(%i.2, %bound.1), kind=kLoop, calls=%less.1"
    assert rounds(FUSED + TEXT.replace("compare(%i.2, %bound.1), direction=LT", given)) == 28
    within = FUSED.replace("parameter(1)", "constant(9)")
    assert rounds(within + TEXT.replace("compare(%i.2, %bound.1), direction=LT", given)) == 9
    other = FUSED.replace("compare(%x.8", "compare(%z.8").replace(
        "  ROOT", "  %z.8 = s32[] add(%x.8, %y.8)\n  ROOT"
    )
    assert rounds(other + TEXT.replace("compare(%i.2, %bound.1), direction=LT", given)) is None
    unknown = TEXT.replace("constant(28)", "parameter(1)")
    assert rounds(unknown) is None
    assert hlo.collectives(hlo.parse(unknown), 8)["reduce-scatter"].count == 1


@pytest.mark.parametrize("lost", [", body=%body.1", "%body.1 ("])
def test_a_loop_whose_body_the_text_lacks_ends(lost):
    module = hlo.parse(TEXT.replace(lost, "" if lost.startswith(",") else "%elsewhere ("))
    assert hlo.collectives(module, 8)["all-gather"].count == 1  # the one beside the loop


def test_collectives_of_a_program_that_was_really_compiled(rng):
    # XLA's text for this machine: five rounds of a sum over eight devices, 3 x 4 float32.
    mesh = sharding.make_mesh()

    def five(x):
        # Without the square, XLA would take the sum out of the loop: no round would change it.
        return jax.lax.scan(
            lambda c, _: (jax.lax.psum(c, mesh.axis_names) ** 2, None), x, None, length=5
        )[0]

    program = jax.jit(
        jax.shard_map(
            five, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
    )
    module = hlo.parse(program.lower(jnp.ones((3, 4))).compile().as_text())
    assert hlo.collectives(module, 8) == {"all-reduce": hlo.Moved(5, 5 * 2 * 7 / 8 * 48)}


def test_sizes_with_and_without_the_padding_of_tiles():
    assert hlo.size("bf16[8,128]{1,0}") == 2048
    assert hlo.size("(f32[3], s8[5]{0}, pred[2,2])") == 12 + 5 + 4
    assert hlo.size("u32[]") == 4 and hlo.size("token[]") == 0 and hlo.size("s4[6]") == 3
    assert hlo.size("(opaque[], bf16[2])") == 4 and hlo.size("f8e4m3fn[5]") == 5
    assert hlo.occupied("f32[64,72]{1,0:T(8,128)}") == 64 * 128 * 4
    assert hlo.occupied("f32[64,72]{0,1:T(8,128)}") == 72 * 128 * 4  # 64 is the minor axis here
    assert hlo.occupied("f32[3]{0:T(512)}") == 2048 and hlo.occupied("f32[]{:T(128)}") == 512
    assert hlo.occupied("f32[64,72]{1,0:T(8,128)S(1)}") == 0
    assert hlo.occupied("f32[64,72]{1,0:T(8,128)S(1)}", main_memory=False) == 64 * 128 * 4


def test_of_what_a_fusion_slices_or_updates_in_place_only_the_part_is_moved():
    text = """\
%sliced (p.0: f32[28,8,128], p.1: s32[], p.2: f32[8,128]) -> f32[8,128] {
  %p.0 = f32[28,8,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[8,128]{1,0:S(1)} parameter(2)
  %one = f32[1,8,128]{2,1,0} dynamic-slice(%p.0, %p.1, %p.1, %p.1), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0} bitcast(%one)
  ROOT %sum = f32[8,128]{1,0} add(%flat, %p.2)
}

%updated (p.3: f32[28,8,128], p.4: f32[1,8,128], p.5: s32[]) -> f32[28,8,128] {
  %p.3 = f32[28,8,128]{2,1,0} parameter(0)
  %p.4 = f32[1,8,128]{2,1,0} parameter(1)
  %p.5 = s32[] parameter(2)
  ROOT %put = f32[28,8,128]{2,1,0} dynamic-update-slice(%p.3, %p.4, %p.5, %p.5, %p.5)
}

ENTRY %main (a: f32[28,8,128], b: s32[], c: f32[1,8,128]) -> f32[28,8,128] {
  %a = f32[28,8,128]{2,1,0} parameter(0)
  %b = s32[]{:S(6)} parameter(1)
  %c = f32[1,8,128]{2,1,0} parameter(2)
  %near = f32[8,128]{1,0:S(1)} bitcast(%c)
  %fusion.1 = f32[8,128]{1,0} fusion(%a, %b, %near), kind=kLoop, calls=%sliced
  ROOT %fusion.2 = f32[28,8,128]{2,1,0} fusion(%a, %c, %b), kind=kLoop, calls=%updated
}
"""
    piece = 8 * 128 * 4
    nested = """
%outer (p.6: f32[28,8,128], p.7: s32[], p.8: f32[8,128]) -> f32[8,128] {
  %p.6 = f32[28,8,128]{2,1,0} parameter(0)
  %p.7 = s32[] parameter(1)
  %p.8 = f32[8,128]{1,0:S(1)} parameter(2)
  ROOT %fusion.3 = f32[8,128]{1,0} fusion(%p.6, %p.7, %p.8), kind=kLoop, calls=%sliced
}

ENTRY"""
    within = text.replace("\nENTRY", nested).replace(
        "calls=%sliced\n  ROOT %fusion.2", "calls=%outer\n  ROOT %fusion.2"
    )
    assert "calls=%outer" in within and hlo.traffic(hlo.parse(within)) == 5 * piece
    # The slice and the sum. The update is read, read again, and written.
    assert hlo.traffic(hlo.parse(text)) == 2 * piece + 3 * piece
    assert hlo.traffic(hlo.parse(text), main_memory=False) == 5 * piece + piece + 2 * 4


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("v4-32", "v4:2x2x4"),
        ("v4-8", "v4:2x2x1"),
        ("v5e-16", "v5e:4x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v6e-8", "v6e:2x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v3-32", "v3:4x4"),
        ("v5e:4x8", "v5e:4x8"),
    ],
)
def test_cloud_names_count_cores_up_to_v5p_and_chips_from_v5e(given, found):
    assert topologies.libtpu_name(given) == found


@pytest.mark.parametrize(
    "name",
    ["v4-33", "v4-4", "v5e-12", "v9-8", "v5e", "", "v5e:4", "v9:2x2", "tpu:4x4", "v4:2x2x", "-"],
)
def test_an_unknown_topology_is_refused_with_those_that_are_known(name):
    with pytest.raises(DmfError, match=r"--topology=.*expected"):
        topologies.libtpu_name(name)


def test_what_the_compiler_says_of_too_much_memory():
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (57.30G) exceeds "
        "available HBM (15.75G)."
    )
    assert tpu_plan.verdict(temporaries) == {
        "fits": False,
        "total_bytes": round(57.3 * 2**30),
        "hbm_bytes": round(15.75 * 2**30),
    }
    used = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
        "Used 35.76G of 15.75G hbm. Exceeded hbm capacity by 20.01G."
    )
    assert tpu_plan.verdict(used) == {
        "fits": False,
        "total_bytes": round(35.76 * 2**30),
        "hbm_bytes": round(15.75 * 2**30),
    }
    assert tpu_plan.verdict("RESOURCE_EXHAUSTED: no figures") == {
        "fits": False,
        "total_bytes": None,
        "hbm_bytes": None,
    }
    assert tpu_plan.verdict("INVALID_ARGUMENT: Used 1G of 2G") is None


def stand_in(temporary):
    """A stand-in for a compiled program, with invented figures."""
    memory = SimpleNamespace(
        argument_size_in_bytes=2**29,
        output_size_in_bytes=2**29 + 2**10,
        alias_size_in_bytes=2**29,
        temp_size_in_bytes=temporary,
        generated_code_size_in_bytes=2**20,
    )
    return SimpleNamespace(
        memory_analysis=lambda: memory,
        as_text=lambda: TEXT,
        cost_analysis=lambda: {"flops": 3.0, "bytes accessed": 5.0},
    )


def test_a_program_fits_up_to_the_last_byte_of_what_the_compiler_may_use():
    room = 2**30 - 2**29 - 2**20 - 2**10
    full, over = (tpu_plan.measure(stand_in(n), 8, 1.0) for n in (room, room + 1))
    assert full["total_bytes"] == full["hbm_bytes"] == 2**30 and full["fits"] and not over["fits"]
    # XLA counts the loop's bytes once, so there is no figure.
    assert full["xla_bytes"] is None and full["loops"] == [28]
    assert full["collectives"]["reduce-scatter"]["count"] == 28


@pytest.fixture
def compiled(monkeypatch):
    """The kinds that are compiled. Fake devices of this machine replace those of a TPU."""
    seen = []

    def compile_(config, mesh, stage, shape, hbm_gib):
        seen.append(stage.kind)
        return tpu_plan.measure(stand_in(2**20 * len(seen)), mesh.devices.size, hbm_gib) | {
            "compile_s": 1.0
        }

    monkeypatch.setattr(topologies, "prepare", lambda: None)
    monkeypatch.setattr(topologies, "libtpu_version", lambda: "0.0")
    monkeypatch.setattr(topologies, "devices", lambda given, target: jax.devices())
    monkeypatch.setattr(tpu_plan, "_compile", compile_)
    return seen


def test_a_row_that_is_in_the_file_is_not_compiled_again(compiled, tmp_path, capsys):
    out, config = str(tmp_path / "plan.json"), parse(TINY)
    first = tpu_plan.plan(config, ["v5e-8"], out, "tiny")
    assert compiled == ["flow", "all_pairs", "discrete", "jvp", "jvp"]  # the last of all rows
    again = tpu_plan.plan(
        parse(merged(TINY, run=dict(log_every_steps=7), seed=5)), ["v5e-8"], out, "another name"
    )
    assert len(compiled) == 5 and again == first == tpu_plan.read(out)
    tpu_plan.plan(config, ["v4-32"], out)
    tpu_plan.plan(parse(merged(TINY, batch_size=64, microbatches=2)), ["v5e-8"], out)
    tpu_plan.plan(parse(merged(TINY, mesh=dict(fsdp=8))), ["v5e-8"], out)
    tpu_plan.plan(parse(merged(TINY, network=dict(width=64))), ["v5e-8"], out)
    assert len(compiled) == 25 == len(tpu_plan.read(out))
    text = capsys.readouterr().out
    assert text.count("topology") == 12 and "reduce-scatter 28" in text and "1x8" in text


def test_auto_is_planned_in_every_layout_that_makes_another_program(compiled, capsys):
    rows = tpu_plan.plan(parse(merged(TINY, rows="auto")), ["v5e-8"])
    learners = [("discrete", "split"), ("jvp", "split"), ("jvp", "joint")]
    learners += [("discrete", "whole"), ("jvp", "whole")]  # the last one is the official step
    found = [(row["kind"], row["rows"]) for row in rows]
    assert found == [("flow", "split"), ("all_pairs", "split"), *learners]
    assert "rows = auto takes split on v5e:2x4: by the roofline" in capsys.readouterr().out


def test_rows_are_on_disk_as_soon_as_they_are_known(compiled, tmp_path, monkeypatch):
    out, whole = tmp_path / "plan.json", tpu_plan._compile

    def stops_at_the_third(config, mesh, stage, *rest):
        if stage.kind == "discrete":
            raise KeyboardInterrupt
        return whole(config, mesh, stage, *rest)

    monkeypatch.setattr(tpu_plan, "_compile", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tpu_plan.plan(parse(TINY), ["v5e-8"], str(out))
    assert [row["kind"] for row in tpu_plan.read(str(out))] == ["flow", "all_pairs"]
    monkeypatch.setattr(tpu_plan, "_compile", whole)
    tpu_plan.plan(parse(TINY), ["v5e-8"], str(out))
    assert compiled == ["flow", "all_pairs", "discrete", "jvp", "jvp"]


def test_stored_rows_are_found_by_the_names_and_fields_of_today():
    rows = tpu_plan.read(str(ROOT / "docs" / "tpu_plan.json"))
    assert {row["kind"] for row in rows} == {"all_pairs", "discrete", "jvp"}
    for name in ("cifar10", "imagenet256"):
        path = ROOT / "configs" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = {row["program"] for row in rows if row["config"] == f"configs/{name}.py"}
        assert found == {tpu_plan._digest(parse(module.get_config()))}
    other = merged(TINY, optimizer=dict(b2=0.9))
    assert tpu_plan._digest(parse(other)) != tpu_plan._digest(parse(TINY))


def test_model_flops_are_the_passes_of_the_stage_times_the_plain_forward_pass(compiled):
    flow, trajectory, discrete, jvp, official = (
        row["model_flops"] for row in tpu_plan.plan(parse(TINY), ["v5e-8"])
    )
    assert official / flow == pytest.approx(4 / 3, rel=1e-12)
    assert flow == trajectory and discrete == jvp
    assert discrete / flow == pytest.approx((3 + 0.75) / 3, rel=1e-12)
    remat = tpu_plan.plan(parse(merged(TINY, remat="blocks", scan_blocks=True)), ["v5e-8"])
    assert remat[0]["model_flops"] == flow


def test_the_figures_are_explained_and_a_loop_of_unknown_length_is_marked(compiled, capsys):
    rows = tpu_plan.plan(parse(TINY), ["v5e-8"])
    text = capsys.readouterr().out
    assert tpu_plan.LEGEND in text and "*" not in text
    assert text.endswith(roofline.LEGEND + "\n")
    rows[1]["loops"] = [3, None]
    lines = tpu_plan.format_rows(rows).splitlines()
    assert ["*" in line for line in lines] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ] and " all_pairs* " in lines[2]
    assert (
        len({line.index("all-gather") for line in lines[1:]}) == 1
    )  # the columns stay where they are
    assert tpu_plan.legend(rows) == f"{tpu_plan.LEGEND}\n{tpu_plan.UNKNOWN}"


@pytest.mark.parametrize(
    "error",
    [NotImplementedError, jax.errors.JaxRuntimeError, type("MosaicError", (Exception,), {})],
)
@pytest.mark.parametrize("stage", ["lower", "compile"])
def test_what_the_compilers_refuse_is_one_line(monkeypatch, error, stage):
    def refuse(*_):
        raise error("no such\nkernel")

    lowered = SimpleNamespace(compile=refuse)
    monkeypatch.setattr(tpu_plan, "lower", refuse if stage == "lower" else lambda *_: lowered)
    with pytest.raises(
        DmfError, match="^the flow step does not compile: no such kernel; expected other attention"
    ):
        tpu_plan._compile(
            parse(TINY), sharding.make_mesh(), SimpleNamespace(kind="flow"), (8, 8, 1), 1.0
        )


def test_what_is_our_own_fault_is_not_laid_on_the_compiler(monkeypatch):
    def fault(*_):
        raise KeyError("x")

    monkeypatch.setattr(tpu_plan, "lower", fault)
    with pytest.raises(KeyError):
        tpu_plan._compile(
            parse(TINY), sharding.make_mesh(), SimpleNamespace(kind="flow"), (8, 8, 1), 1.0
        )


def test_seconds_of_compilation_are_of_nothing_else(monkeypatch):
    clock = iter([0.0, 10.0, 13.0])  # before lowering, before and after compiling
    monkeypatch.setattr(tpu_plan.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(tpu_plan, "lower", lambda *_: SimpleNamespace(compile=lambda: stand_in(0)))
    row = tpu_plan._compile(
        parse(TINY), sharding.make_mesh(), SimpleNamespace(kind="flow"), (8, 8, 1), 1.0
    )
    assert row["compile_s"] == 3.0 and row["collectives"]


def test_a_write_that_stops_half_way_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "plan.json"
    tpu_plan._write(str(out), [{"kind": "flow", "fits": True, "program": "a"}])
    before = out.read_text()
    monkeypatch.setattr(
        Path, "write_text", lambda path, text: path.open("w").write(text[:9]) and [][0]
    )
    with pytest.raises(IndexError):
        tpu_plan._write(str(out), [])
    assert out.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    monkeypatch.undo()
    with pytest.raises(DmfError, match="could not be written"):
        tpu_plan._write(str(tmp_path / "nowhere" / "plan.json"), [])


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": [{"kind": 1}]}', "not json"])
def test_a_file_that_is_no_plan_is_left_alone(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(DmfError, match="other.json.*expected"):
        tpu_plan.read(str(path))
    assert path.read_text() == text and tpu_plan.read(str(tmp_path / "none.json")) == []


def test_a_batch_that_does_not_divide_is_refused(compiled):
    with pytest.raises(
        DmfError, match="config.batch_size = 36: expected a multiple of the 8 devices"
    ):
        tpu_plan.plan(parse(merged(TINY, batch_size=36)), ["v5e-8"])
    with pytest.raises(
        DmfError, match="config.batch_size = 40 with 30 rows .* expected a multiple of 32"
    ):
        tpu_plan.plan(parse(merged(TINY, batch_size=40)), ["v5e-8"])
    assert not compiled


def test_every_topology_is_looked_at_before_the_first_compilation(compiled, monkeypatch):
    monkeypatch.setattr(
        topologies, "devices", lambda given, target: jax.devices()[: 8 if given == "v5e-8" else 5]
    )
    with pytest.raises(
        DmfError, match="config.batch_size = 32: expected a multiple of the 5 devices"
    ):
        tpu_plan.plan(parse(TINY), ["v5e-8", "v5e-4"])
    with pytest.raises(DmfError, match="--topology=v5e-5: expected"):
        tpu_plan.plan(parse(TINY), ["v5e-8", "v5e-5"])
    assert not compiled


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DmfError, match=r'libtpu is not installed: .*pip install "jax\[tpu\]"'):
        tpu_plan.plan(parse(TINY), ["v5e-4"])


def test_shapes_and_classes_are_those_of_the_data():
    real = ("digits", "photos")  # need no preparing
    for name, (shape, classes, images) in tpu_plan.DATA.items():
        found = data.load(DataConfig(name=name, mock=name not in real), "train")
        assert tuple(found.image_shape) == shape and found.num_classes == classes
        assert len(found) == images or name not in real
    assert set(tpu_plan.DATA) == set(data.DATASETS) - {"pairs"}


@NEEDS_LIBTPU
def test_compiled_steps_for_real_chips_send_the_gradient_and_nothing_else(tmp_path):
    # In a new process: this one has fake devices, and libtpu reads its environment when it loads.
    values = merged(
        TINY,
        network=dict(width=128),  # arrays that are worth splitting
        curriculum=dict(stages=1, kinds=("jvp",), pretrain_length=0.0),
    )
    code = "import sys, json; from dmf.config import parse; from dmf.measure import tpu_plan; "
    code += "values = json.loads(sys.argv[1]); "
    code += "[tpu_plan.plan(parse(values | dict(mesh=dict(fsdp=n))), ['v5e-4'], sys.argv[2], "
    code += "only=['jvp']) for n in (1, 4)]"
    out = tmp_path / "plan.json"
    given = [sys.executable, "-c", code, json.dumps(values), str(out)]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-2000:]
    parallel, split = tpu_plan.read(str(out))
    assert parallel["fits"] and parallel["hbm_bytes"] == round(15.75 * 2**30)
    assert parallel["mesh"] == [4, 1] and set(parallel["collectives"]) == {"all-reduce"}
    assert split["mesh"] == [1, 4] and "all-gather" in split["collectives"]
    assert set(split["collectives"]) <= {"all-gather", "reduce-scatter", "all-reduce"}
    sent = [sum(m["bytes"] for m in row["collectives"].values()) for row in (parallel, split)]
    assert sent[1] < 1.1 * sent[0]  # a ring's sum is a scatter and a gather
