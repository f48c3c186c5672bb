"""Times our training steps and plain PyTorch's side by side, in float32 on all CPU cores.

    pip install -r requirements-parity.txt
    python launch/tables/against_pytorch.py --out=docs/against_pytorch.json
    python launch/tables/against_pytorch.py --sampling --depth=12 --width=768 --heads=12 \\
        --dit_batch=4 --rounds=9 --out=docs/against_pytorch_sampling.json     one-step generation

Both sides have the same network, weights, batch, loss, Adam and EMA.
PyTorch runs eagerly: modules, F.scaled_dot_product_attention, the fused Adam, AveragedModel.
Its JVP is torch.func.jvp of the whole batch, as in ports of MeanFlow. That needs the attention
kernel that has a forward mode.

Both sides draw noise and times inside the step. There is no dropout, because its masks would
come from different generators. Before anything is timed, both networks must agree on u, and
both sides on every case's loss and gradient. The two take turns, step by step. A ratio is the
median over rounds of PyTorch's time by ours.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dmf import networks, optim, sharding, state, step
from dmf.config import parse
from dmf.convert import audit
from dmf.convert.native import NATIVE
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.method import samplers
from dmf.method.flow import Rows
from launch.tables.torch_networks import DiT, UNet

# PyTorch's side uses no accelerator, so ours must not either.
jax.config.update("jax_platforms", "cpu")
RHO, RATE, DECAY = 0.25, 1e-4, 0.999
SAME = 1e-5  # relative: float32 round-off between two implementations of one network
# Relative, of all weights together. A backward pass sums over the batch, so it is looser.
SAME_GRADIENT = 1e-4
# Kind, and share of rows with r < t. PyTorch's JVP takes every row, whatever the share.
CASES = (("flow", 0.0), ("discrete", 0.25), ("discrete", 0.75), ("jvp", 0.25), ("jvp", 1.0))


def residual(model, rows, kind, pairs):
    """u - target per row, of rows z, r, t, v of which the first `pairs` have r < t."""
    z, r, t, v = rows
    if kind == "flow":
        return model(z, t, t) - v
    if kind == "jvp":
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel knows no forward mode
            u, dudt = jvp(model, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
        return u - (v - (t - r)[:, None, None, None] * dudt).detach()
    u = model(z, r, t)
    z, r, t, v = (x[:pairs] for x in rows)
    back, weight = RHO * (t - r), RHO / (1 + RHO)
    with torch.no_grad():
        target = weight * v + (1 - weight) * model(z - back[:, None, None, None] * v, r, t - back)
    return u - torch.cat((target, rows[3][pairs:]))


def loss_of(model, rows, kind, pairs, law):
    """The adaptive loss of MeanFlow, mean over rows."""
    squares = residual(model, rows, kind, pairs).square().sum((1, 2, 3))
    return (squares * (squares + law.eps).detach() ** -law.p).mean()


class TorchStep:
    """Model, Adam and EMA of the PyTorch side; a call is one training step."""

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.adam = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.999), fused=True)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def __call__(self, x, kind, fraction):
        law, pairs = self.config.times, round(fraction * len(x))
        draws = torch.sigmoid(law.t_mean + law.t_std * torch.randn(2, len(x)))
        r, t = draws.amin(0), draws.amax(0)
        r = torch.where(torch.arange(len(x)) < pairs, r, t)
        noise = torch.randn_like(x)
        at = t[:, None, None, None]
        loss = loss_of(
            self.model, ((1 - at) * x + at * noise, r, t, noise - x), kind, pairs, self.config.loss
        )
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.ema.update_parameters(self.model)
        return loss.item()


class OurSteps:
    """Our side: the compiled steps by case, and the state that they hand on."""

    def __init__(self, config, shape):
        self.config, self.shape = config, shape
        self.network = networks.build(config.network, shape)
        self.params = no_zeros(self.network.init(jax.random.key(0)))
        mesh, optimizer = (
            sharding.make_mesh(config.mesh, jax.devices()[:1]),
            optim.build(config.optimizer),
        )
        fresh = state.create(self.params, optimizer, config.ema)
        place = sharding.placed(mesh, fresh)
        self.now, self.mesh = jax.device_put(fresh, place), mesh
        self.steps = {
            case: step.make_train_step(
                case[0], self.network, optimizer, with_share(config, case[1]), mesh, place
            )
            for case in CASES
        }

    def __call__(self, batch, kind, fraction):
        scalars = step.Scalars(
            np.float32(RHO), np.float32(RATE), np.full(1, DECAY, np.float32), np.uint32(0)
        )
        self.now, metrics = self.steps[kind, fraction](self.now, batch, scalars)
        jax.block_until_ready(self.now)
        return float(metrics["loss"])

    def loss(self, rows, kind, fraction):
        """The loss of a case on these rows, and its gradient under PyTorch's names."""
        config = with_share(self.config, fraction)
        how = {
            "kind": kind,
            "network": self.network,
            "config": config,
            "split": step.split_for(kind, config, self.mesh),
        }
        graded = jax.value_and_grad(
            lambda params, rows: step.stage_loss(params, rows, RHO, **how)[0]
        )
        loss, grads = jax.jit(graded)(self.params, rows)
        return float(loss), self.as_tensors(grads)

    def as_tensors(self, tree):
        """Name -> array, as our export names and lays out weights."""
        leaves = {leaf: np.asarray(x) for leaf, x in audit.flat(tree).items()}
        return audit.write(NATIVE.rules(self.config.network, self.shape, None), leaves)


