"""
Every architecture of this project in one file that imports only torch: a GPT-2, a Llama-like decoder, a mixture of
experts, the Transformer's encoder and decoder are choices of GPTConfig's values, and what a value switches is an `if`
where it happens.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=65, block_size=64))
    logits = model(idx)                          # (B, T) ids -> (B, T, V)
    loss = model(idx, targets)                   # mean over the targets that are not -100
    hidden = model(idx, output='hidden')         # (B, T, C)
    loss = model(idx, targets, source=source)    # n_encoder_layer > 0: (B, S) ids that the decoder attends to
    new_ids = model.generate([[1, 2, 3], [4]], max_new_tokens=20)    # generate.py

At first reading take `attention_weights`, `Attention.forward`, `MLP`, `Block.sublayers`, `GPT.hidden`, `GPT.forward`.
The rest is what single flags switch and what makes processors faster: `CPURMSNorm`, `attend_in_blocks`, the loss.

    python model.py                              self-attention with numbers for a pencil, and what GPT-2 consists of
    python model.py config/tiny.py --vocab_size=1024    what a config makes: parameters, FLOP and memory

Papers: Attention Is All You Need (arXiv:1706.03762), GPT-2 (Radford et al. 2019), RoFormer (arXiv:2104.09864),
Root Mean Square Layer Normalization (arXiv:1910.07467), GLU Variants Improve Transformer (arXiv:2002.05202),
Primer / squared ReLU (arXiv:2109.08668), GQA (arXiv:2305.13245), QK-norm (arXiv:2010.04245), gated attention
(arXiv:2505.06708), Switch Transformers (arXiv:2101.03961), ST-MoE (arXiv:2202.08906), DeepSeekMoE (arXiv:2401.06066)
and V3 (arXiv:2412.19437), balancing without a loss (arXiv:2408.15664), Longformer's window (arXiv:2004.05150),
attention sinks (arXiv:2309.17453), latent attention (arXiv:2405.04434), gpt-oss (arXiv:2508.10925), Gated DeltaNet
(arXiv:2412.06464), several tokens at once (arXiv:2404.19737), label smoothing (arXiv:1512.00567).
"""
import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

