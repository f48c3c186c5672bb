"""A start with other classes than the data's: what becomes of its label table."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dmf import data, networks, pretrained, sharding
from dmf.config import parse
from dmf.data import DataConfig
from dmf.errors import DmfError
from dmf.networks import DiTConfig, UNetConfig
from dmf.run import context, init
from dmf.storage import checkpoint
from tests import runs
from tests.conversion import small_noise
from tests.tiny import TINY, merged

SHAPE, OLD, OURS = (8, 8, 1), 12, 10  # classes of the start, and of the digits
NETWORKS = {
    "dit": DiTConfig(depth=1, width=32, heads=2, patch=4, num_classes=OLD),
    "unet": UNetConfig(
        channels=16, channel_mult=(1,), blocks=1, attention_resolutions=(), num_classes=OLD
    ),
}


def built(config):
    """The network as compiled functions."""
    network = networks.build(config, SHAPE)
    return network._replace(init=jax.jit(network.init), apply=jax.jit(network.apply))


def drawn(config):
    """(network, weights without a zero start)."""
    network = built(config)
    return network, small_noise(network.init(jax.random.key(3)))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder of converted weights with `OLD` classes, and the weights."""
    config = NETWORKS["dit"]
    _, params = drawn(config)
    folder = tmp_path_factory.mktemp("start") / "converted"
    checkpoint.save_weights(folder, params, pretrained.metadata(config, SHAPE, {}), {})
    return folder, params


def values(folder, rule, classes, **changes):
    base = merged(TINY, init=str(folder), init_labels=rule, network=dict(num_classes=classes))
    return merged(base, **(changes if classes else dict(changes, label_dropout=0.0)))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("rows", [(0, 1, 2), (11, 0, 0), None, ()])
def test_a_class_is_the_class_that_it_takes_and_the_null_class_stays(kind, rows):
    config = NETWORKS[kind]
    network, params = drawn(config)
    few = dataclasses.replace(config, num_classes=0 if rows == () else 3)
    ours = built(few)
    new = ours.init(jax.random.key(5))
    found = init.relabelled(params, new, rows)
    z, t = jax.random.normal(jax.random.key(1), (3, *SHAPE)), np.float32([0.2, 0.5, 1.0])
    null = network.apply(params, z, 0 * t, t)
    np.testing.assert_allclose(ours.apply(found, z, 0 * t, t), null, atol=2e-6 * (rows == ()))
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, new)
    if rows:
        with_class = network.apply(params, z, 0 * t, t, label=np.array(rows))
        same = ours.apply(found, z, 0 * t, t, label=np.arange(3))
        np.testing.assert_array_equal(same, with_class)
        assert not np.allclose(same, null)
    elif rows is None:
        (name,) = (name for name in init.TABLES if name in new)
        leaf = [tree[name]["embedding_table"]["embedding"] for tree in (found, new)]
        np.testing.assert_array_equal(leaf[0][:-1], leaf[1][:-1])


def test_a_start_without_classes_gets_fresh_ones_and_stays_what_it_is_without_them():
    plain = dataclasses.replace(NETWORKS["dit"], num_classes=0)
    network, params = drawn(plain)
    ours = built(NETWORKS["dit"])
    found = init.relabelled(params, ours.init(jax.random.key(5)), None)
    z, t = jax.random.normal(jax.random.key(1), (2, *SHAPE)), np.float32([0.2, 1.0])
    np.testing.assert_array_equal(ours.apply(found, z, t, t), network.apply(params, z, t, t))


@pytest.mark.parametrize(("rule", "classes"), [("keep", 12), ("fresh", 10), ("none", 0)])
def test_a_run_starts_with_the_table_that_the_config_asks_for(
    start, tmp_path, capsys, rule, classes
):
    folder, old = start
    run = runs.open_run(parse(values(folder, rule, classes)), tmp_path)
    state = context.first_state(run)
    run.close()
    assert f"{OLD} classes to {classes}, " in capsys.readouterr().out
    same = jax.tree.map(np.array_equal, state.params["x_embedder"], old["x_embedder"])
    assert all(jax.tree.leaves(same))
    if classes:
        table, before = (
            p["y_embedder"]["embedding_table"]["embedding"] for p in (state.params, old)
        )
        assert table.shape == (classes + 1, 32)
        np.testing.assert_array_equal(table[-1], before[-1])
        assert np.array_equal(table[:10], before[:10]) == (rule == "keep")
    assert checkpoint.find(tmp_path) == tmp_path / "checkpoints" / "0"


