"""Train the default model: Grok-1's exact wiring, small, on two CPU cores (needs the `train` extra).

    python scripts/prepare_corpus.py --corpus DIR --out WORK_DIR
    python scripts/train_tiny.py --work WORK_DIR --minutes 120
    python scripts/write_checkpoint.py --config configs/models/grok-1-tiny.json --from-npz WORK_DIR/params.npz --out models/grok-1-tiny

The parameters carry the released names and are written as `[in, out]`, so that exporting is quantising. Routing is dropless: tokens
are sorted by expert, and each expert multiplies its own rows. A load-balancing loss (Switch Transformer, arXiv:2101.03961, eq. 4)
keeps all experts in use. Matrices inside the layers are updated by Muon (orthogonalised momentum,
https://kellerjordan.github.io/posts/muon), the rest by Adam. The learning rate follows the clock, not a step count: it falls linearly to
zero over the last part of `--minutes`, so a busy machine trains less, never half-way. A run continues from WORK_DIR/state.pt.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CONFIG = json.loads((Path(__file__).parents[1] / "configs/models/grok-1-tiny.json").read_text())
MODEL = CONFIG["model"]
D, H, K, C = MODEL["emb_size"], MODEL["num_q_heads"], MODEL["num_kv_heads"], MODEL["key_size"]
E, TOP_K, LAYERS, FFN = MODEL["num_experts"], MODEL["num_selected_experts"], MODEL["num_layers"], CONFIG["derived"]["ffn_size"]
NORMS = ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3")
MIXTURE = {"books": 0.42, "dialogues": 0.35, "stories": 0.23}
LATE_MIXTURE = {"books": 0.2, "dialogues": 0.3, "stories": 0.5}  # of the last quarter, while the rate falls: simple English
LATE = 0.75
EXACT = 0.95  # from here on with the score cap, and with windows as long as the context
BALANCE_WEIGHT = 0.01
BF16 = torch.bfloat16

Params = dict[str, Tensor]


def init_params(seed: int) -> Params:
    """Random float32 parameters under the released names; post-norm scales start small, so that the residual stream starts calm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    params = {
        "language_model/in_out_embed": normal(CONFIG["vocab_size"], D, std=1 / 16),
        "language_model/rms_norm": torch.ones(D),
    }
    for layer in range(LAYERS):
        prefix = f"transformer/decoder_layer_{layer}/"
        params |= {
            prefix + "moe/linear": normal(E, D, FFN, std=D**-0.5),
            prefix + "moe/linear_v": normal(E, D, FFN, std=D**-0.5),
            prefix + "moe/linear_1": normal(E, FFN, D, std=FFN**-0.5),
            prefix + "multi_head_attention/query": normal(D, H * C, std=D**-0.5),
            prefix + "multi_head_attention/key": normal(D, K * C, std=D**-0.5),
            prefix + "multi_head_attention/value": normal(D, K * C, std=D**-0.5),
            prefix + "multi_head_attention/linear": normal(H * C, D, std=(H * C) ** -0.5),
            prefix + "router": normal(D, E, std=0.02),
        }
        params |= {prefix + name: torch.full((D,), 1.0 if name in NORMS[::2] else 0.35) for name in NORMS}
    return {name: value.requires_grad_() for name, value in params.items()}