GATED = ('swiglu', 'swiglu_clamped', 'geglu')  # MLPs with a gate


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
    mlp_dim: int = 0  # hidden width of the MLP; 0 = 4 n_embd (gated: 8/3 n_embd, rounded up to a multiple of 64)
    mlp: str = 'gelu'  # 'gelu', 'gelu_tanh' (GPT-2), 'relu2'; gated: 'swiglu', 'swiglu_clamped' (gpt-oss) or 'geglu'
    norm: str = 'layernorm'  # 'layernorm' or 'rmsnorm'
    norm_place: str = 'pre'  # 'pre' the sublayer, 'post' the addition, 'output': between them, 'both': pre, output
    norm_affine: bool = True  # learned weight in the norms
    norm_offset: bool = False  # that weight is 1 + w of a learned w, which begins at 0 (Gemma)
    norm_eps: float = 1e-5  # added to the variance
    qk_norm: bool = False  # normalise queries and keys per head, before the rotation
    qk_norm_joint: bool = False  # all heads of queries, and all of keys, in one (OLMo 2)
    pos: str = 'learned'  # positions: 'learned', 'sinusoidal', 'rope' or 'none'
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rotary_dim: int = 0  # so many of a head's head_dim numbers are rotated: 0 = all (Qwen3-Next: a quarter)
    rope_theta_local: float = 0.0  # that of layers with the window, which rope_scaling leaves alone; 0 = as the others
    rope_pattern: str = 'R'  # layers in turn, again and again: R = rotated, N = without positions (SmolLM3)
    rope_scaling: str = 'none'  # a longer context than trained on: 'linear', 'llama3' or 'yarn' stretch the wavelengths
    rope_factor: float = 1.0  # how many times longer
    rope_original: int = 0  # the context trained on ('llama3', 'yarn'); 0 = block_size / rope_factor
    rope_low: float = 0.0  # wavelengths with at most this many turns in rope_original are stretched fully; 0 = 1
    rope_high: float = 0.0  # those with at least this many turns are kept; 0 = 4 ('llama3') or 32 ('yarn')
    rope_truncate: bool = True  # 'yarn' stretches from a whole pair to a whole pair of numbers on (gpt-oss: False)
    rope_mscale: float = 0.0  # factor on what 'yarn' rotates; 0 = 0.1 ln(rope_factor) + 1
    attn_scale: float = 0.0  # factor on query-key products; 0 = 1 / sqrt(head_dim)
    embed_scale: float = 1.0  # factor on the embeddings of tokens (Gemma: sqrt(n_embd))
    residual_scale: float = 1.0  # factor on what each sublayer adds (Granite)
    logit_scale: float = 1.0  # factor on the logits, taken into the last hidden states (Granite)
    kv_lora_rank: int = 0  # latent attention: what a token leaves for keys and values of all heads, in numbers; 0 = off
    q_lora_rank: int = 0  # beside it, the width of what queries are made of; 0 = n_embd, without a matrix in between
    qk_rope_dim: int = 0  # beside it, rotated numbers of a query and a key after head_dim others; 0 = head_dim / 2
    v_head_dim: int = 0  # beside it, the width of a head's values; 0 = head_dim
    sink_logit: bool = False  # a learned logit of each head that takes its share of the softmax and gives nothing
    attn_gate: str = 'none'  # sigmoid gates on what attention gives: 'none', one per 'head' or per 'element'
    layer_pattern: str = 'A'  # layers in turn, again and again: A = attention, D = Gated DeltaNet (Qwen3-Next: 'DDDA')
    delta_heads: int = 0  # heads of a D layer, each with a state of delta_key_dim x delta_value_dim; 0 = n_head
    delta_key_heads: int = 0  # heads of its queries and keys, which neighbours share; 0 = delta_heads
    delta_key_dim: int = 0  # width of a query and a key; 0 = head_dim
    delta_value_dim: int = 0  # width of a value; 0 = delta_key_dim
    delta_conv: int = 4  # tokens that its convolution reads, the newest included
    bias: bool = True  # biases in linear layers and layernorms
    qkv_bias: bool = False  # with bias=False: queries, keys and values have a bias nevertheless (Qwen2)
    tie_weights: bool = True  # the output head shares the token embedding
    causal: bool = True  # False: every token sees all others (encoder)
    dropout: float = 0.0  # on embeddings, attention weights and sublayer outputs
    logit_softcap: float = 0.0  # logits -> cap * tanh(logits / cap); 0 = off
    window: int = 0  # sliding window: a query sees this many tokens, itself included; 0 = all before it
    window_pattern: str = 'L'  # layers in turn, again and again: L = local, with the window, G = global
    n_sink: int = 0  # attention sinks: the first tokens of a text, visible from beyond the window, too
    n_expert: int = 0  # experts in place of the MLP; 0 = a dense MLP
    n_expert_active: int = 2  # experts that a token is sent to
    n_expert_shared: int = 0  # further experts that every token is sent to
    expert_shared_gate: bool = False  # what these give is multiplied by a sigmoid of the token (Qwen3-Next)
    expert_dim: int = 0  # hidden width of an expert; 0 = mlp_dim
    expert_bias: bool = False  # experts and their router have biases, whatever `bias` says
    dense_layers: int = 0  # the first this many layers keep a dense MLP
    expert_every: int = 1  # after those, layers whose number (from 1) is a multiple of this have experts
    router_score: str = 'softmax'  # a token's affinity to each expert: 'softmax' over all or, each alone, 'sigmoid'
    router_groups: int = 1  # groups of experts, of which a token's best are chosen first, by their two best experts
    router_groups_active: int = 1  # groups that a token's experts come from
    router_renorm: bool = True  # scale the weights of a token's active experts to sum to 1, if there are two or more
    router_scale: float = 1.0  # factor on the weights of the active experts; with 'sigmoid' 2.5 in DeepSeek-V3
    router_aux: float = 0.0  # weight of the loss that balances the experts' load; 0.01 is usual
    router_z: float = 0.0  # weight of the loss that keeps router logits small; 0.001 is usual
    router_bias_rate: float = 0.0  # balance by a bias on the choice, moved so far per step; 0.001 is usual
    n_future: int = 0  # further heads, a block each beside the last: number i predicts the i-th token after the next
    n_encoder_layer: int = 0  # blocks of a bidirectional encoder that the decoder attends to; 0 = no encoder
    init_std: float = 0.02  # standard deviation of initial weights; 0 = 1 / sqrt(fan-in), and 1 for tokens' embeddings
    zero_init: bool = False  # projections into the residual stream and an untied head start at zero

    def __post_init__(self):
        for name, allowed in (('mlp', ('gelu', 'gelu_tanh', 'relu2', *GATED)), ('norm', ('layernorm', 'rmsnorm')),
                              ('norm_place', ('pre', 'post', 'output', 'both')),
                              ('pos', ('learned', 'sinusoidal', 'rope', 'none')),
                              ('rope_scaling', ('none', 'linear', 'llama3', 'yarn')),
                              ('router_score', ('softmax', 'sigmoid')), ('attn_gate', ('none', 'head', 'element')),
                              ('router_renorm', (True, False, 'always'))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name}={getattr(self, name)!r} is not one of {", ".join(map(repr, allowed))}')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'expert_every', 'router_groups'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f'{name}={value} must not be negative')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head} (or set head_dim)')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        default_mlp = -(-8 * self.n_embd // (3 * 64)) * 64 if self.mlp in GATED else 4 * self.n_embd
        self.mlp_dim = self.mlp_dim or default_mlp
        self.expert_dim = self.expert_dim or self.mlp_dim
        latent, groups = self.kv_lora_rank, self.router_groups
        if latent:
            self.qk_rope_dim = self.qk_rope_dim or max(2, self.head_dim // 4 * 2)
            self.v_head_dim = self.v_head_dim or self.head_dim
        delta = 'D' in self.layer_pattern
        self.delta_heads = self.delta_heads or delta * self.n_head
        self.delta_key_heads = self.delta_key_heads or self.delta_heads
        self.delta_key_dim = self.delta_key_dim or delta * self.head_dim
        self.delta_value_dim = self.delta_value_dim or self.delta_key_dim
        scaled = self.rope_scaling != 'none'
        if scaled:
            self.rope_original = self.rope_original or max(1, int(self.block_size / max(1, self.rope_factor)))
            self.rope_low = self.rope_low or 1.0
            self.rope_high = self.rope_high or (4.0 if self.rope_scaling == 'llama3' else 32.0)
        for wrong, why in (
                (not 0 <= self.dropout < 1, f'dropout={self.dropout} must be in [0, 1)'),
                (self.n_head % self.n_kv_head, f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}'),
                (self.n_expert and not 1 <= self.n_expert_active <= self.n_expert,
                 f'n_expert_active={self.n_expert_active} must be between 1 and n_expert={self.n_expert}'),
                (self.n_expert and (self.n_embd % 8 or self.expert_dim % 8),
                 f'n_embd={self.n_embd} and expert_dim={self.expert_dim} must be multiples of 8, as grouped matrix '
                 'products in 16 bits want them'),
                *((not getattr(self, name) or set(getattr(self, name)) - {*letters},
                   f'{name}={getattr(self, name)!r} must be made of the letters {" and ".join(letters)}')
                  for name, letters in (('window_pattern', 'LG'), ('rope_pattern', 'RN'), ('layer_pattern', 'AD'))),
                *((getattr(self, name) <= 0, f'{name}={getattr(self, name)} must be above 0')
                  for name in ('embed_scale', 'residual_scale', 'logit_scale', 'router_scale')),
                (self.window and not self.causal, f'window={self.window} needs causal=True'),
                (self.n_encoder_layer and not self.causal, f'n_encoder_layer={self.n_encoder_layer} needs causal=True'),
                (self.n_future and (self.n_expert or self.n_encoder_layer or not self.causal),
                 f'n_future={self.n_future} needs a causal decoder without experts'),
                (self.n_sink and not self.window, f'n_sink={self.n_sink} needs a window'),
                (delta and not (self.causal and self.delta_conv),
                 f'layer_pattern={self.layer_pattern!r} needs causal=True and a delta_conv of at least 1'),
                (not delta and (self.delta_heads or self.delta_key_dim),
                 f'the fields delta_… need a D in layer_pattern={self.layer_pattern!r}'),
                (self.delta_key_heads and self.delta_heads % self.delta_key_heads,
                 f'delta_heads={self.delta_heads} is not divisible by delta_key_heads={self.delta_key_heads}'),
                (self.pos == 'rope' and not latent and self.head_dim % 2,
                 f"head_dim={self.head_dim} must be even with pos='rope'"),
                (self.qk_rope_dim % 2, f'qk_rope_dim={self.qk_rope_dim} must be even'),
                (self.rotary_dim % 2 or self.rotary_dim > (0 if latent else self.head_dim),
                 f'rotary_dim={self.rotary_dim} must be even, no more than head_dim={self.head_dim}, and 0 beside '
                 'kv_lora_rank'),
                (self.expert_shared_gate and not self.n_expert_shared, 'expert_shared_gate=True needs n_expert_shared'),
                (latent and (self.pos != 'rope' or self.window or self.qk_norm or self.n_kv_head != self.n_head
                             or self.n_encoder_layer or 'N' in self.rope_pattern),
                 f"kv_lora_rank={latent} needs pos='rope' in all layers, window=0, qk_norm=False, n_kv_head=n_head and "
                 'no encoder'),
                (not latent and (self.q_lora_rank or self.qk_rope_dim or self.v_head_dim),
                 'q_lora_rank, qk_rope_dim and v_head_dim need kv_lora_rank'),
                (groups > 1 and (self.n_expert % groups or self.n_expert < 2 * groups or not
                                 self.n_expert_active <= self.router_groups_active * (self.n_expert // groups)
                                 <= self.n_expert),
                 f'router_groups={groups} of n_expert={self.n_expert}, router_groups_active='
                 f'{self.router_groups_active} of them: at least two experts in each, n_expert_active in these'),
                (self.pos == 'sinusoidal' and self.n_embd % 2,
                 f"n_embd={self.n_embd} must be even with pos='sinusoidal'"),
                (self.rope_theta <= 1, f'rope_theta={self.rope_theta} must be above 1'),
                (0 != self.rope_theta_local <= 1, f'rope_theta_local={self.rope_theta_local} must be above 1'),
                (self.qk_norm_joint and not self.qk_norm, 'qk_norm_joint=True needs qk_norm=True'),
                (self.norm_offset and not self.norm_affine, 'norm_offset=True needs norm_affine=True'),
                (scaled and (self.pos != 'rope' or self.rope_factor <= 1),
                 f"rope_scaling={self.rope_scaling!r} needs pos='rope' and a rope_factor above 1"),
                (scaled and self.rope_high <= self.rope_low,
                 f'rope_high={self.rope_high} must be above rope_low={self.rope_low}')):
            if wrong:
                raise ValueError(why)

    @property
    def renormalises(self):
        """Whether the weights of a token's active experts add up to 1. That of a single one stays what the router says:
        p / p = 1 would leave it without a gradient. 'always': in models of others and old runs that one is 1, too."""
        return self.router_renorm == 'always' or self.router_renorm and self.n_expert_active > 1

    @property
    def cache_width(self):
        """The numbers that a token leaves in all layers' caches: key and value of each head, or one latent vector."""
        width = self.kv_lora_rank + self.qk_rope_dim if self.kv_lora_rank else 2 * self.n_kv_head * self.head_dim
        return width * (self.n_layer - self.n_delta)

    @property
    def n_delta(self):
        """How many of the layers are a GatedDeltaNet."""
        return sum(map(self.is_delta, range(self.n_layer)))

    @property
    def farthest(self):
        """The largest distance of a key in layers with a window: of the last token that fits from the first sink."""
        return self.n_sink + self.window - 1

    def is_delta(self, layer):
        """Whether this layer is a GatedDeltaNet."""
        return self.layer_pattern[layer % len(self.layer_pattern)] == 'D'

    def is_local(self, layer):
        """Whether this layer's attention has the window."""
        pattern = self.window_pattern
        return self.window > 0 and pattern[layer % len(pattern)] == 'L' and not self.is_delta(layer)

    def rotates(self, layer):
        """Whether this layer's queries and keys are rotated, with pos='rope'."""
        return self.rope_pattern[layer % len(self.rope_pattern)] == 'R'

    def is_sparse(self, layer):
        """Whether this layer has experts."""
        return self.n_expert > 0 and layer >= self.dense_layers and (layer + 1) % self.expert_every == 0


# ----------------------------------------------------------------------------------------------------------------------
# modules without memory

class SkipInit(torch.overrides.TorchFunctionMode):
    """Inside, the functions of torch.nn.init leave a tensor as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return kwargs['tensor']
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def on_meta():
    """Inside, modules are made on the meta device: their parameters have shapes and no values.

    Nothing is drawn for them, which there would first import PyTorch's compiler, for a second.
    """
    with torch.device('meta'), SkipInit():
        yield


# ----------------------------------------------------------------------------------------------------------------------
# parts of a block

class CPURMSNorm(torch.autograd.Function):
    """F.rms_norm for float32 on a CPU, where PyTorch strings it together from small operations: the time goes to
    reading and writing memory, and this passes over it half as often."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """x (…, D); weight (D,), or any shape that broadcasts to x."""
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, g):
        """With y = w x s and s = (mean(x^2) + eps)^(-1/2): dx = g w s - x s^3 mean(g w x), dw = sum(g x s)."""
        x, weight, scale = ctx.saved_tensors
        gx = g * x
        through_scale = (gx * weight).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        dx = (g * weight).mul_(scale).addcmul_(x, through_scale)
        return dx, gx.mul_(scale).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None, None


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467); weight None = 1."""
    # torch.compile fuses F.rms_norm itself; without a graph, too, so that a frozen teacher rounds as its student does
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled() and (
            x.device.type == 'cpu' and x.dtype == torch.float32):
        return CPURMSNorm.apply(x, x.new_ones(x.shape[-1]) if weight is None else weight, eps)
    if weight is None or weight.ndim == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


class Norm(nn.Module):
    """LayerNorm, or RMSNorm (arXiv:1910.07467), over the last dimension; weight and bias as the config says."""

    def __init__(self, dim, config):
        super().__init__()
        self.shape, self.eps, self.rms = (dim,), config.norm_eps, config.norm == 'rmsnorm'
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - self.offset)) if config.norm_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.norm_affine and config.bias and not self.rms else None

    def scale(self):
        """What is multiplied by, (D,) or None."""
        return 1 + self.weight if self.offset else self.weight

    def forward(self, x):
        # weights and x may differ: autocast makes queries and keys 16 bits wide, sharding the weights
        weight, bias = (None if p is None else p.type_as(x) for p in (self.scale(), self.bias))
        if self.rms:
            return rms_norm(x, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, bias, self.eps)


def frequencies(dim, theta, device=None):
    """theta^(-2i / dim) for i below dim / 2, in radians per position (arXiv:1706.03762): (dim / 2,) float32."""
    return theta ** (-torch.arange(0, dim, 2, device=device).float() / dim)


def sinusoidal(positions, dim):
    """The sines (even columns) and cosines (odd) of section 3.5 of arXiv:1706.03762: (…,) -> (…, dim) float32."""
    a = positions.float()[..., None] * frequencies(dim, 10000.0, positions.device)
    return torch.stack((a.sin(), a.cos()), dim=-1).flatten(-2)


def rope_frequencies(config):
    """`frequencies` with the wavelengths stretched as rope_scaling says (head_dim / 2,), and the factor on cos and sin.

    'linear' (arXiv:2306.15595) stretches all of them by rope_factor; the others keep those that turn often within the
    original context: 'llama3' (arXiv:2407.21783) blends by the number of turns, 'yarn' (arXiv:2309.00071) by the index
    of the pair, and sharpens attention by rope_mscale, here the factor.
    """
    dim = config.qk_rope_dim or config.rotary_dim or config.head_dim
    f = frequencies(dim, config.rope_theta)
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
        if config.rope_truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        stretch = ((torch.arange(dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        f = f * (1 - stretch) + f / config.rope_factor * stretch
        sharpen = config.rope_mscale or 0.1 * math.log(config.rope_factor) + 1
    return f, sharpen


def rope_tables(config, local=False):
    """cos and sin of `apply_rope`, (2, positions, head_dim or qk_rope_dim); local: of layers with the window."""
    if local and config.rope_theta_local:
        config = replace(config, rope_theta=config.rope_theta_local, rope_scaling='none')
    f, sharpen = rope_frequencies(config)
    # a RollingCache keeps positions below n_sink + window, and one prefill adds up to block_size more
    n = config.block_size + (config.n_sink + config.window if config.window else 0)
    a = torch.arange(n).float()[:, None] * f
    still = (config.head_dim - config.rotary_dim) // 2 if config.rotary_dim else 0  # the last pairs do not turn
    cos, sin = F.pad(a.cos() * sharpen, (0, still), value=1.0), F.pad(a.sin() * sharpen, (0, still))
    if config.kv_lora_rank:
        return torch.stack((cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)))
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def apply_rope(x, cos, sin, neighbours=False):
    """Rotates the pairs (x[i], x[i + D/2]) of x (…, D), the half-split convention of Llama (arXiv:2104.09864), or
    neighbours (x[2i], x[2i + 1]), that of the paper and of DeepSeek.

    cos and sin (…, D), broadcast over heads, hold each pair's value twice, the sine negative for the first of it.
    """
    cos, sin = cos.type_as(x), sin.type_as(x)
    other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if neighbours else x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, other, sin)


def windowed(queries, keys, config):
    """Which keys lie in the window of a query, or are sinks: positions (…, T) and (…, S) -> bool (…, T, S)."""
    return (queries[..., :, None] - keys[..., None, :] < config.window) | (keys < config.n_sink)[..., None, :]


def far_sinks(q, q_far, k, v, is_sink):
    """Attention to sinks at another distance than to other keys: q, q_far (B, H, T, D), k, v -> all (…, 2 D).

    Each query is rotated twice: q meets the ordinary keys, q_far the sinks; the half of a key that does not apply is 0.
    """
    k = torch.cat((k.masked_fill(is_sink, 0), k.masked_fill(~is_sink, 0)), -1)
    return torch.cat((q, q_far), -1), k, F.pad(v, (0, v.shape[-1]))  # kernels want one width


def with_sink(q, k, v, mask, causal, scale, sink):
    """Adds a key whose product with each query of head h is sink[h] and whose value is 0: it only takes its share.

    q (B, H, T, D), k, v -> D + 8, for kernels want multiples: q has sink / scale in the first of these, where the new
    key is 1 and the others are 0. The mask, causality too, lets every query see it.
    """
    B, H, T, D = q.shape
    if mask is None and causal and T > 1:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
    q = F.pad(torch.cat((q, (sink / scale).type_as(q)[:, None, None].expand(B, H, T, 1)), -1), (0, 7))
    k, v = F.pad(k, (0, 8, 0, 1)), F.pad(v, (0, 8, 0, 1))
    k[:, :, -1, D] = 1
    return q, k, v, mask if mask is None else F.pad(mask, (0, 1), value=True)


def attend(q, k, v, mask, causal, scale, dropout=0.0, sink=None):
    """softmax(q k^T scale) v over q (B, H, T, D) and k, v (B, Hkv, S, D); mask: bool (…, T, S), a BlockMask or None.

    sink (H,): logits that take part in the softmax, as gpt-oss has them; D then is wider by zeros behind the result.
    """
    gqa = q.shape[1] != k.shape[1]
    if mask is not None and not isinstance(mask, torch.Tensor):
        import torch.nn.attention.flex_attention as flex  # here, for it takes a second to import
        function = flex.flex_attention if torch.compiler.is_compiling() else compiled_flex()
        more = {} if sink is None else {'return_aux': flex.AuxRequest(lse=True)}
        y = function(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, **more)
        # with l = ln(sum of e^scores), e^l / (e^l + e^sink) of the weights remain
        return y if sink is None else y[0] * (y[1].lse - sink[:, None]).sigmoid()[..., None].type_as(y[0])
    if sink is not None:
        q, k, v, mask = with_sink(q, k, v, mask, causal, scale, sink)
    shape = q.shape
    if (q.device.type == 'cpu' and q.dtype == torch.bfloat16 and 1 < shape[2] <= 512 and not dropout
            and not torch.compiler.is_compiling() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return attend_in_blocks(q, k, v, mask, causal and mask is None, scale)
    if gqa and shape[2] == 1 and q.dtype != torch.float32:
        # the heads that share keys and values become queries of one head: these are read once (CPU: 4 x faster)
        q, gqa = q.reshape(shape[0], k.shape[1], -1, shape[3]), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None and shape[2] > 1,
                                          scale=scale, dropout_p=dropout, enable_gqa=gqa).reshape(*shape[:3], -1)


def attend_in_blocks(q, k, v, mask, causal, scale):
    """`attend` in bfloat16 on a CPU that computes in it (else the kernel is faster), in 0.4 of the time, by products.

    Heads that share keys are rows of one product, and with causality a block of queries leaves out the keys behind it.
    """
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    q, k, v = q.reshape(B * Hkv, -1, T, D), k.reshape(B * Hkv, S, D), v.reshape(B * Hkv, S, -1)
    if causal:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()
    hide = q.new_zeros(1, 1, 1, 1).expand(1, 1, T, S)
    if mask is not None:  # not by -inf, nor by what a score makes it: a query that sees nothing would make nan
        hide = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min / 2)
        rows = (B, Hkv) if hide.ndim == 4 and len(hide) > 1 else (1, 1)
        hide = hide.expand(*rows, T, S).flatten(0, 1)[:, None]
    step, parts = 128 if causal else T, []
    for i in range(0, T, step):
        rows, end = slice(i, i + step), i + step if causal else S
        scores = torch.baddbmm(hide[:, :, rows, :end].expand(-1, q.shape[1], -1, -1).flatten(1, 2),
                               q[:, :, rows].flatten(1, 2), k[:, :end].mT, alpha=scale)
        parts.append((scores.softmax(-1) @ v[:, :end]).unflatten(1, (q.shape[1], -1)))
    return torch.cat(parts, 2).view(B, H, T, -1)


def attention_weights(q, k, mask, causal, scale, sink=None):
    """softmax(q k^T scale) itself, which `attend` never makes, for a reader to look at: (B, H, T, S) float32."""
    if sink is not None:
        q, k, _, mask = with_sink(q, k, k, mask, causal, scale, sink)
        return attention_weights(q, k, mask, causal, scale)[..., :-1]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.float() @ k.float().mT) * scale
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)  # only so does it leave out the blocks that nobody sees