def test_a_file_says_which_class_each_class_takes(start, tmp_path):
    folder, _ = start
    file = tmp_path / "map.json"
    file.write_text(json.dumps({str(i): 11 - i for i in range(OURS)}))
    dataset = data.load(DataConfig(), "train")
    found = init.find(parse(values(folder, str(file), OURS)), dataset)
    assert found.rows == tuple(range(11, 1, -1)) and found.classes == OLD
    names = dataclasses.replace(dataset, classes=tuple("abcdefghij"))
    file.write_text(json.dumps(dict.fromkeys("jihgfedcba", 3) | {"b": 7}))
    assert init.find(parse(values(folder, str(file), OURS)), names).rows[:3] == (3, 7, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "map.json line 1: no JSON .*Expecting .*; expected a JSON object such as"),
        ("[1]", r"map.json: it is \[1\], expected a JSON object"),
        ('{"0": 1}', "map.json: has no class '1'; expected all classes of digits: 0, 1, 2"),
        ('{"cat": 1}', "map.json: has no class '0'; expected all classes of digits: 0, 1, 2"),
        (json.dumps({str(i): 12 for i in range(10)}), "'0' is 12; expected a class .* 0 to 11"),
        (json.dumps({str(i): True for i in range(10)}), "'0' is True; expected a class"),
    ],
)
def test_a_file_that_is_no_map_of_the_classes_is_one_line(start, tmp_path, text, message):
    (tmp_path / "map.json").write_text(text)
    config = parse(values(start[0], str(tmp_path / "map.json"), OURS))
    with pytest.raises(DmfError, match=message):
        init.find(config, data.load(DataConfig(), "train"))


@pytest.mark.parametrize(
    ("rule", "classes", "message"),
    [
        ("", 12, "num_classes = 12: expected 0 or the 10 classes of digits; .* config.init_labels"),
        ("", 10, "num_classes: 12 -> 10; expected the same network; .* set config.init_labels"),
        ("keep", 13, "num_classes = 13 with .*'keep': expected at most the 12 classes of"),
        ("keep", 3, "num_classes = 3 with .*'keep': expected at least the 10 classes of digits"),
        ("fresh", 12, "num_classes = 12 with .*'fresh': expected the 10 classes of digits"),
        ("none", 10, "num_classes = 10 with .*'none': expected 0"),
        ("frsh", 10, "init_labels = 'frsh': expected keep, fresh, none, or a .json file"),
    ],
)
def test_classes_that_do_not_fit_together_are_one_line_that_names_the_field(
    start, tmp_path, rule, classes, message
):
    with pytest.raises(DmfError, match=message) as error:
        runs.train(parse(values(start[0], rule, classes)), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_classes_of_a_start_need_a_start(tmp_path):
    with pytest.raises(DmfError, match="config.init_labels = 'fresh': expected '', as config.init"):
        runs.train(parse(merged(TINY, init_labels="fresh")), tmp_path / "run")


def routed(folder, **network):
    given = dict(network, time_routing="decoupled", t_blocks=1, logvar=True)
    loss = dict(logvar="paper")
    return merged(values(folder, "", OLD), network=given, loss=loss)


def test_a_flow_model_goes_into_a_network_of_decoupled_times(start, tmp_path):
    """Its silent branch is left out, and the head for the loss starts at zero."""
    _, params = start
    quiet = {**params["interval"]["mlp_2"]}
    quiet = jax.tree.map(np.zeros_like, quiet)
    silent = {**params, "interval": {**params["interval"], "mlp_2": quiet}}
    dataset = dataclasses.replace(data.load(DataConfig(), "train"), num_classes=OLD)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for name, weights in (("silent", silent), ("loud", params)):
        meta = pretrained.metadata(NETWORKS["dit"], SHAPE, {})
        checkpoint.save_weights(tmp_path / name, weights, meta, {})
        config = parse(routed(tmp_path / name))
        like = pretrained.abstract_params(networks.build(config.network, SHAPE), mesh)
        found = init.find(config, dataset)
        if name == "loud":
            with pytest.raises(DmfError, match="its interval branch is not zero; expected a flow"):
                init.weights(config, found, SHAPE, mesh, like)
            continue
        new = init.weights(config, found, SHAPE, mesh, like)
        assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, like)
        assert not np.any(new["logvar_linear"]["kernel"])
        old = {key: x for key, x in silent.items() if key != "interval"}
        same = jax.tree.map(np.array_equal, {k: new[k] for k in old}, old)
        assert all(jax.tree.leaves(same))
    decoupled = dataclasses.replace(NETWORKS["dit"], time_routing="decoupled", t_blocks=1)
    meta = pretrained.metadata(decoupled, SHAPE, {})
    checkpoint.save_weights(tmp_path / "decoupled", old, meta, {})
    with pytest.raises(DmfError, match="t_blocks: 1 -> 0.*time_routing: decoupled -> interval"):
        init.find(parse(values(tmp_path / "decoupled", "", OLD)), dataset)
