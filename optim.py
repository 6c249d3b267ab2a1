"""
Optimizers and schedules: AdamW in groups, Muon for the matrices of the blocks, the learning rate of a step.

    optimizers = make_optimizers(model.named_parameters(), 'muon', learning_rate=3e-3)     any torch optimizer does, too
    for group in optimizers.param_groups:
        group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_factor(step, 'cosine', warmup, max_iters, 0.1)

Papers: AdamW (arXiv:1711.05101), Muon (arXiv:2502.16982), LoRA+ (arXiv:2402.12354), cosine decay (arXiv:1608.03983),
warmup-stable-decay (arXiv:2404.06395).
"""
import math
import re

from runtime import has_bfloat16

import torch


def lr_factor(step, schedule, warmup, decay, floor, decay_frac=0.5):
    """The learning rate at a step as a fraction of its peak; warmup and decay in steps; floor = end / peak."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == 'constant':
        return 1.0
    begin = max(warmup, decay * (1 - decay_frac)) if schedule == 'wsd' else warmup
    t = min(1.0, max(0.0, (step - begin) / max(1, decay - begin)))  # 0 at the beginning of the decay, 1 at its end
    return floor + (1 - floor) * ((1 + math.cos(math.pi * t)) / 2 if schedule == 'cosine' else 1 - t)


class Optimizers(list):
    """Several torch optimizers that step as one."""

    @property
    def param_groups(self):
        return [group for optimizer in self for group in optimizer.param_groups]

    def step(self):
        for optimizer in self:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad()


def make_optimizers(named_parameters, optimizer='adamw', learning_rate=6e-4, weight_decay=0.1, betas=(0.9, 0.95),
                    embed_lr=0.0, muon_lr=0.02, muon_momentum=0.95, lora_lr_ratio=1.0):
    """Optimizers of named parameters, those that are trained. ValueError for an unknown name, and for a ratio that no
    parameter has.

    'adamw': weight decay on matrices only. 'muon': the matrices of the blocks by Muon, experts' stacks too; routers,
    LoRA, adapters, embeddings, head and vectors by AdamW. embed_lr: of the token embedding, 0 = learning_rate.
    lora_lr_ratio: learning rate of LoRA's B, and DoRA's magnitudes, over that of A (LoRA+).
    """
    if optimizer not in ('adamw', 'muon'):
        raise ValueError(f"optimizer={optimizer!r} is not one of 'adamw', 'muon'")
    params = {name: p for name, p in named_parameters if p.requires_grad}
    hidden = [p for n, p in params.items() if re.search(r'(^|\.)(blocks|encoder|future)\.', n) and p.ndim >= 2
              and not any(part in n for part in ('router', '.lora_', '.adapter')) and optimizer == 'muon']
    taken = {id(p) for p in hidden}
    # the authors' code of LoRA+ has vectors learn as fast as B, and so has PEFT's: DoRA's magnitudes are some
    faster = ('lora_b', 'lora_magnitude') if lora_lr_ratio != 1 else ()
    if faster and not any(n.endswith(faster) for n in params):
        raise ValueError(f'lora_lr_ratio={lora_lr_ratio}: there is no LoRA to train: give --lora_rank, or drop it')
    kinds = {n: 'embedding' if n.endswith('tok_emb.weight') else 'faster' if n.endswith(faster) else 'other'
             for n in params}
    rates = {'embedding': embed_lr or learning_rate, 'other': learning_rate, 'faster': learning_rate * lora_lr_ratio}
    groups = []
    for kind, rate in rates.items():
        for is_matrix in (True, False):
            chosen = [p for n, p in params.items() if id(p) not in taken and (p.ndim >= 2) == is_matrix
                      and kinds[n] == kind]
            if chosen:
                groups.append({'params': chosen, 'weight_decay': weight_decay if is_matrix else 0.0, 'lr': rate})
    fused = all(p.device.type in ('cuda', 'cpu') for p in params.values())
    optimizers = Optimizers([torch.optim.AdamW(groups, betas=betas, fused=fused)])
    if hidden:
        matrices, stacks = ([p for p in hidden if p.ndim == n] for n in (2, 3))
        muon = Muon(matrices, lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay)
        if stacks:
            muon.add_param_group({'params': stacks})
        optimizers.append(muon)
    return optimizers


class Muon(torch.optim.Muon):
    """torch.optim.Muon (arXiv:2502.16982), which takes matrices one by one, for stacks, shards and skipped updates.

    Matrices of one shape are orthogonalised together, and so are the experts in a stack (E, rows, columns). Of a matrix
    that is sharded over processes (a DTensor) each orthogonalises the whole, so that sharding changes nothing.
    found_inf: as in torch's fused AdamW, None or a number on the device; where it is 1 the step changes nothing, and
    the host need not know.
    """
    found_inf = None
    _step_supports_amp_scaling = True  # torch's name for an optimizer that honours found_inf

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            keep = 1 if self.found_inf is None else 1 - self.found_inf
            for params in by_shape.values():
                updates = self._updates(params, group, keep)
                if group['weight_decay']:
                    torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'] * keep)
                torch._foreach_sub_(params, updates)

    def _updates(self, params, group, keep):
        """The updates of matrices of one shape, to subtract, sharded as the matrices are; 0 where keep is 0."""
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
        momenta, grads = [self.state[p]['momentum_buffer'] for p in params], [p.grad for p in params]
        if self.found_inf is not None:  # a momentum that moves towards itself stays
            grads = [torch.where(self.found_inf > 0, m, g) for m, g in zip(momenta, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        if group['nesterov']:
            momenta = torch._foreach_lerp(grads, momenta, group['momentum'])
        sharded = hasattr(momenta[0], 'full_tensor')
        stack = torch.stack([m.full_tensor() for m in momenta] if sharded else momenta)
        rate = group['lr'] * math.sqrt(max(1, stack.shape[-2] / stack.shape[-1]))
        # never by a timing, which may come out otherwise in a resumed run or in the process beside
        dtype = torch.bfloat16 if has_bfloat16(str(stack.device)) else torch.float32
        flat = orthogonalize(stack.flatten(0, -3), group['ns_coefficients'], group['ns_steps'], group['eps'], dtype)
        updates = (flat.view(stack.shape).float() * (rate * keep)).unbind()
        if sharded:
            from torch.distributed.tensor import distribute_tensor
            updates = [distribute_tensor(u, p.device_mesh, p.placements, src_data_rank=None)
                       for u, p in zip(updates, params, strict=True)]
        return updates


def orthogonalize(x, coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7, dtype=torch.bfloat16):
    """(n, rows, columns) -> about U V^T of each matrix U S V^T, in dtype, by Newton-Schulz iterations (Muon's)."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
