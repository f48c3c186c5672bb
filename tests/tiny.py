"""The smallest complete runs: a config of seconds, its network, data, mesh and state."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from dmf import networks, optim, sharding, state, step
from dmf.config import parse
from dmf.method import objectives
from dmf.method.curriculum import build_stages

TINY = dict(
    batch_size=32,
    network=dict(kind="dit", depth=1, width=32, heads=2, patch=4, num_classes=10),
    data=dict(name="digits"),
    times=dict(r_neq_t_fraction=0.75),
    loss=dict(p=0.5, eps=1e-3),
    label_dropout=0.1,
    curriculum=dict(stages=4, length=8.0, length_unit="steps", pretrain_length=4.0),
    optimizer=dict(
        learning_rate=1e-3,
        warmup_steps=2,
        pretrain_learning_rate=1e-3,
        pretrain_warmup_steps=2,
        clip_norm=1.0,
    ),
    ema=dict(halflife_images=(50.0, 800.0), rampup_ratio=0.5, evaluate=50.0),
    run=dict(
        log_every_steps=1,
        checkpoint_every_steps=3,
        score_samples=0,
        score_steps=(1, 2),
        sample_rows=2,
        tensorboard=False,
    ),
)

UNET = dict(
    TINY,
    label_dropout=0.0,
    network=dict(
        kind="unet",
        channels=16,
        channel_mult=(1,),
        blocks=1,
        attention_resolutions=(),  # the middle block has it in any case
        dropout=0.3,
        augment_dim=6,
    ),
    data=dict(name="digits", flip=True, augment=0.12),
)

# The least to trace and compile: for tests of runs, which are not about the network.
MLP = dict(TINY, label_dropout=0.0, network=dict(kind="mlp", width=32, depth=1))


def merged(base, **changes):
    """A config as a nested dict with the given sections updated and other keys replaced."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = {**base[key], **value} if isinstance(value, dict) and key in base else value
    return out


def drawn(init, randomise):
    """Weights in host memory. With noise on them, no weight is at its zero start."""
    with jax.ensure_compile_time_eval():
        params = jax.device_get(init(jax.random.key(1)))
    rng = np.random.default_rng(2)

    def noisy(x):
        return x + 0.05 * rng.standard_normal(x.shape, np.float32).astype(x.dtype)

    return jax.tree.map(noisy, params) if randomise else params


@lru_cache(maxsize=16)
def drawn_once(network, randomise):
    """The weights of a configured network, which all tests of a worker share."""
    return drawn(networks.build(network, (8, 8, 1)).init, randomise)


class Setup:
    """All that a step needs, on the given number of devices."""

    def __init__(self, values=None, devices=1):
        self.config = parse(values or TINY)
        self.mesh = sharding.make_mesh(self.config.mesh, jax.devices()[:devices])
        self.network = self.configured = networks.build(self.config.network, (8, 8, 1))
        self.optimizer = optim.build(self.config.optimizer)
        self.stages = build_stages(self.config.curriculum, self.config.batch_size, 1000)

    def weights(self, randomise):
        """Weights of this network; a test may have put another one in the place of the config's."""
        if self.network is self.configured:
            return drawn_once(self.config.network, randomise)
        return drawn(self.network.init, randomise)

    def state(self, randomise=True):
        """A fresh state. By default no weight is at its zero start, so that no branch is dead."""
        params = self.weights(randomise)
        fresh = state.create(params, self.optimizer, self.config.ema, self.config.curriculum)
        return jax.device_put(fresh, sharding.placed(self.mesh, fresh))

    def step(self, kind):
        place = sharding.placed(self.mesh, jax.eval_shape(self.state))
        return step.make_train_step(
            kind, self.network, self.optimizer, self.config, self.mesh, place
        )

    def taught(self):
        """(the weights of a frozen teacher,), placed as the parameters; () without one."""
        if not self.config.taught:
            return ()
        return (jax.tree.map(lambda x: 0.9 * x, self.state().params),)

    def batch(self, n):
        rng = np.random.default_rng(n)
        return sharding.put_rows(
            self.mesh,
            {
                "x": rng.uniform(-1, 1, (self.config.batch_size, 8, 8, 1)).astype(np.float32),
                "label": rng.integers(0, 10, self.config.batch_size).astype(np.int32),
            },
        )

    def scalars(self, n, kind, rho=0.25):
        stage = next(s for s in self.stages if s.kind == kind)
        return step.step_scalars(n, stage, self.stages, self.config)._replace(rho=np.float32(rho))

    def run(self, kind, steps, **start):
        """(state, metrics of the last step) after some steps of one kind."""
        train_step, now = self.step(kind), self.state(**start)
        for n in range(steps):
            now, metrics = train_step(now, self.batch(n), self.scalars(n, kind), *self.taught())
        return now, {k: float(v) for k, v in metrics.items()}


def linear_network(dtype=jnp.float32):
    """The least that a step can train: it has classes, an interval branch and a weight to split."""

    def init(key):
        shapes = dict(kernel=(64, 256), out=(256, 64), table=(11, 256), interval=(256,))
        return {name: jax.random.normal(key, size) / 8 for name, size in shapes.items()}

    def apply(params, z, r, t, *, condition, train=False, rngs=None):
        inner = z.reshape(len(z), -1).astype(dtype) @ params["kernel"].astype(dtype)
        times = (t - r)[:, None] * params["interval"]
        inner = jnp.tanh(inner + times + params["table"][condition.label])
        return (inner @ params["out"]).reshape(z.shape)

    def dtypes(params):
        return {name: dtype if name == "kernel" else x.dtype for name, x in params.items()}

    return networks.Network(init, apply, None, lambda path: path == ("interval",), dtypes=dtypes)


def residuals(kind, net, params, rows, split, rho, interval, loss, tangent=None):
    """The residuals of a kind of stage, at the interval of one step."""
    return objectives.KINDS[kind].residual(
        net, params, rows, split, objectives.Rule(loss, partial(interval, rho), tangent)
    )
