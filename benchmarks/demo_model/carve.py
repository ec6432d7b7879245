"""Carves each SwiGLU layer of a dense Llama-shaped model into a shared expert and routed experts, without training.

Neurons that contribute most on average form the shared expert; the rest is clustered by co-activation into experts of
equal size. Routers start as a ridge regression of each expert's contribution, the down projection gets a low-rank
correction.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


@dataclass(frozen=True)
class Shape:
    """How a layer's neurons are divided; `shared + experts * width` is the dense intermediate size."""

    shared: int
    experts: int
    width: int
    top_k: int
    rank_gate: int = 8
    rank_down: int = 16
    rank_attention: int = 8

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class LowRank(nn.Module):
    """A linear layer's frozen weight plus a trainable product of two thin matrices."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)


class CarvedMLP(nn.Module):
    """The carved layer in masked dense form: every neuron is computed, then weighted by its expert's routing weight."""

    def __init__(self, mlp: nn.Module, order: Tensor, router: Tensor, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("order", order)
        self.gate = LowRank(mlp.gate_proj.weight[order], shape.rank_gate)
        self.up = LowRank(mlp.up_proj.weight[order], shape.rank_gate)
        self.down = LowRank(mlp.down_proj.weight[:, order], shape.rank_down)
        self.router = nn.Parameter(router.clone())
        self.random: torch.Generator | None = None  # set: random experts with the same weights

    def scales(self, x: Tensor) -> Tensor:
        """[N, H] -> [N, I]: 1 for shared neurons, k times the routing weight for routed ones."""
        shape = self.shape
        top, index = F.linear(x, self.router).topk(shape.top_k, dim=-1)  # [N, K]
        if self.random is not None:
            index = torch.rand(x.shape[0], shape.experts, generator=self.random).topk(shape.top_k, dim=-1).indices
        weights = top.float().softmax(-1) * shape.top_k
        routed = torch.zeros(x.shape[0], shape.experts).scatter(1, index, weights)
        return torch.cat([x.new_ones(x.shape[0], shape.shared), routed.repeat_interleave(shape.width, 1)], 1)

    def neurons(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return self.down(self.neurons(flat) * self.scales(flat)).view_as(x)


def balanced_clusters(points: Tensor, clusters: int, *, rounds: int = 12, seed: int = 0) -> Tensor:
    """Cluster ids [N] of unit vectors [N, D]; every cluster has N / clusters members."""
    size = points.shape[0] // clusters
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(points.shape[0], generator=generator)[:clusters]]
    ids = torch.zeros(points.shape[0], dtype=torch.long)
    for _ in range(rounds):
        closeness = points @ centres.T  # [N, C]
        room = [size] * clusters
        best = closeness.topk(2, dim=1).values
        for i in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():  # those with most to lose choose first
            for c in closeness[i].argsort(descending=True).tolist():
                if room[c]:
                    room[c] -= 1
                    ids[i] = c
                    break
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, ids, points), dim=1)
    return ids