@torch.compile(dynamic=False)
def rms(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm in float32, result in x's dtype."""
    return F.rms_norm(x.float(), (D,), scale, CONFIG["rms_norm_eps"]).to(x.dtype)


def rope_tables(length: int) -> tuple[Tensor, Tensor]:
    inverse = CONFIG["rope_base"] ** (-torch.arange(0, C, 2) / C)
    phase = torch.outer(torch.arange(length).float(), inverse).repeat(1, 2)
    return phase.cos().to(BF16), phase.sin().to(BF16)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves: x is [batch, heads, length, C]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@torch.compile(dynamic=False)
def attention_half(p: Params, x: Tensor, *, capped: bool) -> Tensor:
    """x [B, T, D] plus the normed output of causal grouped attention; p holds one layer's tensors.

    Without `capped` the score cap is left out, which is faster and moves scores below 5 by less than 0.05; the last part of the training
    and every evaluation are exact.
    """
    B, T, _ = x.shape
    cos, sin = rope_tables(T)
    a = rms(x, p["rms_norm"])
    q = rope((a @ p["multi_head_attention/query"].to(BF16)).view(B, T, H, C).transpose(1, 2), cos, sin)
    k = rope((a @ p["multi_head_attention/key"].to(BF16)).view(B, T, K, C).transpose(1, 2), cos, sin).repeat_interleave(H // K, 1)
    v = (a @ p["multi_head_attention/value"].to(BF16)).view(B, T, K, C).transpose(1, 2).repeat_interleave(H // K, 1)
    cap, multiplier = CONFIG["attn_logit_cap"], MODEL["attn_output_multiplier"]
    if capped:
        scores = torch.tanh(q @ k.transpose(2, 3) * (multiplier / cap)) * cap
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        o = scores.masked_fill(mask, -1e30).softmax(-1) @ v
    else:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=multiplier)
    o = o.transpose(1, 2).reshape(B, T, H * C) @ p["multi_head_attention/linear"].to(BF16)
    return x + rms(o, p["rms_norm_1"])


class SumRows(torch.autograd.Function):
    """values [n * TOP_K, D] whose row i belongs to flat slot order[i] -> each token's sum [n, D], by gathers only."""

    @staticmethod
    def forward(ctx, values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return values[inverse].view(-1, TOP_K, values.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return grad[order // TOP_K], None, None


class TakeRows(torch.autograd.Function):
    """x [n, D] -> its rows in expert order [n * TOP_K, D]; the backward pass is a gather and a sum, not a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order // TOP_K]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, TOP_K, grad.shape[-1]).sum(1), None, None


def moe(p: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, D] -> (output [n, D], load-balancing loss)."""
    probs = (x.float() @ p["router"]).softmax(-1)
    weights, chosen = probs.topk(TOP_K)
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=E)
    balance = E * (counts / flat.numel() * probs.mean(0)).sum()
    order = flat.argsort(stable=True)
    inverse = order.argsort()
    rows = TakeRows.apply(x, order, inverse).split(counts.tolist())
    up, gate, down = (p[f"moe/{name}"].to(BF16) for name in ("linear_v", "linear", "linear_1"))
    out = torch.cat([(F.gelu(r @ gate[e], approximate="tanh") * (r @ up[e])) @ down[e] for e, r in enumerate(rows)])
    out = out * weights.flatten()[order].to(BF16)[:, None]
    return SumRows.apply(out, order, inverse), balance


@torch.compile(dynamic=False)
def head_loss(h: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tied head: h [n, D], table [V, D], targets [n]."""
    logits = (h @ table.to(BF16).T).float() * CONFIG["output_multiplier_scale"]
    return F.cross_entropy(logits, targets)


def loss_of(params: Params, tokens: Tensor, *, capped: bool = True) -> tuple[Tensor, Tensor]:
    """tokens int64 [B, T + 1] -> (mean cross-entropy in nats, mean load-balancing loss)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    table = params["language_model/in_out_embed"]
    x = (F.embedding(inputs, table) * CONFIG["embedding_multiplier_scale"]).to(BF16)
    balance = torch.zeros(())
    for layer in range(LAYERS):
        prefix = f"transformer/decoder_layer_{layer}/"
        p = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        x = attention_half(p, x, capped=capped)
        m, b = moe(p, rms(x, p["rms_norm_2"]).flatten(0, 1))
        x = x + rms(m.view_as(x), p["rms_norm_3"])
        balance = balance + b / LAYERS
    h = rms(x, params["language_model/rms_norm"])
    return head_loss(h.flatten(0, 1), table, targets.flatten()), balance


def orthogonalised(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to each g[..., m, n], by five Newton-Schulz steps in bfloat16 (Muon)."""
    x = g.to(BF16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Muon for the layers' matrices, Adam for embedding, router and norms; both with decoupled weight decay on matrices."""

    def __init__(self, params: Params):
        self.params = params
        self.step_count = 0
        self.state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """`lr` is the fraction of the peak rates."""
        self.step_count += 1
        for name, p in self.params.items():
            first, second = self.state[name]
            g = p.grad
            if p.ndim >= 2 and "router" not in name and "embed" not in name:
                first.lerp_(g, 0.05)
                update = orthogonalised(g.lerp(first, 0.95))
                p.mul_(1 - 0.02 * lr * 0.1)
                p.add_(update, alpha=-0.02 * lr * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)
            else:
                first.lerp_(g, 0.1)
                second.lerp_(g * g, 0.05)
                rate = lr * (2e-3 if "embed" in name else 3e-3)
                bias = math.sqrt(1 - 0.95**self.step_count) / (1 - 0.9**self.step_count)
                p.addcdiv_(first, second.sqrt() + 1e-10, value=-rate * bias)
            p.grad = None


class Corpus:
    """Random windows from the token arrays that `prepare_corpus.py` wrote."""

    def __init__(self, work: Path, split: str, seed: int):
        self.arrays = {kind: np.load(work / f"{kind}.{split}.npy") for kind in MIXTURE}
        self.random = np.random.default_rng(seed)

    def batch(self, rows: int, length: int, mixture: dict[str, float]) -> Tensor:
        """int64 [rows, length + 1], each row from a kind drawn by its share."""
        kinds = self.random.choice(list(mixture), rows, p=list(mixture.values()))
        windows = []
        for each in kinds:
            array = self.arrays[each]
            start = self.random.integers(len(array) - length)
            windows.append(array[start : start + length + 1])
        return torch.from_numpy(np.stack(windows).astype(np.int64))


@torch.no_grad()
def evaluate(params: Params, work: Path, *, batches: int, length: int) -> dict[str, float]:
    """Held-out bits per byte of UTF-8 for each kind of text, exact attention."""
    facts = json.loads((work / "corpus.json").read_text())
    corpus = Corpus(work, "heldout", seed=0)
    result = {}
    for kind in MIXTURE:
        losses = [loss_of(params, corpus.batch(8192 // length, length, {kind: 1.0}))[0].item() for _ in range(batches)]
        fact = facts[f"{kind}.heldout"]
        result[kind] = round(float(np.mean(losses)) / math.log(2) * fact["tokens"] / fact["bytes"], 4)
    return result


def learning_rate(progress: float, step: int) -> float:
    """Warm-up over 60 steps, then flat, then linear to zero over the last 45 % of the time."""
    return min(1.0, (step + 1) / 60, max(0.0, (1 - progress) / 0.45))


def save(path: Path, optimizer: Optimizer, elapsed_s: float) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "params": {k: v.detach() for k, v in optimizer.params.items()},
            "state": optimizer.state,
            "steps": optimizer.step_count,
            "s": elapsed_s,
        },
        part,
    )
    part.replace(path)


def train(work: Path, minutes: float) -> None:
    state_path = work / "state.pt"
    optimizer = Optimizer(init_params(seed=0))
    elapsed_before = 0.0
    if state_path.exists():
        saved = torch.load(state_path)
        optimizer = Optimizer({name: value.requires_grad_() for name, value in saved["params"].items()})
        optimizer.state, optimizer.step_count, elapsed_before = saved["state"], saved["steps"], saved["s"]
    params = optimizer.params
    print(f"{sum(p.numel() for p in params.values()) / 1e6:.2f} M parameters, starting at step {optimizer.step_count}", flush=True)

    corpus = Corpus(work, "train", seed=optimizer.step_count)
    log = (work / "log.jsonl").open("a")
    start = last_eval = time.monotonic()
    tokens_seen, smooth = 0, None
    while True:
        elapsed = elapsed_before + time.monotonic() - start
        progress = elapsed / (60 * minutes)
        if progress >= 1:
            break
        length = 256 if progress < LATE else 512 if progress < EXACT else 1024
        tokens = corpus.batch(8192 // length, length, MIXTURE if progress < LATE else LATE_MIXTURE)
        loss, balance = loss_of(params, tokens, capped=progress >= EXACT)
        (loss + BALANCE_WEIGHT * balance).backward()
        optimizer.step(learning_rate(progress, optimizer.step_count))
        tokens_seen += 8192
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if optimizer.step_count % 20 == 0:
            rate = tokens_seen / (time.monotonic() - start)
            print(
                f"step {optimizer.step_count} {progress:6.1%} loss {smooth:.4f} balance {balance.item():.3f} {rate:,.0f} tokens/s",
                flush=True,
            )
        if time.monotonic() - last_eval > 600:
            last_eval = time.monotonic()
            save(state_path, optimizer, elapsed)
            row = {
                "step": optimizer.step_count,
                "minutes": round(elapsed / 60, 1),
                "loss": smooth,
                "bits_per_byte": evaluate(params, work, batches=2, length=256),
            }
            print(row, flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
    save(state_path, optimizer, 60 * minutes)
    np.savez(work / "params.npz", **{name: value.detach().numpy() for name, value in params.items()})
    row = {
        "step": optimizer.step_count,
        "minutes": minutes,
        "loss": smooth,
        "bits_per_byte": evaluate(params, work, batches=16, length=1024),
    }
    print(row)
    log.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    args = parser.parse_args()
    train(args.work, args.minutes)


if __name__ == "__main__":
    main()
