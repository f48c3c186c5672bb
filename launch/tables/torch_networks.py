"""The networks of dmf/networks in plain PyTorch, under the names of our exports."""

import torch
from torch import nn
from torch.nn import functional as F


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
    """`dmf.networks.dit` without classes; images are (B, C, H, W)."""

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
    """`dmf.networks.unet` without labels and dropout; images are (B, C, H, W)."""

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