def with_share(config, fraction):
    return dataclasses.replace(
        config, times=dataclasses.replace(config.times, r_neq_t_fraction=fraction or 0.25)
    )


def no_zeros(params):
    """Weights without a layer at its zero start, behind which a difference would not show."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + 0.02 * rng.standard_normal(x.shape).astype(np.float32), params
    )


def as_torch(x):
    """Images (B, H, W, C) as (B, C, H, W), times as they are."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, 3, 1) if np.ndim(x) == 4 else x))


def check_same(ours, model):
    """Relative differences of u, of every case's loss on the same rows, and of its gradient.

    Ends the program if they are not the same. Flow matching holds the interval branch fixed on
    our side only, so its gradient is left out there.
    """
    config, rng = ours.config, np.random.default_rng(2)
    z, v = rng.standard_normal((2, config.batch_size, *ours.shape)).astype(np.float32)
    r, t = np.sort(rng.uniform(0.02, 0.98, (2, config.batch_size)).astype(np.float32), 0)
    with torch.no_grad():
        theirs = model(*(as_torch(x) for x in (z, r, t))).movedim(1, 3).numpy()
    found = {
        "u": relative_l2(np.asarray(jax.jit(ours.network.apply)(ours.params, z, r, t)), theirs)
    }
    for kind, fraction in CASES:
        split = step.split_for(kind, with_share(config, fraction), ours.mesh)
        pair = np.asarray(split.is_pair()) if fraction else np.zeros(config.batch_size, bool)
        rows = (z, np.where(pair, r, t), t, v)
        order = np.argsort(~pair, kind="stable")
        their_rows = [as_torch(x[order]) for x in rows]
        theirs = loss_of(model, their_rows, kind, int(pair.sum()), config.loss)
        loss, grads = ours.loss(Rows(*rows), kind, fraction)
        found[f"loss of {kind} {fraction:g}"] = abs(loss / theirs.item() - 1)
        weights = {
            n: x
            for n, x in model.named_parameters()
            if kind != "flow" or not n.startswith("interval")
        }
        their_grads = [
            x.numpy().ravel() for x in torch.autograd.grad(theirs, list(weights.values()))
        ]
        mine = [grads[name].ravel() for name in weights]
        found[f"gradient of {kind} {fraction:g}"] = relative_l2(
            np.concatenate(mine), np.concatenate(their_grads)
        )
    for name, difference in found.items():
        most = SAME_GRADIENT if name.startswith("gradient") else SAME
        if not difference <= most:
            raise SystemExit(
                f"{name} differs by {difference:.1e} between ours and PyTorch's: "
                f"expected {most:g} or less"
            )
    return found


def compare(ours, theirs, rounds):
    """Both sides' steps in turns: one row per case."""
    config = ours.config
    x = np.random.default_rng(3).uniform(-1, 1, (config.batch_size, *ours.shape)).astype(np.float32)
    batch = sharding.put_rows(ours.mesh, {"x": x, "label": np.zeros(config.batch_size, np.int32)})
    seconds = {(side, case): [] for side in ("ours", "torch") for case in CASES}
    for n in range(rounds + 1):  # the first one compiles
        for case in CASES:
            for side, run, given in (("ours", ours, batch), ("torch", theirs, as_torch(x))):
                started = time.perf_counter()
                run(given, *case)
                if n:
                    seconds[side, case].append(time.perf_counter() - started)
    rows = []
    for kind, fraction in CASES:
        mine, others = seconds["ours", (kind, fraction)], seconds["torch", (kind, fraction)]
        rows.append(
            {
                "kind": kind,
                "r_neq_t": fraction,
                "ours_ms": 1e3 * statistics.median(mine),
                "torch_ms": 1e3 * statistics.median(others),
                "ratio": statistics.median(b / a for a, b in zip(mine, others, strict=True)),
            }
        )
    return rows


