"""Our training steps beside plain PyTorch: the same network, weights, batch, loss, Adam and EMA; float32 on all CPU cores.

    pip install -r requirements-parity.txt
    python launch/tables/against_pytorch.py --out=docs/against_pytorch.json

PyTorch runs eagerly and as one writes it: modules, F.scaled_dot_product_attention, the fused Adam, AveragedModel; the JVP is
torch.func.jvp of the whole batch, which is how ports of MeanFlow take it, with the attention kernel that knows a forward
mode. Both sides draw noise and times inside the step; there is no dropout, whose masks come from different generators.
Nothing is timed before both networks agree on u, and both sides on every case's loss and on its gradient. The two take
turns, step by step; a ratio is the median over rounds of PyTorch's time by ours.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
import torch
from torch import nn
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dmf import networks, optim, sharding, state, step
from dmf.config import parse
from dmf.convert import audit
from dmf.convert.native import NATIVE
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.method.flow import Rows

jax.config.update(
    "jax_platforms", "cpu"
)  # also where there is an accelerator, of which PyTorch's side makes no use
RHO, RATE, DECAY = 0.25, 1e-4, 0.999
SAME = 1e-5  # relative: float32 round-off between two implementations of one network
SAME_GRADIENT = (
    1e-4  # relative, of all weights together: the sums of a backward pass over a batch are longer
)
# Ours: kind and share of r < t rows -> PyTorch's: the same for the first three; the JVP takes every row, whatever its share.
CASES = (("flow", 0.0), ("discrete", 0.25), ("discrete", 0.75), ("jvp", 0.25), ("jvp", 1.0))


def features(time, count, endpoint):
    """Angles of the times (B,), in `count` frequencies from 1 down to 1e-4."""
    return time[:, None] * 1e4 ** (-torch.arange(count) / (count - 1 if endpoint else count))


class TimeEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp_0, self.mlp_2 = nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, time):
        angle = features(time, 128, endpoint=False)
        return self.mlp_2(F.silu(self.mlp_0(torch.cat((angle.cos(), angle.sin()), 1))))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = (
            heads,
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation_1 = nn.Linear(width, 6 * width)
        self.attn, self.mlp = Attention(width, heads), FeedForward(width, hidden)

    def forward(self, x, cond):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation_1(cond).chunk(
            6, -1
        )
        x = x + gate_a * self.attn(self.norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation_1, self.linear = nn.Linear(width, 2 * width), nn.Linear(width, out)

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation_1(cond).chunk(2, -1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """`dmf.networks.dit` without classes, under the names of our exports; images are (B, C, H, W)."""

    def __init__(self, config, shape):
        super().__init__()
        self.config, (size, _, channels), width = config, shape, config.width
        self.side = size // config.patch
        self.x_embedder = nn.ModuleDict(
            {"proj": nn.Conv2d(channels, width, config.patch, config.patch)}
        )
        self.t_embedder, self.interval = TimeEmbedder(width), TimeEmbedder(width)
        self.names = [f"blocks_{i}" for i in range(config.depth)]
        for name in self.names:
            self.add_module(name, DiTBlock(width, config.heads, int(width * config.mlp_ratio)))
        self.final_layer = FinalLayer(width, config.patch**2 * channels)
        angle = features(torch.arange(self.side), width // 4, endpoint=False)
        line = torch.cat((angle.sin(), angle.cos()), 1)
        table = torch.cat((line.repeat(self.side, 1), line.repeat_interleave(self.side, 0)), 1)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, z, r, t):
        x = self.x_embedder["proj"](z).flatten(2).transpose(1, 2) + self.positions
        cond = F.silu(self.t_embedder(t) + self.interval(t - r))[:, None]
        for name in self.names:
            x = self.get_submodule(name)(x, cond)
        x = self.final_layer(x, cond)
        p = self.config.patch
        return (
            x.unflatten(2, (p, p, -1))
            .unflatten(1, (self.side, self.side))
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(z.shape)
        )


def norm(width):
    return nn.GroupNorm(max(1, min(32, width // 4)), width, eps=1e-6)


class Block(nn.Module):
    def __init__(self, inputs, width, emb, resample="keep", attend=False):
        super().__init__()
        self.resample, self.attend = resample, attend
        self.norm0, self.conv0 = norm(inputs), nn.Conv2d(inputs, width, 3, padding=1)
        self.affine = nn.Linear(emb, width)
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = (
            nn.Conv2d(inputs, width, 1) if resample != "keep" or inputs != width else nn.Identity()
        )
        if attend:
            self.norm2, self.qkv, self.proj = (
                norm(width),
                nn.Conv2d(width, 3 * width, 1),
                nn.Conv2d(width, width, 1),
            )
        if resample != "keep":
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
            window = torch.outer(taps, taps)[None, None] / (64 if resample == "down" else 16)
            self.register_buffer("window", window.repeat(inputs, 1, 1, 1), persistent=False)

    def scaled(self, x):
        if self.resample == "keep":
            return x
        resize = F.conv2d if self.resample == "down" else F.conv_transpose2d
        return resize(x, self.window, stride=2, padding=1, groups=x.shape[1])

    def forward(self, x, emb):
        y = self.conv0(self.scaled(F.silu(self.norm0(x)))) + self.affine(emb)[:, :, None, None]
        x = (self.skip(self.scaled(x)) + self.conv1(F.silu(self.norm1(y)))) * 0.5**0.5
        if not self.attend:
            return x
        q, k, v = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return (x + self.proj(y)) * 0.5**0.5


class UNet(nn.Module):
    """`dmf.networks.unet` without labels and dropout, under the names of our exports; images are (B, C, H, W)."""

    def __init__(self, config, shape):
        super().__init__()
        (size, _, colours), c, emb = shape, config, 4 * config.channels
        self.config, self.half = c, c.noise_width // 2
        self.map_layer0, self.map_layer1 = nn.Linear(c.noise_width, emb), nn.Linear(emb, emb)
        self.interval = nn.Linear(c.noise_width, emb, bias=False)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{size}x{size}_conv"] = nn.Conv2d(colours, c.channels, 3, padding=1)
        skips = [c.channels]
        levels = [
            (size >> i, c.channels * mult, (size >> i) in c.attention_resolutions)
            for i, mult in enumerate(c.channel_mult)
        ]
        for res, width, attend in levels:
            if res < size:
                self.enc[f"{res}x{res}_down"] = Block(skips[-1], skips[-1], emb, "down")
                skips.append(skips[-1])
            for k in range(c.blocks):
                self.enc[f"{res}x{res}_block{k}"] = Block(skips[-1], width, emb, attend=attend)
                skips.append(width)
        last = skips[-1]
        for res, width, attend in reversed(levels):
            if (res, width, attend) == levels[-1]:
                self.dec[f"{res}x{res}_in0"] = Block(last, last, emb, attend=True)
                self.dec[f"{res}x{res}_in1"] = Block(last, last, emb)
            else:
                self.dec[f"{res}x{res}_up"] = Block(last, last, emb, "up")
            for k in range(c.blocks + 1):
                self.dec[f"{res}x{res}_block{k}"] = Block(
                    last + skips.pop(), width, emb, attend=attend and k == c.blocks
                )
                last = width
        self.dec[f"{size}x{size}_aux_norm"] = norm(last)
        self.dec[f"{size}x{size}_aux_conv"] = nn.Conv2d(last, colours, 3, padding=1)

    def forward(self, z, r, t):
        of_t, of_h = (features(time, self.half, endpoint=True) for time in (t, t - r))
        emb = self.map_layer0(torch.cat((of_t.sin(), of_t.cos()), 1)) + self.interval(
            torch.cat((of_h.sin(), of_h.cos()), 1)
        )
        emb = F.silu(self.map_layer1(F.silu(emb)))
        x, skips = z, []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        *blocks, last_norm, last_conv = self.dec.items()
        for name, layer in blocks:
            x = layer(torch.cat((x, skips.pop()), 1) if "_block" in name else x, emb)
        return last_conv[1](F.silu(last_norm[1](x)))


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
    """Relative differences of u, of every case's loss on the same rows, and of its gradient; exits where they are not the same.

    The gradient leaves out the interval branch for flow matching, under which only ours holds it fixed.
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
                f"{name} differs by {difference:.1e} between ours and PyTorch's: expected {most:g} or less"
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


def table(rows):
    lines = [f"{'kind':>12}{'r<t':>8}{'ours ms':>12}{'PyTorch ms':>12}{'PyTorch/ours':>14}"]
    lines += [
        f"{r['kind']:>12}{r['r_neq_t']:>8.2f}{r['ours_ms']:>12.1f}{r['torch_ms']:>12.1f}{r['ratio']:>14.2f}"
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
    built = {name: build(name, args) for name in args.networks}
    for name, (ours, model) in built.items():
        config, shape = ours.config, ours.shape
        same = check_same(ours, model)
        count = sum(p.numel() for p in model.parameters())
        print(
            f"{name}, {count:,} parameters, {shape}, batch {config.batch_size}: u differs by {same['u']:.1e}",
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