class Layout(NamedTuple):
    """Where the tokens of a forward stand and which keys they may see; None: 0, 1, 2 … and all keys before them.

    positions (T,) or (B, T): of the queries. mask, local_mask: in global and local layers, bool (…, T, S) or a
    BlockMask. When a text outgrows n_sink + window: is_sink (…, S), and far_positions, the queries' positions for their
    products with sinks, capped at n_sink + window - 1: no distance is longer than in training (arXiv:2309.17453).
    key_positions (…, S): of the keys of a RollingCache, which move within it and are rotated anew at every step.
    """
    positions: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    local_mask: torch.Tensor | None = None
    far_positions: torch.Tensor | None = None
    is_sink: torch.Tensor | None = None
    key_positions: torch.Tensor | None = None


class Context(NamedTuple):
    """What a forward gives to each of its blocks.

    rope, local_rope: (cos, sin) of queries and keys in global and local layers, (…, T, 1, D) each; far_rope and
    key_rope (…, 1, S, D): those of the layout's far_positions and key_positions, in local layers.
    cache: a KVCache or None. memory (B, S, C): the encoder's output, memory_mask (B, 1, 1, S) True where it is real.
    real (B, T): False on padding, None = there is none. segments (B, T): see `GPT.forward`.
    """
    layout: Layout = Layout()
    rope: tuple | None = None
    local_rope: tuple | None = None
    far_rope: tuple | None = None
    key_rope: tuple | None = None
    cache: object = None
    memory: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    real: torch.Tensor | None = None
    segments: torch.Tensor | None = None


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary positions, QK-norm and a KV cache by flag.

    stacked: for lora.py, which of its matrices hold several, {matrix: {target: rows}}.
    """
    stacked = {}

    def __init__(self, config, causal=True, local=False, rotates=True):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.scale = config.attn_scale or 1 / math.sqrt(config.head_dim + config.qk_rope_dim)
        self.dropout, self.causal, self.local, self.rotates = config.dropout, causal, local, rotates
        norms = self.make_inputs(config)
        width = self.n_head * (config.v_head_dim or self.head_dim)
        self.proj = nn.Linear(width, config.n_embd, config.bias)
        gates = {'none': 0, 'head': self.n_head, 'element': width}[config.attn_gate]
        self.attn_gate = nn.Linear(config.n_embd, gates, bias=False) if gates else None
        self.sink = nn.Parameter(torch.zeros(self.n_head)) if config.sink_logit else None
        for name, norm in norms.items():
            self.register_module(name, norm)
        self.watched = None  # a list that collects the weights of each forward, see `anatomy.attention_maps`

    def make_inputs(self, config):
        """Makes the matrices that queries, keys and values come from; returns the norms behind them by name."""
        # queries, keys and values of all heads in one matrix: rows are q heads, then k heads, then v heads
        self.q_dim, self.kv_dim = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.qkv = nn.Linear(config.n_embd, self.q_dim + 2 * self.kv_dim, config.bias or config.qkv_bias)
        self.stacked = {'qkv': {'q': self.q_dim, 'k': self.kv_dim, 'v': self.kv_dim}}
        self.joint = config.qk_norm_joint
        return {name: Norm(dim if self.joint else self.head_dim, config) if config.qk_norm else None
                for name, dim in (('q_norm', self.q_dim), ('k_norm', self.kv_dim))}

    def forward(self, x, context=Context()):  # noqa: B008 (an empty tuple)
        """x (B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        heads, layout = (self.n_head, self.n_kv_head), context.layout
        qkv = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        qk, v = qkv.split((sum(heads), self.n_kv_head), dim=2)
        norms = zip((self.q_norm, self.k_norm), heads, qk.split(heads, dim=2), strict=True)
        if self.q_norm is not None and self.q_norm.rms and not self.joint:  # one pass over both
            weights = [norm.scale().expand(n, -1) for norm, n, _ in norms if norm.weight is not None]
            qk = rms_norm(qk, torch.cat(weights).type_as(qk) if weights else None, self.q_norm.eps)
        elif self.q_norm is not None:
            qk = torch.cat([norm(t.flatten(2) if self.joint else t).view(t.shape) for norm, _, t in norms], dim=2)
        q_far, rope = None, (context.local_rope if self.local else context.rope) if self.rotates else None
        if rope is not None:
            if context.far_rope is not None and self.local:
                q_far = apply_rope(qk[:, :, :self.n_head], *context.far_rope).transpose(1, 2)
            if context.key_rope is None:
                qk = apply_rope(qk, *rope)
            else:
                qk = torch.cat((apply_rope(qk[:, :, :self.n_head], *rope), qk[:, :, self.n_head:]), dim=2)
        q, k, v = (t.transpose(1, 2) for t in (*qk.split(heads, dim=2), v))  # (B, nh, T, hs)
        if context.cache is not None:
            k, v = context.cache.update(self, k, v)
        if context.key_rope is not None and rope is not None:
            k = apply_rope(k, *context.key_rope)
        if q_far is not None:
            q, k, v = far_sinks(q, q_far, k, v, layout.is_sink[..., None, :, None])
        mask = layout.local_mask if self.local else layout.mask
        return self.project(x, self.mix(q, k, v, mask)[..., :self.head_dim])

    def mix(self, q, k, v, mask=None):
        """`attend` as this layer does."""
        if self.watched is not None:
            self.watched.append(attention_weights(q, k, mask, self.causal, self.scale, self.sink))
        return attend(q, k, v, mask, self.causal, self.scale, self.dropout if self.training else 0.0, self.sink)

    def project(self, x, y):
        """What the heads have found (B, H, T, D), gated by the sublayer's input x (B, T, C) -> (B, T, C)."""
        B, H, T, _ = y.shape
        y = y.transpose(1, 2)
        if self.attn_gate is not None:  # a head may say nothing, which a softmax alone cannot (arXiv:2505.06708)
            y = y * self.attn_gate(x).sigmoid().view(B, T, H, -1)
        return self.proj(y.reshape(B, T, -1))


class LatentAttention(Attention):
    """Multi-head latent attention (arXiv:2405.04434, 2.1): a token leaves one vector that all heads make their keys and
    values of, by kv_b, and one rotated key that they share.

    With earlier tokens in a cache the same products are taken in another order: kv_b's rows for keys are multiplied
    with the queries, those for values with what is found, and all heads meet the latent vectors themselves.
    """

    def make_inputs(self, config):
        self.rank, self.widths = config.kv_lora_rank, (config.head_dim, config.qk_rope_dim, config.v_head_dim)
        D, R, V = self.widths
        self.q_a = nn.Linear(config.n_embd, config.q_lora_rank, config.bias) if config.q_lora_rank else None
        self.q = nn.Linear(config.q_lora_rank or config.n_embd, self.n_head * (D + R), bias=False)
        self.kv_a = nn.Linear(config.n_embd, self.rank + R, config.bias)
        self.kv_b = nn.Linear(self.rank, self.n_head * (D + V), bias=False)
        config = replace(config, norm_eps=1e-6)  # DeepSeek's, whatever its others have
        q_norm = Norm(config.q_lora_rank, config) if self.q_a is not None else None
        return {'q_norm': q_norm, 'kv_norm': Norm(self.rank, config)}

    def forward(self, x, context=Context()):  # noqa: B008 (an empty tuple)
        """x (B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        D, R, V = self.widths
        q = self.q(x if self.q_a is None else self.q_norm(self.q_a(x))).view(B, T, self.n_head, D + R).transpose(1, 2)
        latent, k_rope = self.kv_a(x)[:, None].split((self.rank, R), -1)  # (B, 1, T, …): as if of one head
        latent, rope = self.kv_norm(latent), [table.transpose(-2, -3) for table in context.rope]
        q, q_rope = q[..., :D], apply_rope(q[..., D:], *rope, neighbours=True)
        k_rope = apply_rope(k_rope, *rope, neighbours=True)
        kept = torch.cat((latent, k_rope), -1)
        if context.cache is not None:
            kept, = context.cache.update(self, kept)
        if kept.shape[2] == T:  # nothing came before
            k, v = self.kv_b(latent[:, 0]).view(B, T, self.n_head, D + V).transpose(1, 2).split((D, V), -1)
            k = torch.cat((k, k_rope.expand(-1, self.n_head, -1, -1)), -1)
            v = F.pad(v, (0, max(0, D + R - V)))  # kernels want one width
            return self.project(x, self.mix(torch.cat((q, q_rope), -1), k, v, context.layout.mask)[..., :V])
        kv_b = self.kv_b.merged().type_as(x) if hasattr(self.kv_b, 'merged') else self.kv_b.weight  # LoRA's has no more
        for_keys, for_values = kv_b.view(self.n_head, D + V, self.rank).split((D, V), 1)
        y = self.mix(torch.cat((q @ for_keys, q_rope), -1), kept, kept, context.layout.mask)[..., :self.rank]
        return self.project(x, y @ for_values.mT)


class CrossAttention(Attention):
    """Queries of the decoder, keys and values of the encoder's last layer (arXiv:1706.03762, 3.2.3)."""

    def make_inputs(self, config):
        bias, self.causal = config.bias or config.qkv_bias, False
        self.q = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias)
        self.kv = nn.Linear(config.n_embd, 2 * self.n_kv_head * self.head_dim, bias)
        self.stacked = {'kv': dict.fromkeys('kv', self.n_kv_head * self.head_dim)}
        return {}

    def forward(self, x, context):
        """x (B, T, C) -> (B, T, C); the source is context.memory (B, S, C)."""
        B, T, _ = x.shape
        memory, cache = context.memory, context.cache
        q = self.q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        source = cache.source.get(self) if cache is not None else None
        if source is None:
            source = [*self.kv(memory).view(B, -1, 2, self.n_kv_head, self.head_dim).permute(2, 0, 3, 1, 4)]
            if context.memory_mask is not None:
                source.append(context.memory_mask)
            if cache is not None:
                cache.source[self] = source  # it does not change: once per text
        return self.project(x, self.mix(q, *source)[..., :self.head_dim])