def neuron_order(contribution: Tensor, weight: Tensor, shape: Shape, *, sample: int = 4096) -> Tensor:
    """Order of neurons [I], shared ones first, then expert by expert: of contributions [N, I], token weights [N, 1]."""
    by_mean = (contribution * weight).mean(0).argsort(descending=True)
    shared, rest = by_mean[: shape.shared], by_mean[shape.shared :]
    step = max(1, contribution.shape[0] // sample)
    points = contribution[::step][:, rest].sqrt().T
    ids = balanced_clusters(F.normalize(points - points.mean(1, keepdim=True), dim=1), shape.experts)
    return torch.cat([shared.sort().values, rest[ids.argsort(stable=True)]])


def ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """[N, D], [N, M] -> [D, M]."""
    gram = x.T @ x
    gram.diagonal().add_(strength * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y)


def expert_norms(neurons: Tensor, down: Tensor, shape: Shape) -> Tensor:
    """Norm of every routed expert's output [N, E], from neuron outputs [N, I] and the down projection [H, I]."""
    parts = neurons[:, shape.shared :].view(-1, shape.experts, shape.width)
    weights = down[:, shape.shared :].T.reshape(shape.experts, shape.width, -1)
    gram = weights @ weights.transpose(1, 2)  # [E, W, W]
    return (torch.einsum("new,ewv->nev", parts, gram) * parts).sum(-1).clamp_min(0).sqrt()


@torch.no_grad()
def carve_layer(mlp: nn.Module, x: Tensor, shape: Shape, *, router_scale: float = 1.0) -> tuple[CarvedMLP, float]:
    """One carved layer from its inputs [N, H], and the relative error of its output."""
    target = mlp(x)
    # The first token of a text carries activations a hundred times the others', and the model falls apart without them.
    # So errors are relative to a token's size, and the few huge tokens count as much as a tenth of the others together.
    size = target.norm(dim=1, keepdim=True)
    huge = size > 8 * size.median()
    weight = torch.where(huge, 0.1 * len(x) / huge.sum().clamp_min(1), torch.tensor(1.0))  # [N, 1]
    neurons = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
    contribution = neurons.abs() * mlp.down_proj.weight.norm(dim=0) / size
    order = neuron_order(contribution, weight, shape)
    neurons = neurons[:, order]
    norms = expert_norms(neurons, mlp.down_proj.weight[:, order], shape) / size
    # No bias in the router: the mean is explained by the inputs themselves. Centring over experts changes no routing.
    router = ridge(x, norms / norms.std(1, keepdim=True).mean(), 1e-3).T
    router = (router - router.mean(0)) * router_scale
    carved = CarvedMLP(mlp, order, router, shape)
    scale = weight.sqrt() / size
    features = neurons * carved.scales(x)
    left = (target - F.linear(features, carved.down.weight)) * scale
    features = features * scale
    full = ridge(features, left, 1e-2)
    fitted = features @ full
    directions = torch.linalg.eigh(fitted.T @ fitted).eigenvectors[:, -shape.rank_down :].T  # [r, H]
    carved.down.a.copy_((full @ directions.T).T)
    carved.down.b.copy_(directions.T)
    balance = (carved.down.a.norm() / carved.down.b.norm()).sqrt()
    carved.down.a.div_(balance)
    carved.down.b.mul_(balance)
    return carved, refine(carved, x, target, scale)


def refine(carved: CarvedMLP, x: Tensor, target: Tensor, scale: Tensor, *, epochs: int = 3, batch: int = 256) -> float:
    """Trains router and corrections of one layer alone; returns the relative error of the last epoch.

    Args:
        x, target: inputs and wanted outputs [N, H].
        scale: factor of a token's error [N, 1].
    """
    size = carved.router.square().mean().sqrt().item()
    others = [p for name, p in carved.named_parameters() if name != "router"]
    optimizer = torch.optim.Adam([{"params": [carved.router], "lr": 0.02 * size}, {"params": others, "lr": 2e-3}])
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    total = 0.0
    with torch.enable_grad():
        for step in range(steps):
            if step % (len(x) // batch) == 0:
                order, total = torch.randperm(len(x)), 0.0
            part = order[step % (len(x) // batch) * batch :][:batch]
            loss = ((carved(x[part]) - target[part]) * scale[part]).square().sum(1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / (len(x) // batch)
    return total**0.5


@torch.no_grad()
def carve(model: nn.Module, rows: Tensor, shape: Shape, *, router_scale: float = 1.0, batch: int = 8) -> list[float]:
    """Replaces every `mlp` of a Llama model by its carved form; returns the relative error of each layer's output.

    Each layer is fitted on what the carved layers before it give.
    """
    inner = model.model
    hidden = inner.embed_tokens(rows)  # [B, T, H]
    rotary = inner.rotary_emb(hidden, torch.arange(rows.shape[1])[None])
    errors = []
    for layer in tqdm(inner.layers, unit="layer", desc="carving"):
        hidden = torch.cat(
            [
                part
                + layer.self_attn(
                    hidden_states=layer.input_layernorm(part), position_embeddings=rotary, attention_mask=None
                )[0]
                for part in hidden.split(batch)
            ]
        )
        x = layer.post_attention_layernorm(hidden)
        layer.mlp, error = carve_layer(layer.mlp, x.flatten(0, 1), shape, router_scale=router_scale)
        errors.append(error)
        tqdm.write(f"relative error {error:.3f}")
        hidden = hidden + layer.mlp(x)
    return errors
