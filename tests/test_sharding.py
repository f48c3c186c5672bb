"""Where the state lives: copies, parts, and both at once; none of it shows in what is trained."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import cifar10, imagenet256
from dmf import networks, optim, sharding, state, step
from dmf.config import parse
from dmf.errors import DmfError
from dmf.measure import hlo
from dmf.sharding import MeshConfig
from dmf.storage import checkpoint
from tests.test_step import largest_difference
from tests.tiny import TINY, UNET, Setup, linear_network, merged

# Wide enough that most weights are split. Adam does not divide by rounding (see test_step).
WIDE = merged(TINY, network=dict(width=128, heads=4), optimizer=dict(eps=1e-4))
WIDE_UNET = merged(UNET, network=dict(channels=64), optimizer=dict(eps=1e-4))
KINDS = ("discrete", "jvp")


def bytes_on_a_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def alone():
    """Five steps on one device, by kind and config; made once."""
    made = {}

    def steps(kind, name, values):
        if (kind, name) not in made:
            made[kind, name] = Setup(values).run(kind, 5)
        return made[kind, name]

    return steps


BOTH = dict(replica=2, fsdp=4)


@pytest.mark.parametrize(
    ("kind", "name", "values", "mesh"),
    [
        *((kind, "dit", WIDE, BOTH) for kind in KINDS),
        ("all_pairs", "unet", WIDE_UNET, BOTH),
        ("discrete", "dit", WIDE, dict(fsdp=8)),
    ],
    ids=[*KINDS, "unet", "fsdp8"],
)
def test_split_weights_take_the_same_five_steps_as_one_device(alone, kind, name, values, mesh):
    one = alone(kind, name, values)
    many = Setup(merged(values, mesh=mesh), devices=8).run(kind, 5)
    assert many[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)
    assert many[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-5)
    assert largest_difference(one[0].params, many[0].params) < 1e-5
    assert largest_difference(one[0].ema, many[0].ema) < 1e-5
    assert (
        bytes_on_a_device(many[0]) < bytes_on_a_device(one[0]) / 3
    )  # and stayed where they belong


def test_split_weights_go_with_remat_scan_and_guidance(alone):
    """All choices of how a step is computed, on a stage that evaluates the network five times."""
    guided = merged(
        WIDE, guidance=dict(omega=0.6, kappa=0.7), curriculum=dict(kinds=("guided_jvp",), stages=1)
    )
    guided = merged(guided, network=dict(depth=2))
    one = alone("guided_jvp", "dit", guided)
    ways = dict(
        mesh=dict(fsdp=4), remat="blocks", scan_blocks=True, attention=dict(derivative="chunked")
    )
    setup = Setup(merged(guided, **ways), devices=4)
    setup.network = step.network_for("guided_jvp", setup.config, (8, 8, 1), setup.mesh)
    many = setup.run("guided_jvp", 5)
    assert many[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)
    assert largest_difference(one[0].params, many[0].params) < 1e-5


def test_split_weights_do_not_keep_remat_from_saving_memory():
    """An earlier way of gathering them kept every result of the forward pass."""
    temporary = []
    for remat in ("none", "blocks"):
        values = merged(
            WIDE,
            network=dict(depth=4),
            batch_size=256,
            mesh=dict(fsdp=4),
            remat=remat,
            scan_blocks=True,
        )
        setup = Setup(values, devices=4)
        setup.network = step.network_for("all_pairs", setup.config, (8, 8, 1), setup.mesh)
        lowered = setup.step("all_pairs").lower(
            setup.state(randomise=False), setup.batch(0), setup.scalars(0, "all_pairs")
        )
        quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        temporary.append(
            lowered.compile(compiler_options=quick).memory_analysis().temp_size_in_bytes
        )
    assert temporary[1] < 0.7 * temporary[0]


def test_microbatches_of_split_weights_add_up(alone):
    one = alone("discrete", "dit", WIDE)
    many = Setup(merged(WIDE, microbatches=2, mesh=dict(fsdp=4)), devices=4).run("discrete", 5)
    assert many[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)
    assert largest_difference(one[0].params, many[0].params) < 1e-5


@pytest.mark.parametrize(("config", "shape"), [(cifar10, (32, 32, 3)), (imagenet256, (32, 32, 4))])
def test_a_device_of_eight_holds_at_most_a_seventh_of_the_state(config, shape):
    found = parse(config.get_config())
    network, optimizer = networks.build(found.network, shape), optim.build(found.optimizer)
    whole = jax.eval_shape(
        lambda: state.create(network.init(jax.random.key(0)), optimizer, found.ema)
    )
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    place = sharding.placed(mesh, whole)
    part = sum(
        np.prod(p.shard_shape(x.shape))
        for x, p in zip(jax.tree.leaves(whole), jax.tree.leaves(place), strict=True)
    )
    assert part < sum(np.prod(x.shape) for x in jax.tree.leaves(whole)) / 7


OWN = merged(
    TINY,
    batch_size=64,
    loss=dict(tangent="own"),
    guidance=dict(omega=0.6, kappa=0.7),
    curriculum=dict(kinds=("guided_jvp",), stages=1),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_the_gradient_is_sent_once_and_nothing_else_is(dtype, fsdp):
    """A guided JVP with its own tangent and microbatches sends what flow matching sends.

    Weights and gradients travel in the dtype in which the network uses them. XLA's part for CPUs
    lifts sums to float32, so the types are read before it.
    """
    mesh, sent = dict(replica=8 // fsdp, fsdp=fsdp), {}
    both = merged(OWN, microbatches=2, curriculum=dict(kinds=("all_pairs", "guided_jvp"), stages=2))
    for kind in ("all_pairs", "guided_jvp"):
        setup = Setup(merged(both, mesh=mesh), devices=8)
        setup.network = linear_network(jnp.dtype(dtype))
        given = jax.eval_shape(setup.state), setup.batch(0), setup.scalars(0, kind)
        lowered = setup.step(kind).lower(*given)
        found = hlo.collectives(hlo.parse(lowered.compile().as_text()), 8)
        assert set(found) == {"all-reduce", *("all-gather", "reduce-scatter") * (fsdp > 1)}
        sent[kind] = sum(moved.bytes for moved in found.values())
        types = re.findall(r"stablehlo.all_gather.*?-> tensor<64x256x(\w+)>", lowered.as_text())
        assert types == [dict(float32="f32", bfloat16="bf16")[dtype]] * (fsdp > 1)
    assert sent["guided_jvp"] <= 1.01 * sent["all_pairs"]
    assert sent["all_pairs"] <= 2 * 4 * (2 * 2**14 + 13 * 256)  # a sum is sent twice at most


def test_an_array_is_split_along_its_largest_axis_that_divides_or_not_at_all():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    shapes = {
        "wide": (3, 3, 64, 128),
        "tall": (512, 96),
        "odd": (129, 1001),
        "small": (8, 8),
        "number": (),
        "square": (256, 256),
    }
    found = sharding.placed(
        mesh, {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    )
    assert {k: v.spec for k, v in found.items()} == {
        "wide": PartitionSpec(None, None, None, "fsdp"),
        "tall": PartitionSpec("fsdp"),
        "odd": PartitionSpec(),
        "small": PartitionSpec(),
        "number": PartitionSpec(),
        "square": PartitionSpec(None, "fsdp"),
    }


@pytest.mark.parametrize(
    ("config", "shape"),
    [((0, 1), (8, 1)), ((0, 0), (1, 8)), ((2, 0), (2, 4)), ((0, 2), (4, 2)), ((4, 2), (4, 2))],
)
def test_the_mesh_is_two_numbers_of_which_zero_is_the_rest(config, shape):
    assert tuple(sharding.make_mesh(MeshConfig(*config)).shape.values()) == shape


@pytest.mark.parametrize("config", [(3, 0), (0, 16), (2, 2), (16, 1)])
def test_a_mesh_that_does_not_come_out_is_refused(config):
    with pytest.raises(
        DmfError,
        match=r"config.mesh.replica = \d+ x config.mesh.fsdp = \d+: expected factors of the 8 dev",
    ):
        sharding.make_mesh(MeshConfig(*config))


def test_one_process_owns_all_rows_in_their_order():
    mesh = sharding.make_mesh(MeshConfig(replica=2, fsdp=4))
    np.testing.assert_array_equal(sharding.local_rows(mesh, 32), np.arange(32))


def test_a_checkpoint_of_split_weights_is_read_on_any_other_mesh(tmp_path):
    setup = Setup(merged(WIDE, mesh=dict(fsdp=8)), devices=8)
    before = setup.state()
    saved = checkpoint.Checkpoints(tmp_path, 2, [], {"config": {}})
    saved.save(1, before)
    for mesh, devices in ((dict(fsdp=2), 2), (dict(replica=4, fsdp=2), 8), (dict(), 1)):
        like = Setup(merged(WIDE, mesh=mesh), devices=devices).state(randomise=False)
        found = saved.restore_latest(like)
        assert largest_difference(before, found) == 0
        assert all(
            a.sharding == b.sharding
            for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(found), strict=True)
        )
    saved.close()


def test_a_state_that_no_device_can_hold_is_refused_before_it_is_made(monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(replica=1, fsdp=2), devices=jax.devices()[:2])
    shapes = {"params": (2**16, 100), "ema": (2**16, 100), "step": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    like = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        sharding.placed(mesh, tree),
    )
    needed = 3 * 2**16 * 100 * 4 // 2 + 4  # of each of two devices, which split the large arrays
    monkeypatch.setattr(sharding, "device_bytes", lambda mesh: needed)
    sharding.check_memory(mesh, like, like["params"])
    monkeypatch.setattr(sharding, "device_bytes", lambda mesh: needed - 1)
    with pytest.raises(DmfError, match="averages take 0.0 GB on each device, a gradient 0.0 GB"):
        sharding.check_memory(mesh, like, like["params"])


def test_the_memory_of_a_step_is_told_beside_that_of_the_device(monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
    program = jax.jit(lambda x: (x @ x).sum()).lower(jnp.ones((2000, 2000))).compile()
    monkeypatch.setattr(sharding, "device_bytes", lambda mesh: 10**9)
    line = sharding.memory(mesh, program)
    assert re.fullmatch(r"a step takes about 0\.0[23] GB of each device's 1\.0 GB", line), line
    monkeypatch.setattr(sharding, "device_bytes", lambda mesh: 10**6)
    assert sharding.memory(mesh, program).endswith("it will not fit: see docs/memory.md")
    monkeypatch.undo()
    assert sharding.device_bytes(mesh) > 10**8