def delta_recurrent(q, k, v, g, beta, state=None):
    """The gated delta rule (arXiv:2412.06464, eq. 10): a state S (D_k, D_v) holds a value for each of D_k directions. A
    token lets it fade to e^g S, moves what it has at key k by the share beta to v, and reads it: y = S^T q.

    q, k (B, H, T, D_k), v (B, H, T, D_v), g and beta (B, H, T), state (B, H, D_k, D_v) or None, zeros -> y as v, and
    the state after it, float32. g of -inf forgets all.
    """
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    state, out = v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state, []
    for t in range(k.shape[2]):
        key = k[:, :, t, None]
        state = state * g[:, :, t, None, None].exp()
        error = v[:, :, t, None] - key @ state
        state = state + key.mT @ (beta[:, :, t, None, None] * error)
        out.append(q[:, :, t, None] @ state)
    return torch.cat(out, 2), state


def delta_chunked(q, k, v, g, beta, state=None, chunk=64):
    """`delta_recurrent` by products of matrices, a chunk of tokens at a time (arXiv:2412.06464, 3.3).

    Within a chunk each token writes w = beta (v - what the state from before has at k - what the chunk's earlier tokens
    have written there): a triangular system of equations, solved at once for all chunks.
    """
    T, V = v.shape[2:]
    chunk = min(chunk, T)
    q, k, v, g, beta = (F.pad(x.float(), (0, 0) * (x.ndim - 3) + (0, -T % chunk)).unflatten(2, (-1, chunk))
                        for x in (q, k, v, g, beta))  # (B, H, chunks, chunk, …)
    gone = (g == -math.inf).cumsum(-1)  # tokens with the same number see each other, 0 the state from before
    g = g.masked_fill(g == -math.inf, 0)
    eighths = (g.detach() * 8).round() / 8  # whose sums and their differences are exact, however much fades
    g = torch.stack((eighths, g - eighths)).cumsum(-1)
    hidden = (gone[..., None] != gone[..., None, :]) | torch.ones(chunk, chunk, device=q.device).triu(1).bool()
    fade = (g[..., None] - g[..., None, :]).sum(0).masked_fill(hidden, -math.inf).exp()  # from a token to another
    begin = g.sum(0).masked_fill(gone > 0, -math.inf).exp()[..., None]  # from the chunk's begin to a token
    end = (g[..., -1:] - g).sum(0).masked_fill(gone != gone[..., -1:], -math.inf).exp()[..., None]  # and to its end
    k_beta = k * beta[..., None]
    found = torch.linalg.solve_triangular(k_beta @ k.mT * fade, torch.cat((v * beta[..., None], k_beta * begin), -1),
                                          upper=False, unitriangular=True)
    w, at, inside, q, k = (x.unbind(2) for x in (found[..., :V], found[..., V:], q @ k.mT * fade, q * begin, k * end))
    state, out = v.new_zeros(*v.shape[:2], k[0].shape[-1], V) if state is None else state, []
    for i, last in enumerate(begin[..., -1:, :].unbind(2)):
        written = w[i] - at[i] @ state
        out.append(q[i] @ state + inside[i] @ written)
        state = state * last + k[i].mT @ written
    return torch.cat(out, 2)[:, :, :T], state


