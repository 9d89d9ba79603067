"""The information extraction module (IEM) and its gate. The design is ours, in the spirit of the IESSP
paper's abstract (Sensors 25(7):2261, 2025); no equation of the paper was available.

    q[c]    = running variance of the input channel x_c                                    what a channel says
    e[k,t]  = sqrt(sum_c W[k,c,t]^2 q[c]),  divided by its rms over the layer               what a stripe adds
    a[k,t]  = sum_c W[k,c,t]^2 alive[c] / sum_c W[k,c,t]^2                                   what upstream
    leaves of it m       = mean over the producers p of  send_p(mean_k h_p)
    their message h[k]    = relu(FC1 [e[k,:], a[k,:], m])
    z[k,:]  = FC2 h[k] - mean_k' FC2 h[k'] + b[k,:]
    M       = sigmoid(z / tau),   g = M (M > 1/2) with the gradient of M

FC1, FC2 and send are shared by the filters of a layer: about 700 weights for 3x3. Variance, not power: a
channel that a dead filter left constant says nothing, its constant folds into the next bias, and pruning
upstream so lowers what reads it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from iessp.gate import StripeGate
from iessp.network import Network, Site

MESSAGE = 4  # numbers a layer sends to the layers that read it
SPARE_UNITS = 7  # hidden units beyond one for each tap


def straight_through(soft: Tensor) -> Tensor:
    """M * (M > 1/2) going forward, the gradient of M going back, so that a dead stripe can return."""
    return soft + (soft * (soft > 0.5) - soft).detach()


class IEMGate(StripeGate):
    """z = module(information, aliveness, message) + free bias; see the top of the file."""

    options: ClassVar[dict[str, object]] = {
        "module": True,  # False: z = b, a free gate
        "message": True,  # False: m = 0
        "aliveness": True,  # False: a = 1
        "statistic": True,  # False: q = 1, so e is the norm of the stripe
        "centre": True,  # False: the module may move whole taps of a layer at once
        "through_information": False,  # True: the gate's gradient reaches W through e
        "bias": 3.0,  # where b starts: sigmoid(3) = 0.95
        "gain": 1.0,  # how strongly z follows e before anything is learned
        "momentum": 0.05,  # of the running moments of x
    }

    def __init__(self, conv: nn.Conv2d, site: Site, network: Network, **options: object):
        super().__init__(conv, site, network)
        self.use = {**self.options, **options}
        self.upstream: tuple[IEMGate, ...] = ()
        k, r, s = site.stripe_shape
        taps, hidden, device = r * s, r * s + SPARE_UNITS, conv.weight.device
        self.groups, self.stop_information = conv.groups, not self.use["through_information"]
        self.bias = nn.Parameter(torch.full(site.stripe_shape, float(self.use["bias"]), device=device))
        if self.use["module"]:
            self.fc1 = nn.Linear(2 * taps + MESSAGE, hidden, device=device)
            self.fc2 = nn.Linear(hidden, taps, bias=False, device=device)
            self.send = nn.Linear(hidden, MESSAGE, device=device)
            self._start_from_information(taps)
        self.register_buffer("moments", torch.zeros(2, conv.in_channels, device=device))  # E x, E x^2
        self.register_buffer("seen", torch.zeros((), device=device))
        self.register_buffer("information", torch.ones(k, taps, device=device))
        self.register_buffer("alive", torch.ones(conv.in_channels, device=device))
        self.register_buffer("share", torch.ones(k, taps, device=device))
        self.register_buffer("inbox", torch.zeros(MESSAGE, device=device))

    @torch.no_grad()
    def _start_from_information(self, taps: int) -> None:
        """At first unit t passes e_t on (e >= 0, so relu keeps it) and z = gain (e - mean_k e) + b; the rest
        is small."""
        for layer in (self.fc1, self.fc2):
            layer.weight.mul_(0.1)
        self.fc1.bias.zero_()
        for t in range(taps):
            self.fc1.weight[t].zero_()
            self.fc1.weight[t, t] = 1.0
            self.fc2.weight[t, t] = float(self.use["gain"])

    # -- from parameters and buffers to the gate

    def hidden(self, message: Tensor, weight: Tensor | None = None) -> Tensor:
        """h [K, R*S + 7]."""
        # Copies, because observe() writes these buffers while an earlier pass may still wait for its
        # backward.
        e, share = self.information.clone(), self.share.clone()
        if weight is not None and not self.stop_information:
            e = torch.sqrt(self._weighted_energy(weight, self.variance()[None])[:, 0] + 1e-12)
        e = e / e.square().mean().add(1e-12).sqrt()
        return F.relu(self.fc1(torch.cat([e, share, message.expand(len(e), MESSAGE)], dim=1)))

    def message(self) -> Tensor:
        """m [4]. Its gradient reaches the modules that sent it, not those that sent to them."""
        if not (self.use["message"] and self.upstream):
            return torch.zeros_like(self.inbox)
        return torch.stack([p.send(p.hidden(p.inbox.clone()).mean(0)) for p in self.upstream]).mean(0)

    def logits(self, weight: Tensor | None = None) -> Tensor:
        """z [K, R, S]."""
        if not self.use["module"]:
            return self.bias
        z = self.fc2(self.hidden(self.message(), weight))
        if self.use["centre"]:
            z = z - z.mean(0)
        return z.view_as(self.bias) + self.bias

    def soft(self, weight: Tensor | None = None) -> Tensor:
        return torch.sigmoid(self.logits(weight) / self.tau.clone()) if self.phase == "learn" else self.gate()

    def learned(self, weight: Tensor | None = None) -> Tensor:
        return straight_through(self.soft(weight))

    def forward(self, weight: Tensor) -> Tensor:
        if self.phase != "learn" or self.stop_information:
            return super().forward(weight)
        return weight * self.learned(weight).to(weight.dtype).unsqueeze(1)

    def scores(self, weight: Tensor) -> Tensor:
        return self.logits(weight)

    def magnitude(self) -> Tensor:
        return torch.sigmoid(self.logits() / self.tau)

    # -- from what passes through the layer to the buffers

    def variance(self) -> Tensor:
        """q [C]."""
        if not self.use["statistic"]:
            return torch.ones_like(self.moments[0])
        return (self.moments[1] - self.moments[0].square()).clamp_min(0)

    def _weighted_energy(self, weight: Tensor, per_channel: Tensor) -> Tensor:
        """sum_c W[k,c,t]^2 v[i,c] for every row i: weight [K, C/g, R, S], per_channel [I, C] -> [K, I,
        R*S]."""
        rows = per_channel.view(len(per_channel), self.groups, -1).transpose(0, 1)  # [G, I, C/g]
        energy = weight.float().square().flatten(2).unflatten(0, (self.groups, -1))  # [G, K/g, C/g, T]
        return torch.matmul(rows.unsqueeze(1), energy).flatten(0, 1)

    @torch.no_grad()
    def observe(self, conv: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        if not conv.training or self.phase == "settled" or not self.use["module"]:
            return
        if self.use["statistic"]:
            self._observe_moments(args[0])
        if self.use["aliveness"] and self.upstream:
            live = [p.live().flatten(1).any(1) for p in self.upstream]
            self.alive.copy_(torch.stack(live).any(0))
        weight = conv.parametrizations.weight.original
        rows = torch.stack([self.variance(), self.alive, torch.ones_like(self.alive)])
        informed, alive, total = self._weighted_energy(weight, rows).unbind(1)
        self.information.copy_(informed.sqrt())
        self.share.copy_(alive / total.clamp_min(1e-30))
        self.inbox.copy_(self.message())

    def _observe_moments(self, x: Tensor) -> None:
        """Running E x and E x^2 over batch and positions; equal on all ranks, as one batch of all of them
        would give."""
        x = x.detach().float()
        dims = (0, 2, 3) if x.dim() == 4 else (1, 2)
        moments = torch.stack([x.mean(dims), x.square().mean(dims)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        self.seen += 1
        self.moments.lerp_(moments, torch.clamp_min(1 / self.seen, float(self.use["momentum"])))
