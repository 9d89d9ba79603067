"""The information extraction module (IEM) and its gate. The design is ours, in the spirit of the IESSP
paper's abstract (Sensors 25(7):2261, 2025); no equation of the paper was available.

    q[c]    = running variance of the input channel x_c                              what a channel says
    e[k,t]  = sqrt(sum_c W[k,c,t]^2 q[c]),  divided by its rms over the layer         what a stripe adds
    a[k,t]  = sum_c W[k,c,t]^2 alive[c] / sum_c W[k,c,t]^2                          what upstream leaves of it
    m       = RECEIVE mean_p mean_k h_p,  p the producers of x                        their message
    h[k]    = relu(FC1 [e[k,:], a[k,:], m])
    y[k,:]  = FC2 h[k] - mean_k' FC2 h[k']
    z       = gain e + y + b
    M       = sigmoid((z - theta) / tau),   g = M [z >= theta] with the gradient of M

theta is the threshold that meets the budget's falling target (`StripeLoss` sets it anew `remasks` times on the way):
what is learned is which stripes live, not how many. The best stripe of a layer always lives.

Without `exact` M = sigmoid(z / tau), gain e is centred with y, and theta is 0, so that M > 1/2 lives, unless that
would leave less than the target. Adam moves all gates under pressure at one speed; they then keep far more than the
target until shortly before `meet` and fall at once. `iessp demo` still uses it: 3 to 5 test errors of 359,
exact gates 9 at the same rate of 0.05, which makes masks flap.

FC1, FC2, RECEIVE and gain are shared by the filters of a layer: about 600 weights for 3x3. b is free.
Variance, not power: a channel that a dead filter left constant says nothing, its constant folds into the
next bias, and pruning upstream so lowers what reads it. e, a and the messages are statistics, without a
gradient (`through_information` lets it pass through e). The mean over the filters is taken out of y because
otherwise the module drops whole taps, the same in every filter of a layer.

Tried in place of e and lost, far behind magnitude: the running square of the gate's gradient, over the whole network
or a layer. A dead stripe's gradient is large because it is dead, so that masks flap by the thousand; with the dead kept
dead whole layers died out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from iessp.gate import StripeGate, above
from iessp.network import Network, Site

HIDDEN = 16  # units of h
MESSAGE = 4  # numbers of m


def straight_through(soft: Tensor, live: Tensor, hard: bool = False) -> Tensor:
    """M (1, if hard) where live, else 0, going forward; the gradient of M going back, so that a dead stripe can
    return."""
    return soft + ((live.to(soft.dtype) if hard else soft * live) - soft).detach()


class IEMGate(StripeGate):
    """The gate at the top of this file. A pure function of its parameters and buffers; `observe` writes the
    buffers.
    """

    options: ClassVar[dict[str, Any]] = {
        "module": True,  # False: z = b, a free gate
        "message": True,  # False: m = 0
        "aliveness": True,  # False: a = 1
        "statistic": True,  # False: q = 1, so that e is the norm of the stripe
        "centre": True,  # False: y keeps its mean over the filters
        "exact": True,  # False: lives above 0, so that how many live is learned, too; all of y is centred
        "hard": False,  # True: a stripe that lives is multiplied by 1, not by its M
        "through_information": False,  # True: the gate's gradient reaches W through e
        "bias": 2.0,  # where b starts: sigmoid(2) = 0.88
        "gain": 1.0,  # where gain starts: how strongly z follows e before anything is learned
        "momentum": 0.05,  # of the running moments of x
    }

    theta: Tensor
    moments: Tensor
    passes: Tensor
    features: Tensor
    inbox: Tensor
    outbox: Tensor
    alive: Tensor

    def __init__(self, conv: nn.Conv2d, site: Site, network: Network, **options: Any):
        super().__init__(conv, site, network)
        self.use = {**self.options, **options}
        self.exact = bool(self.use["exact"])
        self.groups = conv.groups
        self.upstream: tuple[IEMGate, ...] = ()  # set by attach, once all gates exist
        k, r, s = site.stripe_shape
        taps, device = r * s, conv.weight.device
        self.register_buffer("theta", torch.zeros((), device=device))
        self.bias = nn.Parameter(torch.full(site.stripe_shape, float(self.use["bias"]), device=device))
        if not self.use["module"]:
            return
        self.gain = nn.Parameter(torch.tensor(float(self.use["gain"]), device=device))
        self.receive = nn.Linear(HIDDEN, MESSAGE, device=device)
        self.fc1 = nn.Linear(2 * taps + MESSAGE, HIDDEN, device=device)
        self.fc2 = nn.Linear(HIDDEN, taps, bias=False, device=device)
        nn.init.normal_(self.fc2.weight, std=0.01)  # at first z follows e alone
        self.register_buffer("moments", torch.zeros(2, conv.in_channels, device=device))  # E x, E x^2
        self.register_buffer("passes", torch.zeros((), device=device))
        self.register_buffer("features", torch.ones(k, 2 * taps, device=device))  # e, a
        self.register_buffer("inbox", torch.zeros(HIDDEN, device=device))  # mean_p mean_k h_p
        self.register_buffer("outbox", torch.zeros(HIDDEN, device=device))  # mean_k h
        self.register_buffer("alive", torch.ones(k, device=device))  # filters with a live stripe

    # -- from parameters and buffers to the gate

    def forward(self, weight: Tensor) -> Tensor:
        if self.phase != "learn" or not self.use["through_information"]:
            return super().forward(weight)
        return weight * self.learned(weight).to(weight.dtype).unsqueeze(1)

    def learned(self, weight: Tensor | None = None) -> Tensor:
        z = self.logits(weight)
        live = above(z.detach(), self.theta)
        return straight_through(self._sigmoid(z), live, bool(self.use["hard"]))

    def soft(self) -> Tensor:
        return self._sigmoid(self.logits()) if self.phase == "learn" else self.gate()

    def _sigmoid(self, z: Tensor) -> Tensor:
        return torch.sigmoid((z - self.theta if self.exact else z) / self.tau)

    def logits(self, weight: Tensor | None = None) -> Tensor:
        """z [K, R, S]; with the weight given, e is computed from it and carries its gradient."""
        if not self.use["module"]:
            return self.bias
        features = self.features.clone()  # observe() of a later pass writes it
        if weight is not None:
            e = self._information(self._energy(weight, self.variance()[None])[:, 0])
            features = torch.cat([e, features[:, e.shape[1] :]], dim=1)
        e, y = self.gain * features[:, : self.fc2.out_features], self.fc2(self.hidden(features))
        if not self.exact:
            e, y = 0.0, e + y  # type: ignore[assignment]
        if self.use["centre"]:
            y = y - y.mean(0)
        return (e + y).view_as(self.bias) + self.bias

    def hidden(self, features: Tensor) -> Tensor:
        """h [K, HIDDEN]."""
        message = self.receive(self.inbox.clone()) if self.use["message"] else self.inbox.new_zeros(MESSAGE)
        return F.relu(self.fc1(torch.cat([features, message.expand(len(features), MESSAGE)], dim=1)))

    def live(self) -> Tensor:
        return above(self.logits().detach(), self.theta) if self.phase == "learn" else super().live()

    def wanted(self) -> Tensor:
        if self.phase != "learn" or self.exact:
            return super().wanted()
        return above(self.logits().detach(), 0.0)

    @torch.no_grad()
    def keep_above(self, score: float) -> None:
        self.theta = torch.full_like(self.theta, score if self.exact else min(0.0, score))

    def scores(self, weight: Tensor) -> Tensor:
        return self.logits()

    def magnitude(self) -> Tensor:
        return torch.ones_like(self.value) if self.use["hard"] else self._sigmoid(self.logits())

    # -- from what passes through the layer to the buffers

    @torch.no_grad()
    def observe(self, conv: nn.Conv2d, args: tuple[Tensor, ...]) -> None:
        if not conv.training or self.phase == "settled" or not self.use["module"]:
            return
        if self.use["statistic"]:
            self._observe_moments(args[0])
        alive = torch.ones_like(self.moments[0])
        if self.upstream:
            self.inbox.copy_(torch.stack([p.outbox for p in self.upstream]).mean(0))
            if self.use["aliveness"]:
                alive = torch.stack([p.alive for p in self.upstream]).amax(0)
        rows = torch.stack([self.variance(), alive, torch.ones_like(alive)])
        informed, left, total = self._energy(self.original(conv), rows).unbind(1)
        share = left / total.clamp_min(1e-30)
        self.features.copy_(torch.cat([self._information(informed), share], dim=1))
        self.outbox.copy_(self.hidden(self.features).mean(0))
        if self.phase == "learn":
            self.alive.copy_(self.live().flatten(1).any(1))

    def variance(self) -> Tensor:
        """q [C]."""
        if not self.use["statistic"]:
            return torch.ones_like(self.moments[0])
        return (self.moments[1] - self.moments[0].square()).clamp_min(0)

    def _observe_moments(self, x: Tensor) -> None:
        """Running E x and E x^2 over batch and positions, on all ranks those of the ranks' batches
        together.
        """
        x = x.detach().to(self.moments.dtype)
        dims = (0, 2, 3) if x.dim() == 4 else (1, 2)
        moments = torch.stack([x.mean(dims), x.square().mean(dims)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        moments = torch.where(moments.isfinite(), moments, self.moments)  # a pass that overflows says nothing
        self.passes += 1
        self.moments.lerp_(moments, torch.clamp_min(1 / self.passes, float(self.use["momentum"])))

    def _energy(self, weight: Tensor, per_channel: Tensor) -> Tensor:
        """sum_c W[k,c,t]^2 v[i,c] for every row i: weight [K, C/g, R, S], per_channel [I, C] -> [K, I,
        R*S].
        """
        rows = per_channel.view(len(per_channel), self.groups, -1).transpose(0, 1)  # [G, I, C/g]
        energy = (
            weight.to(per_channel.dtype).square().flatten(2).unflatten(0, (self.groups, -1))
        )  # [G, K/g, C/g, T]
        return torch.matmul(rows.unsqueeze(1), energy).flatten(0, 1)

    @staticmethod
    def _information(energy: Tensor) -> Tensor:
        """e [K, T] of its square before the normalisation."""
        return torch.sqrt(energy + 1e-12) / (energy.mean() + 1e-12).sqrt()
