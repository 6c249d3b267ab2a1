"""
Every architecture of this project in one file that imports only torch: a GPT-2, a Llama-like decoder or a bidirectional
encoder is a choice of GPTConfig's values, and what a value switches is an `if` where it happens.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=65, block_size=64))
    logits = model(idx)                          # (B, T) ids -> (B, T, V)
    loss = model(idx, targets)                   # mean over the targets that are not -100
    new_ids = model.generate([[1, 2, 3], [4]], max_new_tokens=20)

Papers: Attention Is All You Need (arXiv:1706.03762), GPT-2 (Radford et al. 2019), RoFormer (arXiv:2104.09864),
Root Mean Square Layer Normalization (arXiv:1910.07467), GLU Variants Improve Transformer (arXiv:2002.05202),
Primer / squared ReLU (arXiv:2109.08668), GQA (arXiv:2305.13245), QK-norm (arXiv:2010.04245), Muon (arXiv:2502.16982).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The defaults are GPT-2 124M. Raises ValueError with one sentence when values cannot go together."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # number of token ids; a stage takes the tokenizer's unless it is told
    n_layer: int = 12  # number of transformer blocks
    n_head: int = 12  # query heads per block
    n_kv_head: int = 0  # key/value heads: 0 = n_head (multi-head), 1 = multi-query, between = grouped-query
    n_embd: int = 768  # width of the residual stream
    head_dim: int = 0  # width of one head; 0 = n_embd / n_head
    mlp_dim: int = 0  # hidden width of the MLP; 0 = 4 n_embd (swiglu: 8/3 n_embd, rounded up to a multiple of 64)
    mlp: str = 'gelu'  # 'gelu', 'gelu_tanh' (GPT-2's own weights), 'swiglu' or 'relu2'
    norm: str = 'layernorm'  # 'layernorm' or 'rmsnorm'
    norm_place: str = 'pre'  # 'pre' (norm, sublayer, add) or 'post' (sublayer, add, norm)
    norm_affine: bool = True  # learned weight in the norms
    norm_eps: float = 1e-5  # added to the variance
    qk_norm: bool = False  # normalise queries and keys per head, before the rotation
    pos: str = 'learned'  # positions: 'learned', 'sinusoidal', 'rope' or 'none'
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: str = 'none'  # a longer context than trained on: 'linear', 'llama3' or 'yarn' stretch the wavelengths
    rope_factor: float = 1.0  # how many times longer
    rope_original: int = 0  # the context trained on ('llama3', 'yarn'); 0 = block_size / rope_factor
    rope_low: float = 0.0  # turns over that context up to which a wavelength is stretched whole; 0 = 1
    rope_high: float = 0.0  # turns from which it stays as it is; 0 = 4 ('llama3') or 32 ('yarn')
    attn_scale: float = 0.0  # factor on query-key products; 0 = 1 / sqrt(head_dim)
    bias: bool = True  # biases in linear layers and layernorms
    qkv_bias: bool = False  # without bias: one for queries, keys and values all the same (Qwen2)
    tie_weights: bool = True  # the output head shares the token embedding
    causal: bool = True  # False: every token sees all others (encoder)
    dropout: float = 0.0  # on embeddings, attention weights and sublayer outputs
    logit_softcap: float = 0.0  # logits -> cap * tanh(logits / cap); 0 = off
    init_std: float = 0.02  # standard deviation of initial weights; 0 = 1 / sqrt(fan-in), and 1 for embeddings
    zero_init: bool = False  # projections into the residual stream and an untied head start at zero

    def __post_init__(self):
        for name, allowed in (('mlp', ('gelu', 'gelu_tanh', 'swiglu', 'relu2')), ('norm', ('layernorm', 'rmsnorm')),
                              ('norm_place', ('pre', 'post')), ('pos', ('learned', 'sinusoidal', 'rope', 'none')),
                              ('rope_scaling', ('none', 'linear', 'llama3', 'yarn'))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name}={getattr(self, name)!r} is not one of {", ".join(map(repr, allowed))}')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        for name in ('n_kv_head', 'head_dim', 'mlp_dim', 'norm_eps', 'attn_scale', 'logit_softcap', 'init_std',
                     'rope_original', 'rope_low', 'rope_high'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)} must not be negative')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be in [0, 1)')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head} (or set head_dim)')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        default_mlp = -(-8 * self.n_embd // (3 * 64)) * 64 if self.mlp == 'swiglu' else 4 * self.n_embd
        self.mlp_dim = self.mlp_dim or default_mlp
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}')
        if self.pos == 'rope' and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even with pos='rope'")
        if self.pos == 'sinusoidal' and self.n_embd % 2:
            raise ValueError(f"n_embd={self.n_embd} must be even with pos='sinusoidal'")
        if self.rope_scaling != 'none':
            if self.pos != 'rope' or self.rope_factor <= 1:
                raise ValueError(f"rope_scaling={self.rope_scaling!r} needs pos='rope' and a rope_factor above 1")
            self.rope_original = self.rope_original or int(self.block_size / self.rope_factor)
            self.rope_low = self.rope_low or 1.0
            self.rope_high = self.rope_high or (4.0 if self.rope_scaling == 'llama3' else 32.0)
            if self.rope_high <= self.rope_low:
                raise ValueError(f'rope_high={self.rope_high} must be above rope_low={self.rope_low}')


# ----------------------------------------------------------------------------------------------------------------------
# parts of a block

class Norm(nn.Module):
    """LayerNorm, or RMSNorm (arXiv:1910.07467), over the last dimension; weight and bias as the config says."""

    def __init__(self, dim, config):
        super().__init__()
        self.shape, self.eps, self.rms = (dim,), config.norm_eps, config.norm == 'rmsnorm'
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.norm_affine and config.bias and not self.rms else None

    def forward(self, x):
        # weights and x may differ: autocast makes queries and keys 16 bits wide, sharding the weights
        weight, bias = (None if p is None else p.type_as(x) for p in (self.weight, self.bias))
        if self.rms:
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, bias, self.eps)


def frequencies(dim, theta, device=None):
    """theta^(-2i / dim) for i below dim / 2, in radians per position (arXiv:1706.03762): (dim / 2,) float32."""
    return theta ** (-torch.arange(0, dim, 2, device=device).float() / dim)


def sinusoidal(positions, dim):
    """The sines (even columns) and cosines (odd) of section 3.5 of arXiv:1706.03762: (…,) -> (…, dim) float32."""
    a = positions.float()[..., None] * frequencies(dim, 10000.0, positions.device)
    return torch.stack((a.sin(), a.cos()), dim=-1).flatten(-2)


def rope_tables(config):
    """cos and sin (block_size, head_dim) of `apply_rope`, with the wavelengths stretched as rope_scaling says.

    'linear' (arXiv:2306.15595) stretches all of them by rope_factor; the others keep those that turn often within the
    original context: 'llama3' (arXiv:2407.21783) blends by the number of turns, 'yarn' (arXiv:2309.00071) by the index
    of the pair, and sharpens attention by 0.1 ln(rope_factor) + 1, here a factor on both tables.
    """
    f, dim = frequencies(config.head_dim, config.rope_theta), config.head_dim
    sharpen, low, high = 1.0, config.rope_low, config.rope_high
    if config.rope_scaling == 'linear':
        f = f / config.rope_factor
    elif config.rope_scaling == 'llama3':
        turns = config.rope_original * f / (2 * math.pi)
        stay = ((turns - low) / (high - low)).clamp(0, 1)
        f = f * stay + f / config.rope_factor * (1 - stay)
    elif config.rope_scaling == 'yarn':
        first, last = (dim * math.log(config.rope_original / (n * 2 * math.pi)) / (2 * math.log(config.rope_theta))
                       for n in (high, low))  # the pairs that make so many turns
        first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
        stretch = ((torch.arange(dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        f = f * (1 - stretch) + f / config.rope_factor * stretch
        sharpen = 0.1 * math.log(config.rope_factor) + 1
    a = torch.arange(config.block_size).float()[:, None] * f
    cos, sin = a.cos() * sharpen, a.sin() * sharpen
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def apply_rope(x, cos, sin):
    """Rotates the pairs (x[i], x[i + D/2]) of x (B, T, H, D), the half-split convention of Llama (arXiv:2104.09864).

    cos and sin (…, T, 1, D) hold each pair's value twice, the sine negative in the first half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary positions, QK-norm and a KV cache by flag."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.scale = config.attn_scale or 1 / math.sqrt(config.head_dim)
        self.dropout, self.causal = config.dropout, config.causal
        # queries, keys and values of all heads in one matrix: rows are q heads, then k heads, then v heads
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim,
                             bias=config.bias or config.qkv_bias)
        self.proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = Norm(self.head_dim, config) if config.qk_norm else None
        self.k_norm = Norm(self.head_dim, config) if config.qk_norm else None

    def forward(self, x, rope=None, mask=None, cache=None):
        B, T, _ = x.shape
        heads = (self.n_head, self.n_kv_head)
        qkv = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        qk, v = qkv.split((sum(heads), self.n_kv_head), dim=2)
        if self.q_norm is not None and self.q_norm.weight is None:
            qk = self.q_norm(qk)  # without weights the two norms are one
        elif self.q_norm is not None:
            q, k = qk.split(heads, dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if rope is not None:
            qk = apply_rope(qk, *(table.type_as(qk) for table in rope))
        q, k, v = (t.transpose(1, 2) for t in (*qk.split(heads, dim=2), v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None and T > 1, scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0, enable_gqa=self.n_kv_head != self.n_head)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class MLP(nn.Module):
    """The feed-forward half of a block: GELU, SwiGLU (arXiv:2002.05202) or squared ReLU (arXiv:2109.08668)."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.gate = nn.Linear(config.n_embd, config.mlp_dim, bias=config.bias) if self.kind == 'swiglu' else None
        self.up = nn.Linear(config.n_embd, config.mlp_dim, bias=config.bias)
        self.down = nn.Linear(config.mlp_dim, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.kind == 'swiglu':
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == 'relu2':
            return self.down(F.relu(self.up(x)).square())
        return self.down(F.gelu(self.up(x), approximate='tanh' if self.kind == 'gelu_tanh' else 'none'))


class Block(nn.Module):
    """Attention, then MLP, each with its residual; the norm stands before the sublayer or after the addition."""

    def __init__(self, config):
        super().__init__()
        self.post = config.norm_place == 'post'
        self.norm1 = Norm(config.n_embd, config)
        self.attn = Attention(config)
        self.norm2 = Norm(config.n_embd, config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.recompute = False  # activation checkpointing (arXiv:1604.06174): the backward pass computes it all again

    def forward(self, x, rope=None, mask=None, cache=None):
        if cache is not None:  # never compiled, should `sublayers` be: a cache grows at every step
            return Block.sublayers(self, x, rope, mask, cache)
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self.sublayers, x, rope, mask, use_reentrant=False)
        return self.sublayers(x, rope, mask)

    def sublayers(self, x, rope=None, mask=None, cache=None):
        if self.post:
            x = self.norm1(x + self.drop(self.attn(x, rope, mask, cache)))
            return self.norm2(x + self.drop(self.mlp(x)))
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, cache))
        return x + self.drop(self.mlp(self.norm2(x)))


# ----------------------------------------------------------------------------------------------------------------------
# the loss, without ever holding all logits in float32

def chunk_rows(vocab_size, device_type):
    """Rows of logits held at a time: 4 MB in a CPU's cache, 256 MB on a GPU, but enough for an efficient product."""
    return max(256, (1 << 20 if device_type == 'cpu' else 1 << 26) // vocab_size)


def _softcap(logits, cap):
    return cap * torch.tanh(logits / cap) if cap else logits


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of h @ w.T against targets, a chunk of rows at a time, so that (N, V) never exists.

    The gradient of a softmax needs only the logits, so for a summed loss it is taken in the same pass over the chunks;
    a per-token loss has a gradient of its own for each token, so there the chunk is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, h, w, targets, cap, per_token, learning):
        """h (N, C), w (V, C), targets (N,) with -100 to skip -> losses (N,) float32, or their sum.

        cap: of the logits, 0 = none. learning: whether a backward may follow.
        """
        losses = torch.zeros(len(h), dtype=torch.float32, device=h.device)
        ones = losses.new_ones(len(h))
        grads_now = learning and not per_token
        dh, dw = LinearCrossEntropy.walk(h, w, targets, cap, ones if grads_now else None, losses)
        ctx.cap, ctx.per_token = cap, per_token
        ctx.save_for_backward(*((h, w, targets) if per_token else (dh, dw)))
        return losses if per_token else losses.sum()

    @staticmethod
    def backward(ctx, g):
        if ctx.per_token:
            h, w, targets = ctx.saved_tensors
            dh, dw = LinearCrossEntropy.walk(h, w, targets, ctx.cap, g, None)
        else:
            dh, dw = ctx.saved_tensors
            dh, dw = dh * g, dw * g
        return dh, dw.to(dh.dtype), None, None, None, None

    @staticmethod
    def walk(h, w, targets, cap, g, losses):
        """Fills losses (N,) where given; returns gradients of sum(g * loss) for h and w where g (N,) is given."""
        dh, dw = (torch.empty_like(h), torch.zeros_like(w, dtype=torch.float32)) if g is not None else (None, None)
        rows = chunk_rows(len(w), h.device.type)
        for i in range(0, len(h), rows):
            hc, tc = h[i:i + rows], targets[i:i + rows]
            logits = _softcap((hc @ w.T).float(), cap)
            valid = tc != -100
            tc = tc.clamp(min=0)[:, None]
            logz = logits.logsumexp(1, keepdim=True)
            if losses is not None:
                losses[i:i + rows] = (logz - logits.gather(1, tc))[:, 0] * valid
            if g is not None:
                slope = 1 - (logits / cap).square() if cap else None  # derivative of the soft-cap
                d = logits.sub_(logz).exp_().scatter_add_(1, tc, logits.new_full(tc.shape, -1.0))  # softmax - onehot
                d *= (g[i:i + rows] * valid)[:, None]
                d = (d * slope if cap else d).to(h.dtype)
                dh[i:i + rows] = d @ w
                dw += d.T @ hc
        return dh, dw


# ----------------------------------------------------------------------------------------------------------------------
# optimizers

class Muon(torch.optim.Muon):
    """torch.optim.Muon (arXiv:2502.16982), which takes matrices one by one, for many of them, shards and bad gradients.

    Matrices of one shape are orthogonalised together. Of a matrix that is sharded over processes (a DTensor) each
    orthogonalises the whole, so that sharding changes nothing. found_inf: as in the fused AdamW, None or a number on
    the device; where it is 1 the step changes nothing, and the host need not know.
    """
    found_inf = None

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
        """What to take from each of the matrices, of one shape, placed like the matrix; nothing where keep is 0."""
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
        rate = group['lr'] * math.sqrt(max(1, stack.shape[1] / stack.shape[2]))
        stack = orthogonalize(stack, group['ns_coefficients'], group['ns_steps'], group['eps'])
        updates = (stack.float() * (rate * keep)).unbind()
        if sharded:
            from torch.distributed.tensor import distribute_tensor
            updates = [distribute_tensor(u, p.device_mesh, p.placements, src_data_rank=None)
                       for u, p in zip(updates, params, strict=True)]
        return updates


def orthogonalize(x, coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7):
    """(n, rows, columns) -> about U V^T of each matrix U S V^T, bfloat16, by Newton-Schulz iterations (Muon's)."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizers(list):
    """Several torch optimizers that step as one."""

    @property
    def param_groups(self):
        return [group for optimizer in self for group in optimizer.param_groups]

    def step(self, skip=None):
        """skip: a number on the device; where it is 1, parameters and moments stay as they are."""
        for optimizer in self:
            fused = all(group.get('fused', True) for group in optimizer.param_groups)
            optimizer.found_inf = skip if fused else None  # seen on the device, without waiting for it
            if fused or skip is None or not skip:
                optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]

    def load_moments(self, saved):
        """Takes the moments of a `state_dict`; rates, decays and betas stay those of today."""
        for optimizer, old in zip(self, saved, strict=True):
            optimizer.load_state_dict({'state': old['state'], 'param_groups': optimizer.state_dict()['param_groups']})


# ----------------------------------------------------------------------------------------------------------------------
# generation

class KVCache:
    """Keys and values of every layer, preallocated: kv (n_layer, 2, B, n_kv_head, capacity, head_dim).

    `lengths` counts the tokens stored for each row. Row b's token number t stands in slot t whatever the other rows do,
    so ragged rows need no left padding and positions are simply 0, 1, 2, … in each.
    """

    def __init__(self, config, batch, capacity, device, dtype):
        self.kv = torch.zeros(config.n_layer, 2, batch, config.n_kv_head, capacity, config.head_dim,
                              device=device, dtype=dtype)
        self.lengths = [0] * batch

    def begin(self, T):
        """Before a forward over T new tokens per row: their (positions, mask), None where the default is right."""
        self.layer, self.T, self.end = 0, T, max(self.lengths) + T
        self.uniform = min(self.lengths) == max(self.lengths)
        if self.end == T:
            return None, None  # an empty cache: positions 0 … T-1 and the plain causal pattern
        device = self.kv.device
        self.positions = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(T, device=device)
        if self.uniform and T == 1:
            return self.positions, None  # one new token per row, and it sees everything
        return self.positions, (torch.arange(self.end, device=device) <= self.positions[..., None])[:, None]

    def update(self, k, v):
        """Stores k and v (B, H, T, D) of the next layer; returns all keys and values (B, H, S, D) stored so far."""
        k_cache, v_cache = self.kv[self.layer]
        self.layer += 1
        if self.uniform:
            k_cache[:, :, self.end - self.T:self.end], v_cache[:, :, self.end - self.T:self.end] = k, v
        else:
            rows = torch.arange(len(k), device=k.device)[:, None]
            k_cache[rows, :, self.positions], v_cache[rows, :, self.positions] = k.transpose(1, 2), v.transpose(1, 2)
        return k_cache[:, :, :self.end], v_cache[:, :, :self.end]

    def select(self, rows):
        """Keeps these rows (indices; one may be named several times, to share a prompt among samples)."""
        self.kv = self.kv[:, :, rows]
        self.lengths = [self.lengths[r] for r in rows]


def filter_logits(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Sets logits (B, V) outside the top k, the nucleus (arXiv:1904.09751) or min-p (arXiv:2407.01082) to -inf."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the mass before a token already suffices; the first always stays
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -math.inf)
    if min_p:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)
    return logits


# ----------------------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """The model of a GPTConfig: a trunk of blocks between an embedding and a head; see the top of this file."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd) if config.pos == 'learned' else None
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config.n_embd, config) if config.norm_place == 'pre' else None
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        if config.pos == 'rope':  # a table, not weights: made anew at loading
            for name, table in zip(('rope_cos', 'rope_sin'), rope_tables(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's normal initialisation: projections into the residual stream shrink with depth, or start at zero."""
        config = self.config
        for name, p in self.named_parameters():
            into_residual = name.endswith(('proj.weight', 'down.weight'))
            if p.ndim < 2:
                p.fill_(1.0 if name.endswith('weight') else 0.0)
            elif config.zero_init and (into_residual or name == 'head.weight'):
                p.zero_()
            else:
                std = config.init_std or (1.0 if name.endswith('emb.weight') else p.shape[1] ** -0.5)
                p.normal_(0.0, std / math.sqrt(2 * config.n_layer) if into_residual else std)

    def hidden(self, idx, positions=None, mask=None, cache=None):
        """The trunk: ids (B, T) -> hidden states (B, T, C), after the final norm.

        positions (B, T) or (T,): where each token stands, by default 0 … T-1 (after what the cache holds).
        mask (…, T, S) bool, broadcast over heads as (B, 1, T, S): True where a query may see a key; combined with
        causality. cache: a KVCache that is read and extended.
        """
        config, T = self.config, idx.shape[1]
        if cache is not None:
            positions, mask = cache.begin(T)
        elif mask is not None and config.causal:
            mask = mask & torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
        if T > config.block_size:
            raise ValueError(f'{T} tokens do not fit into block_size={config.block_size}')
        x = self.tok_emb(idx)
        rope = None
        if config.pos == 'learned':
            x = x + (self.pos_emb.weight[:T] if positions is None else self.pos_emb(positions))
        elif config.pos == 'sinusoidal':
            at = torch.arange(T, device=idx.device) if positions is None else positions
            x = x * math.sqrt(config.n_embd) + sinusoidal(at, config.n_embd).type_as(x)
        elif config.pos == 'rope':
            if positions is None:
                rope = self.rope_cos[:T], self.rope_sin[:T]
            else:
                rope = self.rope_cos[positions], self.rope_sin[positions]
            rope = [table.unsqueeze(-2) for table in rope]  # the same for every head
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        return self.norm(x) if self.norm is not None else x

    def logits(self, hidden):
        """Hidden states (…, C) -> float32 logits (…, V)."""
        return _softcap(self.head(hidden).float(), self.config.logit_softcap)

    def forward(self, idx, targets=None, positions=None, mask=None, reduction='mean'):
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> cross-entropy in nats.

        Targets of -100 do not count. reduction: 'mean' over the targets that count, 'sum', or 'none' for (B, T).
        """
        hidden = self.hidden(idx, positions, mask)
        if targets is None:
            return self.logits(hidden)
        h, w, flat, device_type = hidden.flatten(0, 1), self.head.weight, targets.flatten(), idx.device.type
        if len(h) <= chunk_rows(len(w), device_type):  # a single chunk
            losses = F.cross_entropy(self.logits(h), flat, ignore_index=-100, reduction=reduction)
            return losses.view_as(targets) if reduction == 'none' else losses
        if torch.is_autocast_enabled(device_type):  # autocast does not reach inside a custom function
            h, w = (t.to(torch.get_autocast_dtype(device_type)) for t in (h, w))
        learning = torch.is_grad_enabled() and (h.requires_grad or w.requires_grad)
        losses = LinearCrossEntropy.apply(h, w, flat, self.config.logit_softcap, reduction == 'none', learning)
        if reduction == 'mean':
            return losses / (flat != -100).sum()
        return losses.view_as(targets) if reduction == 'none' else losses

    # ------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_state(cls, state, **overrides):
        """A model from a checkpoint's dict: 'model_args' (fields of GPTConfig, overridden where given) and 'model'.

        Raises ValueError with one sentence for an unknown field and for a missing, extra or misshapen tensor.
        """
        unknown = set(state['model_args']) - set(GPTConfig.__dataclass_fields__)
        if unknown:
            raise ValueError(f'model_args has {sorted(unknown)[0]!r}, which this version does not know')
        model = cls(GPTConfig(**state['model_args'] | overrides))
        own, given = model.state_dict(), state['model']
        for name in [*own, *given]:
            if name not in own or name not in given:
                raise ValueError(f'tensor {name} is {"missing" if name in own else "not part of this model"}')
            if own[name].shape != given[name].shape:
                raise ValueError(f'tensor {name} has shape {tuple(given[name].shape)} where this model has '
                                 f'{tuple(own[name].shape)}')
        model.load_state_dict(given)
        return model

    def configure_optimizers(self, optimizer='adamw', learning_rate=6e-4, weight_decay=0.1, betas=(0.9, 0.95),
                             embed_lr=0.0, muon_lr=0.02, muon_momentum=0.95):
        """Torch optimizers that step as one; each of their groups carries its `peak_lr`, which a schedule scales.

        'adamw': weight decay on matrices only. 'muon': the matrices of the blocks by Muon (arXiv:2502.16982), the rest
        by AdamW. embed_lr: peak for the token embedding, 0 = learning_rate. ValueError for another name.
        """
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f"optimizer={optimizer!r} is not one of 'adamw', 'muon'")
        params = {name: p for name, p in self.named_parameters() if p.requires_grad}
        hidden = [p for n, p in params.items() if n.startswith('blocks.') and p.ndim == 2 and optimizer == 'muon']
        taken = {id(p) for p in hidden}
        groups = []
        for is_embedding in (True, False):
            for is_matrix in (True, False):
                chosen = [p for n, p in params.items() if id(p) not in taken and (n == 'tok_emb.weight') == is_embedding
                          and (p.ndim >= 2) == is_matrix]
                if chosen:
                    groups.append({'params': chosen, 'weight_decay': weight_decay if is_matrix else 0.0,
                                   'lr': embed_lr if is_embedding and embed_lr else learning_rate})
        fused = self.tok_emb.weight.device.type in ('cuda', 'cpu')
        optimizers = [torch.optim.AdamW(groups, betas=betas, fused=fused)]
        if hidden:
            optimizers.append(Muon(hidden, lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay))
        optimizers = Optimizers(optimizers)
        for group in optimizers.param_groups:
            group['peak_lr'] = group['lr']
        return optimizers

    def num_params(self):
        """Number of parameters; a head tied to the embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Multiply-adds x 2, forward and backward, per token at context T: 6 N + 12 L H D T (arXiv:2204.02311, B)."""
        c = self.config
        matmul = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + self.head.weight.numel()
        return 6 * matmul + 12 * c.n_layer * c.n_head * c.head_dim * T

    @torch.inference_mode()
    def next_logits(self, contexts, cache=None):
        """Ragged contexts (lists of ids) -> float32 logits (B, V) of the token after each; fills an empty cache."""
        lengths = [len(c) for c in contexts]
        idx = torch.zeros(len(contexts), max(lengths), dtype=torch.long)
        for row, context in zip(idx, contexts, strict=True):
            row[:len(context)] = torch.tensor(context)
        device = self.tok_emb.weight.device
        x = self.hidden(idx.to(device), cache=cache)  # right padding: causality already hides it
        if cache is not None:
            cache.lengths = lengths
        return self.logits(x[torch.arange(len(contexts), device=device), torch.tensor(lengths, device=device) - 1])

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
               stop_ids=(), num_samples=1, seed=None, vocab_limit=0, use_cache=True):
        """As `generate`, token by token: yields (rows, ids, logprobs), three lists over the rows still unfinished."""
        check_prompts(prompts, self.config)
        if num_samples < 1 or max_new_tokens < 0:
            raise ValueError('num_samples starts at 1 and max_new_tokens at 0')
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1 or repetition_penalty <= 0:
            raise ValueError('sampling needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1 and '
                             'repetition_penalty > 0')
        was_training = self.training
        self.eval()  # dropout must not reach a sample
        try:
            yield from self._stream([list(p) for p in prompts for _ in range(num_samples)], num_samples, max_new_tokens,
                                    set(stop_ids), seed, vocab_limit, use_cache,
                                    (temperature, top_k, top_p, min_p, repetition_penalty))
        finally:
            self.train(was_training)

    def _stream(self, texts, shared, max_new_tokens, stop_ids, seed, vocab_limit, use_cache, sampling):
        """The loop of `stream` over texts (lists of ids, which grow); `shared` neighbours have the same prompt."""
        config, device = self.config, self.tok_emb.weight.device
        block, n_rows = config.block_size, len(texts)
        generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
        start = [max(0, len(t) - block) for t in texts]  # where each row's visible context begins
        rows, cache = list(range(n_rows)), None
        for step in range(max_new_tokens):
            if cache is None or max(cache.lengths) == block:
                # Beginning, or the context is full: keep its last three quarters and read them afresh, as in training,
                # where every window begins at position 0. One pass over 3/4 T buys T/4 tokens.
                for r in rows:
                    if len(texts[r]) - start[r] > block:
                        start[r] = len(texts[r]) - max(1, block * 3 // 4)
                repeat = shared if step == 0 else 1  # at first the samples of a prompt share one pass over it
                contexts = [texts[r][start[r]:] for r in rows[::repeat]]
                if use_cache:
                    capacity = min(block, max(map(len, contexts)) + max_new_tokens - step)
                    cache = KVCache(config, len(contexts), capacity, device, self.tok_emb.weight.dtype)
                logits = self.next_logits(contexts, cache)
                if repeat > 1:
                    copies = [i for i in range(len(contexts)) for _ in range(repeat)]
                    logits = logits[copies]
                    if cache is not None:
                        cache.select(copies)
            else:
                last = torch.tensor([[texts[r][-1]] for r in rows], device=device)
                logits = self.logits(self.hidden(last, cache=cache)[:, -1])
                cache.lengths = [n + 1 for n in cache.lengths]
            if vocab_limit:
                logits = logits[:, :vocab_limit]
            # one uniform number per original row and step: a row's sample does not depend on when others finish
            u = torch.rand(n_rows, generator=generator, device=device)[rows]
            ids, logprobs = sample(logits, [texts[r] for r in rows], u, *sampling)
            for r, token in zip(rows, ids, strict=True):
                texts[r].append(token)
            yield rows, ids, logprobs
            keep = [i for i, token in enumerate(ids) if token not in stop_ids]
            if len(keep) < len(rows):  # finished rows leave the batch
                rows = [rows[i] for i in keep]
                if not rows:
                    break
                if cache is not None:
                    cache.select(keep)

    def generate(self, prompts, max_new_tokens, return_logprobs=False, **options):
        """Continues ragged prompts (lists of ids) -> a list of lists of new ids, prompt i's samples at i*num_samples ….

        temperature 0 is greedy. top_k, top_p, min_p: see `filter_logits`. repetition_penalty (arXiv:1909.05858) divides
        the positive and multiplies the negative logits of tokens already in the row. A row ends after a token of
        stop_ids, which is its last id. num_samples continuations per prompt share one pass over it. seed makes it
        repeatable, row by row. vocab_limit: ids from here on (padding of the vocabulary) are never drawn. With
        return_logprobs also the log-probability of each new id under softmax(logits / temperature), before any filter
        or penalty. A text longer than block_size is continued from its last part (a prompt longer than a table of
        learned positions raises ValueError, as do an empty prompt and ids outside the vocabulary).
        """
        out = [[] for _ in range(len(prompts) * options.get('num_samples', 1))]
        logs = [[] for _ in out]
        for rows, ids, logprobs in self.stream(prompts, max_new_tokens, **options):
            for r, token, logprob in zip(rows, ids, logprobs, strict=True):
                out[r].append(token)
                logs[r].append(logprob)
        return (out, logs) if return_logprobs else out


def check_prompts(prompts, config):
    """Raises ValueError with one sentence for prompts that this model cannot continue."""
    if not config.causal:
        raise ValueError('a model with causal=False is an encoder: it cannot generate')
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f'prompt {i} is empty: give at least one token')
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad = next(t for t in prompt if not 0 <= t < config.vocab_size)
            raise ValueError(f'prompt {i}: token id {bad} is outside the vocabulary of {config.vocab_size}')
        if config.pos == 'learned' and len(prompt) > config.block_size:
            raise ValueError(f'prompt {i} has {len(prompt)} tokens and the learned positions end at '
                             f'block_size={config.block_size}: shorten it')


def sample(logits, texts, u, temperature, top_k, top_p, min_p, repetition_penalty):
    """Draws a token per row from logits (B, V) with uniform numbers u (B,): returns ids and their log-probabilities."""
    logprobs = F.log_softmax(logits / (temperature or 1.0), dim=-1)
    if repetition_penalty != 1:
        for row, text in zip(logits, texts, strict=True):
            seen = torch.tensor(sorted(set(text)), device=logits.device)
            row[seen] = torch.where(row[seen] > 0, row[seen] / repetition_penalty, row[seen] * repetition_penalty)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        cdf = filter_logits(logits / temperature, top_k, top_p, min_p).softmax(-1).cumsum(-1)
        # the first token whose cumulative probability exceeds u; scaled, because a float sum may miss 1
        ids = torch.searchsorted(cdf, (u[:, None] * cdf[:, -1:]), right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return ids.tolist(), logprobs.gather(1, ids[:, None])[:, 0].tolist()