def generate(config, shape, module, rounds):
    """One-step generation of both sides in turns, from equal weights and noise.

    Ends the program if the images differ. Returns the times, and images per second.
    """
    network = networks.build(config.network, shape)
    params = no_zeros(network.init(jax.random.key(0)))
    leaves = {leaf: np.asarray(x) for leaf, x in audit.flat(params).items()}
    tensors = audit.write(NATIVE.rules(config.network, shape, None), leaves)
    model = module(config.network, shape).eval()
    model.load_state_dict({key: torch.from_numpy(np.array(x)) for key, x in tensors.items()})
    e = np.random.default_rng(3).standard_normal((config.batch_size, *shape)).astype(np.float32)
    zero, one = np.zeros(len(e), np.float32), np.ones(len(e), np.float32)
    drawn = jax.jit(lambda params, e: samplers.one_step(partial(network.apply, params), e))

    def ours():
        return np.asarray(drawn(params, e))

    def theirs():
        with torch.inference_mode():
            x = as_torch(e)
            return (x - model(x, as_torch(zero), as_torch(one))).movedim(1, 3).numpy()

    difference = relative_l2(ours(), theirs())
    if not difference <= SAME:
        raise SystemExit(f"images differ by {difference:.1e}: expected {SAME:g} or less")
    seconds = {ours: [], theirs: []}
    for _ in range(rounds):
        for side, taken in seconds.items():
            started = time.perf_counter()
            side()
            taken.append(time.perf_counter() - started)
    mine, others = seconds.values()
    return {
        "network": dataclasses.asdict(config.network),
        "image_shape": shape,
        "batch_size": config.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "difference": difference,
        "ours_images_per_s": len(e) / statistics.median(mine),
        "torch_images_per_s": len(e) / statistics.median(others),
        "ratio": statistics.median(b / a for a, b in zip(mine, others, strict=True)),
    }


def table(rows):
    lines = [f"{'kind':>12}{'r<t':>8}{'ours ms':>12}{'PyTorch ms':>12}{'PyTorch/ours':>14}"]
    lines += [
        f"{r['kind']:>12}{r['r_neq_t']:>8.2f}"
        f"{r['ours_ms']:>12.1f}{r['torch_ms']:>12.1f}{r['ratio']:>14.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def configs(args):
    """Name -> (PyTorch's class, values of our config, image shape)."""
    dit = {"kind": "dit", "depth": args.depth, "width": args.width, "heads": args.heads, "patch": 2}
    unet = {
        "kind": "unet",
        "channels": args.channels,
        "blocks": args.blocks,
        "dropout": 0.0,
        "augment_dim": 0,
    }
    unet["attention_resolutions"] = (args.size // 2,)
    shared = {
        "curriculum": {"interval": "linear"},
        "ema": {"halflife_images": (1e4,), "evaluate": 1e4},
        "loss": {"p": 0.75, "eps": 1e-3},
    }
    return {
        "dit": (DiT, {**shared, "batch_size": args.dit_batch, "network": dit}, (32, 32, 4)),
        "unet": (
            UNet,
            {**shared, "batch_size": args.unet_batch, "network": unet},
            (args.size, args.size, 3),
        ),
    }


def build(name, args):
    """Our side, and PyTorch's network with our weights. Exits where a size makes no sense."""
    module, values, shape = configs(args)[name]
    try:
        config = parse(values)
        ours = OurSteps(config, shape)
    except DmfError as error:
        raise SystemExit(f"error: {name}: {error}") from error
    model = module(config.network, shape)
    model.load_state_dict(
        {key: torch.from_numpy(np.array(x)) for key, x in ours.as_tensors(ours.params).items()}
    )
    return ours, model


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=("dit", "unet"), default=("dit", "unet"))
    parser.add_argument(
        "--depth", type=int, default=6, help="of the DiT, on 32 x 32 x 4 latents: 256 tokens"
    )
    parser.add_argument("--width", type=int, default=256, help="of the DiT")
    parser.add_argument("--heads", type=int, default=4, help="of the DiT")
    parser.add_argument("--dit_batch", type=int, default=16)
    parser.add_argument(
        "--channels",
        type=int,
        default=64,
        help="of the U-Net, whose three levels have twice as many",
    )
    parser.add_argument("--blocks", type=int, default=2, help="of the U-Net, per level")
    parser.add_argument(
        "--size", type=int, default=32, help="of the U-Net's images; attention at half of it"
    )
    parser.add_argument("--unet_batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sampling", action="store_true", help="one-step generation of the DiT")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    found = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "rounds": args.rounds,
    }
    found["device"] = jax.devices()[0].device_kind
    found["threads_of_torch"] = torch.get_num_threads()
    if args.sampling:
        module, values, shape = configs(args)["dit"]
        found["sampling"] = generate(parse(values), shape, module, args.rounds)
        print(json.dumps(found["sampling"], indent=1))
        args.networks = ()
    built = {name: build(name, args) for name in args.networks}
    for name, (ours, model) in built.items():
        config, shape = ours.config, ours.shape
        same = check_same(ours, model)
        count = sum(p.numel() for p in model.parameters())
        print(
            f"{name}, {count:,} parameters, {shape}, batch {config.batch_size}: "
            f"u differs by {same['u']:.1e}",
            flush=True,
        )
        rows = compare(ours, TorchStep(model, config), args.rounds)
        print(table(rows), flush=True)
        about = {
            "network": dataclasses.asdict(config.network),
            "image_shape": shape,
            "batch_size": config.batch_size,
        }
        found[name] = {**about, "parameters": count, "differences": same, "steps": rows}
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