class GatedDeltaNet(nn.Module):
    """In place of attention a memory of one size, whatever the length of the text (arXiv:2412.06464), as in Qwen3-Next:
    each head writes to it and reads from it by `delta_recurrent`."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_key_head, self.key_dim = config.delta_heads, config.delta_key_heads, config.delta_key_dim
        self.n_conv, self.value_dim = config.delta_conv, config.delta_value_dim
        keys, values = self.n_key_head * self.key_dim, self.n_head * self.value_dim
        self.qkv = nn.Linear(config.n_embd, 2 * keys + values, bias=False)
        self.stacked = {'qkv': {'q': keys, 'k': keys, 'v': values}}  # see `Attention`
        self.rates = nn.Linear(config.n_embd, 2 * self.n_head, bias=False)
        self.attn_gate = nn.Linear(config.n_embd, values, bias=False)
        self.conv = nn.Parameter(torch.empty(self.n_conv * (2 * keys + values)))  # flat: to optimizers it is a vector
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(self.n_head)) for _ in range(2))
        self.norm = Norm(self.value_dim, replace(config, norm='rmsnorm', norm_affine=True, norm_offset=False))
        self.proj = nn.Linear(values, config.n_embd, bias=False)

    def forward(self, x, context=Context()):  # noqa: B008 (an empty tuple)
        """x (B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        cache, segments, new = context.cache, context.segments, self.qkv(x)
        before, state = (None, None) if cache is None else cache.states.get(self, (None, None))
        inputs = F.pad(new, (0, 0, self.n_conv - 1, 0)) if before is None else torch.cat((before, new), 1)
        mixed = 0
        for i, weight in enumerate(self.conv.type_as(new).view(self.n_conv, -1)):  # of the token n_conv - 1 - i before
            part = inputs[:, i:i + T] * weight
            if segments is not None:  # around the end `roll` meets the zeros before the first
                part = part * (segments.roll(self.n_conv - 1 - i, 1) == segments)[..., None]
            mixed = mixed + part
        widths = [*self.stacked['qkv'].values()]
        q, k, v = (t.unflatten(2, (-1, n)).transpose(1, 2) for t, n in zip(
            F.silu(mixed).split(widths, -1), (self.key_dim, self.key_dim, self.value_dim), strict=True))  # (B, H, T, D)
        beta, g = self.rates(x).float().mT.chunk(2, 1)  # (B, H, T)
        gate = self.attn_gate(x).float().view(B, T, self.n_head, -1)
        with torch.autocast(x.device.type, enabled=False):  # what adds up over a whole text wants all digits
            q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q.float(), k.float()))
            q, k = (t.repeat_interleave(self.n_head // self.n_key_head, 1) for t in (q * self.key_dim ** -0.5, k))
            beta = beta.sigmoid()
            g = -self.A_log.float().exp()[:, None] * F.softplus(g + self.dt_bias.float()[:, None])
            if segments is not None:
                g = g.masked_fill((segments.roll(1, 1) != segments)[:, None], -math.inf)
            if cache is not None and cache.counts is not None:  # padding neither fades nor writes
                real = (torch.arange(T, device=x.device) < cache.counts[:, None])[:, None]
                beta, g = beta * real, g * real
            y, state = (delta_recurrent if T == 1 else delta_chunked)(q, k, v, g, beta, state)
            if cache is not None:
                cache.store(self, inputs, state)
            y = self.norm(y.transpose(1, 2)) * F.silu(gate)
        return self.proj(y.flatten(2).type_as(x))


def activate(kind, up, gate=None):
    """What stands between an MLP's matrices: GELU, squared ReLU (arXiv:2109.08668) or a gate (arXiv:2002.05202), in
    gpt-oss clamped."""
    if kind == 'swiglu_clamped':
        gate = gate.clamp(max=7)
        return gate * (1.702 * gate).sigmoid() * (up.clamp(-7, 7) + 1)
    if gate is not None:
        return (F.silu(gate) if kind == 'swiglu' else F.gelu(gate, approximate='tanh')) * up
    if kind == 'relu2':
        return F.relu(up).square()
    return F.gelu(up, approximate='tanh' if kind == 'gelu_tanh' else 'none')


class MLP(nn.Module):
    """The feed-forward half of a block."""
    stacked = {}  # see `Attention`

    def __init__(self, config, dim):
        super().__init__()
        self.kind = config.mlp
        self.gate = nn.Linear(config.n_embd, dim, config.bias) if self.kind in GATED else None
        self.up = nn.Linear(config.n_embd, dim, config.bias)
        self.down = nn.Linear(dim, config.n_embd, config.bias)

    def forward(self, x, real=None):
        """x (…, C) -> (…, C); real is for a MoE in this place."""
        up, gate = self.up(x), None
        if self.gate is not None:
            gate = self.gate(x)
        elif self.kind in GATED:  # packed: both in one product
            gate, up = up.chunk(2, -1)
        return self.down(activate(self.kind, up, gate))


def product_dtype(x):
    """The dtype of matrix products with x: autocast's, which does not reach inside custom functions, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class MoE(nn.Module):
    """A mixture of experts: a router sends each token to the n_expert_active of n_expert MLPs that it weighs most.

    No expert has a capacity, so no token is dropped: tokens are sorted by expert, and each expert's are one slice of a
    grouped matrix product. After a forward in training, `load` (E,) holds the tokens of each expert, `entropy` that of
    the router's distribution, in nats, and `aux` the weighted sum of the load-balancing loss (arXiv:2101.03961, eq. 4)
    and the router's z-loss (arXiv:2202.08906, eq. 5). Padding counts in none of them.
    """

    def __init__(self, config):
        super().__init__()
        E, M, C = config.n_expert, config.expert_dim, config.n_embd
        self.config = config
        self.router = nn.Linear(C, E, config.expert_bias)
        self.gate = nn.Parameter(torch.empty(E, M, C)) if config.mlp in GATED else None
        self.up = nn.Parameter(torch.empty(E, M, C))
        self.down = nn.Parameter(torch.empty(E, C, M))
        for name, width in (('gate_bias', M), ('up_bias', M), ('down_bias', C)):  # flat: to optimizers they are vectors
            there = config.expert_bias and (self.gate is not None or name != 'gate_bias')
            self.register_parameter(name, nn.Parameter(torch.empty(E * width)) if there else None)
        self.shared = MLP(config, config.n_expert_shared * M) if config.n_expert_shared else None
        self.shared_router = nn.Linear(C, 1, bias=False) if config.expert_shared_gate else None
        if config.router_bias_rate:  # added where experts are chosen, not to their weights (arXiv:2408.15664)
            self.register_buffer('choice_bias', torch.zeros(E))
        self.load = self.entropy = self.aux = None

    def _apply(self, function, recurse=True):
        bias = self.choice_bias if self.config.router_bias_rate else None
        super()._apply(function, recurse)
        if bias is not None and bias.dtype != self.choice_bias.dtype:  # it chooses by its digits: none of `to` is lost
            self.choice_bias = bias.to(self.choice_bias.device)
        return self

    def forward(self, x, real=None):
        """x (B, T, C) -> (B, T, C); real (B, T): False on padding."""
        config, flat, kind = self.config, x.flatten(0, -2), x.device.type
        N, E, K = len(flat), config.n_expert, config.n_expert_active
        with torch.autocast(kind, enabled=False):  # a choice between near equals wants all digits
            logits = F.linear(flat.float(), *(p.float() for p in self.router.parameters()))
        scores = logits.softmax(-1) if config.router_score == 'softmax' else logits.sigmoid()
        choice = scores + self.choice_bias if config.router_bias_rate else scores
        if config.router_groups > 1:
            groups = choice.unflatten(1, (config.router_groups, -1))
            best = groups.topk(2).values.sum(-1).topk(config.router_groups_active).indices
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
            choice = groups.masked_fill(closed[..., None], -math.inf).flatten(1)
        chosen = choice.topk(K).indices
        weights = scores.gather(1, chosen)
        if config.renormalises:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
        weights = weights * config.router_scale
        sizes = torch.zeros(E, device=x.device).scatter_add_(0, chosen.flatten(), weights.new_ones(N * K))
        if self.training:
            self.observe(logits, scores / (scores.sum(-1, keepdim=True) + 1e-20), chosen, real)

        dtype = product_dtype(x)
        order = chosen.flatten().argsort(stable=True)  # by expert
        token, rows = order // K, flat.to(dtype)
        # A CPU's kernels are made anew for every number of rows, so slices there are padded to multiples of 32.
        step = 32 if kind == 'cpu' and N * K >= 64 * E else 1
        padding = -sizes % step
        ends = (sizes + padding).cumsum(0).int()
        if step > 1:
            place = torch.arange(N * K) + (padding.cumsum(0) - padding).long()[chosen.flatten()[order]]
            ends[-1] = size = -(-(N * K + (step - 1) * E) // step) * step
            rows = rows.new_zeros(size, rows.shape[1]).index_copy(0, place, rows.index_select(0, token))
        else:
            rows = rows.index_select(0, token)

        def product(a, w, b):  # slice e of a (rows, in) times w[e] (out, in), plus b[e]
            y = F.grouped_mm(a, w.to(dtype).transpose(1, 2), offs=ends)
            if b is None:
                return y
            expert = torch.searchsorted(ends, torch.arange(len(y), device=x.device), right=True)
            return y + b.to(dtype).view(E, -1)[expert]
        gate = product(rows, self.gate, self.gate_bias) if self.gate is not None else None
        rows = product(activate(config.mlp, product(rows, self.up, self.up_bias), gate), self.down, self.down_bias)
        rows = rows.index_select(0, place) if step > 1 else rows
        rows = rows * weights.flatten().index_select(0, order)[:, None].to(dtype)
        y = torch.zeros(N, x.shape[-1], dtype=dtype, device=x.device).index_add(0, token, rows).view(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_router is None else shared * self.shared_router(x).sigmoid())

    def observe(self, logits, probs, chosen, real):
        """Takes `load`, `entropy` and `aux` of a forward: logits, probs (N, E), chosen (N, K), real (B, T) or None."""
        counted = probs.new_ones(len(probs)) if real is None else real.flatten().float()
        n = counted.sum().clamp(min=1)
        self.load = torch.zeros(probs.shape[1], device=probs.device).scatter_add_(
            0, chosen.flatten(), counted.repeat_interleave(chosen.shape[1]))
        share = (probs * counted[:, None]).sum(0) / n  # of the probability, that each expert has
        balance = probs.shape[1] * (self.load / (n * chosen.shape[1]) * share).sum()
        z = (logits.logsumexp(-1).square() * counted).sum() / n
        self.aux = self.config.router_aux * balance + self.config.router_z * z
        self.entropy = (torch.special.entr(probs.detach()).sum(-1) * counted).sum() / n


class Block(nn.Module):
    """Attention, then MLP, each with its residual, and norms where norm_place says.

    A decoder's block of a model with an encoder attends to that in between.
    """

    def __init__(self, config, layer, encoder=False):
        super().__init__()
        self.place, self.pre = config.norm_place, config.norm_place in ('pre', 'both')
        self.residual_scale = config.residual_scale
        self.norm1 = Norm(config.n_embd, config)
        kind = LatentAttention if config.kv_lora_rank else Attention
        self.attn = GatedDeltaNet(config) if config.is_delta(layer) and not encoder else kind(
            config, config.causal and not encoder, not encoder and config.is_local(layer), config.rotates(layer))
        crossing = config.n_encoder_layer and not encoder
        self.norm_cross = Norm(config.n_embd, config) if crossing else None
        self.cross = CrossAttention(config) if crossing else None
        self.norm2 = Norm(config.n_embd, config)
        self.norm1_out, self.norm_cross_out, self.norm2_out = (
            Norm(config.n_embd, config) if self.place == 'both' and there else None for there in (True, crossing, True))
        self.sparse = config.is_sparse(layer) and not encoder
        self.mlp = MoE(config) if self.sparse else MLP(config, config.mlp_dim)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.adapter1 = self.adapter2 = nn.Identity()  # where lora.py puts adapters
        self.recompute = False  # activation checkpointing (arXiv:1604.06174): the backward pass computes it all again

    def forward(self, x, context=Context()):  # noqa: B008 (an empty tuple)
        if context.cache is not None:  # never compiled, should `sublayers` be: a cache grows at every step
            return Block.sublayers(self, x, context)
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self.sublayers, x, context, use_reentrant=False)
        return self.sublayers(x, context)

    def sublayers(self, x, context):
        y = self.attn(self.norm1(x) if self.pre else x, context)
        x = self.add(x, y, self.norm1, self.norm1_out, self.adapter1)
        if self.cross is not None:
            y = self.cross(self.norm_cross(x) if self.pre else x, context)
            x = self.add(x, y, self.norm_cross, self.norm_cross_out)
        y = self.mlp(self.norm2(x) if self.pre else x, context.real)
        return self.add(x, y, self.norm2, self.norm2_out, self.adapter2)

    def add(self, x, y, norm, norm_out, adapter=None):
        """x and y, what the sublayer gave."""
        if self.place in ('output', 'both'):
            y = norm(y) if norm_out is None else norm_out(y)
        y = self.drop(y)
        y = y if adapter is None else adapter(y)
        x = x + (y if self.residual_scale == 1 else y * self.residual_scale)
        return norm(x) if self.place == 'post' else x


# ----------------------------------------------------------------------------------------------------------------------
# the loss, without ever holding all logits in float32

def chunk_rows(vocab_size, device_type):
    """Rows of logits held at a time: 4 MB in a CPU's cache, 256 MB on a GPU, but enough for an efficient product."""
    return max(256, (1 << 20 if device_type == 'cpu' else 1 << 26) // vocab_size)


def _softcap(logits, cap):
    return cap * torch.tanh(logits / cap) if cap else logits


def within(temperature):
    """A temperature above 0, no closer to 0 or infinity than float32 can divide logits by."""
    return min(max(temperature, 1e-30), 1e30)


def tempered(logits, temperature):
    """Logits (…, V) divided by a temperature above 0, less the largest of each row, which no softmax sees: so none
    overflows, and small temperatures lose no digits."""
    return logits if temperature == 1 else (logits - logits.detach().amax(-1, keepdim=True)) / within(temperature)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of h @ w.T against targets, a chunk of rows at a time, so that (N, V) never exists.

    The gradient of a softmax needs only the logits, so for a summed loss it is taken in the same pass over the chunks;
    a per-token loss has a gradient of its own for each token, so there the chunk is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, h, w, targets, reduction, learning, cap=0.0, temperature=1.0, label_smoothing=0.0):
        """h (N, C), w (V, C), targets (N,) with -100 to skip -> the sum of the losses, with reduction 'none' the losses
        (N,) float32, with 'details' these and the entropies of the distributions.

        learning: whether a backward may follow. cap: of the logits, 0 = none; these are then divided by the
        temperature. label_smoothing: see `GPT.forward`.
        """
        losses = torch.zeros(len(h), dtype=torch.float32, device=h.device)
        entropies = torch.zeros_like(losses) if reduction == 'details' else None
        ctx.per_token = reduction in ('none', 'details')
        ctx.how = cap, temperature, label_smoothing
        grads = (torch.ones_like(losses), None) if learning and not ctx.per_token else None
        dh, dw = LinearCrossEntropy.walk(h, w, targets, *ctx.how, grads, (losses, entropies), ctx.needs_input_grad[1])
        if not torch.compiler.is_compiling():  # which cannot say that nothing was learnt from the entropies
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*((h, w, targets) if ctx.per_token else (dh, dw)))
        if reduction == 'details':
            return losses, entropies
        return losses if reduction == 'none' else losses.sum()

    @staticmethod
    def backward(ctx, g, g_entropy=None):
        if ctx.per_token:
            h, w, targets = ctx.saved_tensors
            g = torch.zeros_like(g_entropy) if g is None else g
            dh, dw = LinearCrossEntropy.walk(h, w, targets, *ctx.how, (g, g_entropy), None, ctx.needs_input_grad[1])
        else:
            dh, dw = ctx.saved_tensors
            dh, dw = dh * g, dw if dw is None else dw * g
        return dh, dw if dw is None else dw.to(dh.dtype), *[None] * 6

    @staticmethod
    def walk(h, w, targets, cap, temperature, label_smoothing, g, out, learns):
        """Writes the losses and entropies (N,) into the pair out, if given, either of which may be None.

        Returns (dh, dw), None without g; dw also where w needs no gradient. g: the gradients (N,) of the losses and of
        the entropies, the latter may be None.
        """
        def rule(logits, rows):
            logits = tempered(logits, temperature)
            valid, tc = targets[rows] != -100, targets[rows].clamp(min=0)[:, None]
            logprobs = logits.sub_(logits.logsumexp(1, keepdim=True))
            if out is not None:
                losses = -logprobs.gather(1, tc)[:, 0]
                if label_smoothing:
                    losses = losses.lerp(-logprobs.mean(1), label_smoothing)
                out[0][rows] = losses * valid
                if out[1] is not None:
                    out[1][rows] = -(logprobs.exp() * logprobs).sum(1) * valid
            if g is None:
                return None
            weights = (g[0][rows] * valid)[:, None]
            if g[1] is None:
                d = logprobs.exp_().mul_(weights)
            else:  # of an entropy H: -p (log p + H)
                p = logprobs.exp()
                d = logprobs.sub_((p * logprobs).sum(1, keepdim=True)).mul_(p)
                d = d.mul_(-(g[1][rows] * valid)[:, None]).add_(p.mul_(weights))
            d.scatter_add_(1, tc, -weights * (1 - label_smoothing))  # softmax - onehot, smoothed
            d = d.sub_(weights * (label_smoothing / d.shape[1])) if label_smoothing else d
            return d / within(temperature) if temperature != 1 else d
        return walk_logits(h, w, cap, rule, g is not None, learns)


def walk_logits(h, w, cap, rule, learning, learns):
    """Calls rule(logits (n, V) float32, slice of the rows) over h (N, C) @ w.T (C, V), soft-capped, a chunk of rows at
    a time. learning: it gives the derivative of some sum by the logits -> that by h and, if w learns, w; else None.
    """
    dh = torch.empty_like(h) if learning else None
    dw = torch.zeros_like(w, dtype=torch.float32) if learning and learns else None
    w = w.to(h.dtype)
    size = chunk_rows(len(w), h.device.type)
    for i in range(0, len(h), size):
        rows = slice(i, i + size)
        logits = _softcap((h[rows] @ w.T).float(), cap)
        slope = 1 - (logits / cap).square() if cap and learning else None  # derivative of the soft-cap
        d = rule(logits, rows)
        if learning:
            d = (d * slope if cap else d).to(h.dtype)
            dh[rows] = d @ w
            if learns:
                dw += d.T @ h[rows]
    return dh, dw


def real_first(idx, mask, *others):
    """Moves the real tokens of each row to its front, in their order: ids and bool (B, T), None = all are real.

    Positions then count real tokens alone, and causality hides the padding. others (B, T) move alike.
    """
    if mask is None:
        return idx, torch.ones_like(idx, dtype=torch.bool), *others
    order = mask.logical_not().int().argsort(dim=1, stable=True)
    return tuple(x.gather(1, order) for x in (idx, mask, *others))


def pooled(x, mask, how):
    """Hidden states (B, T, C) -> (B, C): the 'mean' over those that mask (B, T) has, or the 'last' of them."""
    if how not in ('mean', 'last'):
        raise ValueError(f"how={how!r} is not one of 'mean', 'last'")
    if how == 'last':
        last = (mask * torch.arange(x.shape[1], device=x.device)).argmax(1)
        return x[torch.arange(len(x), device=x.device), last]
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """The model of a GPTConfig: a trunk of blocks between an embedding and a head; see the top of this file."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd) if config.pos == 'learned' else None
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.encoder = self.encoder_norm = None
        if config.n_encoder_layer:
            self.encoder = nn.ModuleList(Block(config, i, encoder=True) for i in range(config.n_encoder_layer))
            self.encoder_norm = nn.Identity() if config.norm_place == 'post' else Norm(config.n_embd, config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.future = nn.ModuleList(Block(config, config.n_layer - 1) for _ in range(config.n_future))
        self.future_loss = 0.0  # of the last forward in training
        self.norm = nn.Identity() if config.norm_place == 'post' else Norm(config.n_embd, config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.tok_emb.weight
        self.register_rope()
        self.sparse = [block.mlp for block in self.blocks if block.sparse]
        self.router_stats, self.block_masks = None, {}
        if not self.tok_emb.weight.is_meta:  # there, weights come with a state
            self.init_weights()

    def register_rope(self):
        """The tables of 'rope' on the model's device: computed from the config, never saved."""
        if self.config.pos == 'rope' and not self.tok_emb.weight.is_meta:  # there, `assign` makes them
            for local in (False, True) if self.config.rope_theta_local else (False,):
                table = rope_tables(self.config, local).to(self.tok_emb.weight.device)
                self.register_buffer('rope_local' if local else 'rope_global', table, persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's normal initialisation: projections into the residual stream shrink with depth, or start at zero.

        A position's vector begins no larger than a token's: learned ones with the token's std, as in nanoGPT, or with
        that of a matrix of this width; beside sinusoids, whose size is given, tokens begin as in arXiv:1706.03762.
        """
        config = self.config
        for name, p in self.named_parameters():
            into_residual = name.endswith(('proj.weight', 'down.weight', 'mlp.down'))
            if name.endswith('A_log'):  # with the next, heads that forget in a token to a thousand (arXiv:2405.21060)
                p.copy_(((torch.arange(len(p)) + 0.5) * 16 / len(p)).log())
            elif name.endswith('dt_bias'):  # whose softplus is from 0.001 to 0.1
                p.copy_(torch.logspace(-3, -1, len(p)).expm1().log())
            elif name.endswith('.conv'):
                p.uniform_(-config.delta_conv ** -0.5, config.delta_conv ** -0.5)
            elif p.ndim < 2:
                one = name.endswith('weight') and not config.norm_offset
                p.fill_(1.0 if one or name.endswith('attn.norm.weight') else 0.0)
            elif config.zero_init and (into_residual or name == 'head.weight'):
                p.zero_()
            else:
                std = config.init_std or p.shape[-1] ** -0.5
                if name == 'tok_emb.weight' and config.pos == 'sinusoidal':
                    std = config.n_embd ** -0.5  # `embed` multiplies by sqrt(n_embd): 1 beside the sinusoids' 0.7
                elif name == 'tok_emb.weight':
                    std = config.init_std or 1.0
                p.normal_(0.0, std / math.sqrt(2 * config.n_layer) if into_residual else std)

    def embed(self, idx, positions=None):
        """Ids (B, T) -> (B, T, C) with positions added, those of 'rope' apart; positions: (T,) or (B, T), None = 0 …"""
        config, T = self.config, idx.shape[1]
        x = self.tok_emb(idx)
        if config.embed_scale != 1:  # in 16 bits the factor is rounded to those, as models of that kind were trained
            x = x * torch.full((), config.embed_scale, dtype=x.dtype, device=x.device)
        if config.pos == 'learned':
            x = x + (self.pos_emb.weight[:T] if positions is None else self.pos_emb(positions))
        elif config.pos == 'sinusoidal':
            at = torch.arange(T, device=idx.device) if positions is None else positions
            x = x * math.sqrt(config.n_embd) + sinusoidal(at, config.n_embd).type_as(x)
        return self.drop(x)

    def rope(self, positions, local=False):
        """cos and sin of global or local layers at positions (…, T), the same for every head: (…, T, 1, D) each."""
        table = self.rope_local if local and self.config.rope_theta_local else self.rope_global
        return table[:, positions].unsqueeze(-2).unbind()

    def encode(self, source, source_mask=None):
        """The encoder: ids (B, S), bool (B, S) True where a token is real -> (B, S, C)."""
        if source.shape[1] > self.config.block_size:
            raise ValueError(f'{source.shape[1]} tokens do not fit into block_size={self.config.block_size}')
        x, mask = self.embed(source), None if source_mask is None else source_mask[:, None, None]
        rope = self.rope(slice(source.shape[1])) if self.config.pos == 'rope' else None
        for block in self.encoder:
            x = block(x, Context(Layout(mask=mask), rope))
        return self.encoder_norm(x)

    def hidden(self, idx, positions=None, mask=None, cache=None, counts=None, memory=None, memory_mask=None, real=None,
               future=0, segments=None):
        """The trunk: ids (B, T) -> hidden states (B, T, C), after the final norm; with future a list of them, for the
        next token and, by further heads, for each of so many tokens after it (arXiv:2404.19737).

        positions (B, T) or (T,): where each token stands, by default 0 … T-1 (after what the cache holds).
        mask (…, T, S) bool, broadcast over heads as (B, 1, T, S): True where a query may see a key; combined with
        causality and the window. cache: a KVCache that is read and extended, by counts (a list) of the T tokens of
        each row. memory (B, S, C) and memory_mask (B, S): what `encode` gave, and what of it is real; a cache keeps
        them. real (B, T): the tokens that the routers of experts count, None = all. segments: see `forward`.
        """
        config, T = self.config, idx.shape[1]
        if T > config.block_size:
            raise ValueError(f'{T} tokens do not fit into block_size={config.block_size}')
        if mask is not None and config.n_delta:
            raise ValueError(f'layer_pattern={config.layer_pattern!r} goes without a mask: give segments instead')
        if segments is not None:
            same = (segments[:, :, None] == segments[:, None, :])[:, None]  # (B, 1, T, T)
            mask = same if mask is None else mask & same
        layout = self.layout(T, positions, mask, idx.device) if cache is None else cache.begin(T, counts)
        rope = local_rope = far_rope = key_rope = None
        if config.pos == 'rope':
            at = slice(T) if layout.positions is None else layout.positions
            rope, local_rope = (self.rope(at, local) for local in (False, True))
            if layout.far_positions is not None:
                far_rope = self.rope(layout.far_positions, True)
            if layout.key_positions is not None:
                key_rope = tuple(table.transpose(-3, -2) for table in self.rope(layout.key_positions, True))
        x = self.embed(idx, layout.positions)
        memory_mask = None if memory_mask is None else memory_mask[:, None, None]
        context = Context(layout, rope, local_rope, far_rope, key_rope, cache, memory, memory_mask, real, segments)
        *trunk, last = self.blocks
        for block in trunk:
            x = block(x, context)
        ends = (block(x, context) for block in (last, *[*self.future][:future]))
        found = [self.norm(end) for end in ends]
        found = found if config.logit_scale == 1 else [end * config.logit_scale for end in found]
        return found if future else found[0]

    def layout(self, T, positions, mask, device):
        """The Layout of a forward without a cache."""
        config, far, is_sink = self.config, None, None
        if mask is not None and config.causal:
            mask = mask & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        if not config.window or T <= config.window and positions is None:
            return Layout(positions, mask, mask)
        at = torch.arange(T, device=device) if positions is None else positions
        if config.n_sink and (T > config.farthest + 1 or positions is not None):
            far, is_sink = at.clamp(max=config.farthest), at < config.n_sink
        if mask is None and positions is None and device.type == 'cuda' and not (config.dropout and self.training):
            return Layout(positions, None, self.block_mask(T, device), far, is_sink)
        local = windowed(at, at, config) & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        local = local[:, None] if local.ndim == 3 else local
        return Layout(positions, mask, local if mask is None else local & mask, far, is_sink)

    def block_mask(self, T, device):
        """The window's pattern for flex_attention, which skips what nobody sees instead of masking it."""
        if T not in self.block_masks:
            from torch.nn.attention.flex_attention import create_block_mask  # here, for it takes a second to import
            window, n_sink = self.config.window, self.config.n_sink
            self.block_masks[T] = create_block_mask(
                lambda b, h, q, k: (q >= k) & ((q - k < window) | (k < n_sink)), None, None, T, T, device=device)
        return self.block_masks[T]

    def pool(self, idx, mask=None, how='mean'):
        """One vector per text: ids (B, T), bool (B, T) True where a token is real, None = all are -> (B, C).

        how: 'mean' over the real tokens, or 'last', the last real one's. What an encoder (causal=False) is asked for;
        a decoder's last token knows all others too. Padding may stand anywhere: it changes nothing.
        """
        if self.encoder is not None:
            raise ValueError(f'n_encoder_layer={len(self.encoder)}: of an encoder-decoder take the mean over `encode`')
        idx, mask = real_first(idx, mask)
        return pooled(self.hidden(idx, mask=None if self.config.causal else mask[:, None, None]), mask, how)

    def logits(self, hidden):
        """Hidden states (…, C) -> float32 logits (…, V)."""
        return _softcap(self.head(hidden).float(), self.config.logit_softcap)

    def forward(self, idx, targets=None, positions=None, mask=None, segments=None, source=None, source_mask=None,
                real=None, reduction='mean', output=None, label_smoothing=0.0):
        """ids (B, T) -> logits (B, T, V), or with targets (B, T) the cross-entropy in nats.

        Targets of -100 do not count; reduction: 'mean' over those that do, 'sum', or 'none' for (B, T). label_smoothing
        is the share of a target's probability that all V tokens have evenly. In training `future_loss` is the mean
        cross-entropy of the n_future tokens after each. positions, mask: see `hidden`.
        segments (B, T) of integers: a token sees those of its own only, so that several texts share a row, each in one
        piece with positions of its own. source (B, S), source_mask (B, S): see `encode`. real (B, T): False on padding,
        which routers do not count; None = what no target follows. output: 'hidden' for the hidden states (B, T, C), or
        a function of (this model, hidden states, targets), whose result is returned: any loss of them, computed inside
        the forward as DDP and FSDP need.
        """
        if (source is None) != (self.encoder is None):
            raise ValueError('a source goes with a model that has n_encoder_layer, and with no other')
        if segments is not None and source is not None:
            raise ValueError('segments of a row cannot share a source: give each text a row')
        if self.sparse and self.training and real is None and targets is not None:
            real = (targets != -100).flip(1).cumsum(1).flip(1) > 0
        memory = self.encode(source, source_mask) if source is not None else None
        n_future = len(self.future) if self.training and targets is not None and output is None else 0
        hidden = self.hidden(idx, positions, mask, memory=memory, memory_mask=source_mask, real=real, future=n_future,
                             segments=segments)
        if n_future:  # all further heads in one loss: the gradient of the head they share exists once
            hidden, *further = hidden
            later = F.pad(targets, (0, n_future), value=-100).unfold(1, targets.shape[1], 1).transpose(0, 1)
            self.future_loss = self.cross_entropy(torch.cat(further), later[1:].flatten(0, 1),
                                                  label_smoothing=label_smoothing)
        if self.sparse and self.training:
            stats = torch.stack([torch.cat((moe.load, (moe.entropy * moe.load.sum())[None])) for moe in self.sparse])
            self.router_stats = stats if self.router_stats is None else self.router_stats + stats
        if output == 'hidden':
            return hidden
        if output is not None:
            return output(self, hidden, targets)
        return self.logits(hidden) if targets is None else self.cross_entropy(
            hidden, targets, reduction, label_smoothing=label_smoothing)

    def products(self, h):
        """The operands of a chunked loss: hidden states (N, C) and the head's weight (V, C), in the dtype of matrix
        products, and whether either needs a gradient."""
        w, dtype = self.head.weight, product_dtype(h)
        narrow = w.dtype.itemsize < dtype.itemsize  # QLoRA's head stays so while it waits for the backward pass
        h, w = h.to(dtype), w if narrow else w.to(dtype)
        return h, w, torch.is_grad_enabled() and (h.requires_grad or w.requires_grad)

    def cross_entropy(self, hidden, targets, reduction='mean', temperature=1.0, label_smoothing=0.0):
        """Hidden states (B, T, C) and targets (B, T) -> the loss of `forward`, of logits divided by the temperature.

        With 'details' (losses, entropies of the distributions), (B, T) each: what learning from a policy's own samples
        takes.
        """
        h, flat, counted = hidden.flatten(0, 1), targets.flatten(), None
        if hidden.device.type == 'cpu' and not torch.compiler.is_compiling():  # a GPU would wait for the number
            counted = (flat != -100).nonzero()[:, 0]
            # a multiple of 64: kernels are made anew for every number of rows
            rows = F.pad(counted, (0, -len(counted) % 64))
            if 0 < len(rows) < len(flat):
                h, flat = h[rows], flat[rows].index_fill(0, torch.arange(len(counted), len(rows)), -100)
        found = self.cross_entropy_of(h, flat, reduction, temperature, label_smoothing)
        if reduction in ('mean', 'sum'):
            return found

        def back(values):
            if len(values) < targets.numel():
                values = values.new_zeros(targets.numel()).index_copy(0, counted, values[:len(counted)])
            return values.view_as(targets)
        return tuple(map(back, found)) if reduction == 'details' else back(found)

    def cross_entropy_of(self, h, targets, reduction, temperature, label_smoothing):
        """`cross_entropy` over rows: hidden states (N, C) and targets (N,) -> the loss, or losses (N,)."""
        # a head that is no nn.Linear, packed for generation, has no matrix to take chunks of
        if len(h) <= chunk_rows(self.config.vocab_size, h.device.type) or not isinstance(self.head, nn.Linear):
            logits = tempered(self.logits(h), temperature)
            if reduction != 'details':
                loss = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=label_smoothing)
                return torch.where((targets != -100).any(), loss, 0.0) if reduction == 'mean' else loss  # of none: 0
            logprobs = logits.log_softmax(-1)
            entropies = -(logprobs.exp() * logprobs).sum(-1) * (targets != -100)
            return F.nll_loss(logprobs, targets, ignore_index=-100, reduction='none'), entropies
        h, w, learning = self.products(h)
        loss = LinearCrossEntropy.apply(h, w, targets, reduction, learning, self.config.logit_softcap, temperature,
                                        label_smoothing)
        return loss / (targets != -100).sum().clamp(min=1) if reduction == 'mean' else loss

    def router_loss(self):
        """What the last forward in training adds to the loss for its routers, router_aux and router_z of it; 0 where
        the model has no experts."""
        return sum(moe.aux for moe in self.sparse)

    def routed(self):
        """What routers did since the last call: tokens per expert, and entropies times tokens: (n_sparse, E + 1)."""
        stats, self.router_stats = self.router_stats, None
        return stats

    @torch.no_grad()
    def balance(self, load):
        """After a step: experts with less than their share of the load (n_sparse, E) of all processes are chosen more
        often from now on, by router_bias_rate (arXiv:2408.15664, algorithm 1)."""
        for moe, counts in zip(self.sparse, load, strict=True) if self.config.router_bias_rate else ():
            moe.choice_bias += self.config.router_bias_rate * (counts.mean() - counts).sign()

    def assign(self, weights):
        """Makes tensors {name: tensor} the weights of this model as they are, not copies of them: for one that was made
        on the meta device. Returns the model."""
        self.load_state_dict(weights, strict=False, assign=True)
        if self.config.tie_weights and self.head is not None:
            self.head.weight = self.tok_emb.weight
        self.register_rope()
        return self

    def num_params(self, learning=False):
        """Number of parameters, or of those that learn; a head tied to the embedding counts once."""
        if learning:
            return sum(p.numel() for p in self.parameters() if p.requires_grad)
        return sum(p.numel() for p in self.parameters()) + sum(m.in_features * m.out_features for m in self.elsewhere())

    def elsewhere(self):
        """The linear layers whose matrix is no parameter: frozen, in 4 bits."""
        return [m for m in self.modules() if isinstance(m, nn.Linear) and m.weight is None]

    def memory(self):
        """Bytes of the weights as they are kept; a head tied to the embedding counts once."""
        kept = [b for name, b in self.named_buffers() if not name.startswith('rope_')]
        return sum(t.nbytes for t in (*self.parameters(), *kept))

    def flops_per_token(self, T):
        """Multiply-adds x 2, forward and backward, per token at context T: 6 N + 12 L H D T (arXiv:2204.02311, B).

        A frozen matrix has no gradient of its own: 4 instead of 6. With an encoder: per token of a target beside a
        source as long. A GatedDeltaNet has 3 products of a vector with its state, whatever T is.
        """
        c = self.config
        stacks = {id(p) for moe in self.sparse for p in (moe.gate, moe.up, moe.down)}  # of which a token meets a part
        matrices = [(p, p.numel() * c.n_expert_active / c.n_expert if id(p) in stacks else p.numel())
                    for n, p in self.named_parameters() if n[:6] in ('blocks', 'future', 'encode') and p.ndim > 1]
        matrices += [(self.head.weight, self.head.weight.numel())] * (1 + c.n_future) if self.head is not None else []
        matmul = sum(n * (6 if p.requires_grad else 4) for p, n in matrices)
        matmul += 4 * sum(m.in_features * m.out_features for m in self.elsewhere())
        n_delta = c.n_delta + c.n_future * c.is_delta(c.n_layer - 1)
        matmul += 18 * n_delta * c.delta_heads * c.delta_key_dim * c.delta_value_dim
        layers = c.n_layer + c.n_future - n_delta + (c.n_layer + c.n_encoder_layer if c.n_encoder_layer else 0)
        return matmul + 6 * layers * c.n_head * (c.head_dim + c.qk_rope_dim + (c.v_head_dim or c.head_dim)) * T

    def generate(self, prompts, max_new_tokens, **options):
        """`generate.generate` of this model: lists of ids -> lists of new ids."""
        from generate import generate  # it takes any model; here for those who type it
        return generate(self, prompts, max_new_tokens, **options)


if __name__ == '__main__':
    import anatomy  # for the command line alone: everything above needs torch and nothing else

    anatomy.cli()
