"""
Text from a model: caches, prefill, one decode step, sampling, texts that are continued side by side, packed weights.

    ids = generate(model, [[1, 2, 3], [4]], max_new_tokens=20, temperature=0.8, top_k=50, stop_ids=(0,))
    for rows, ids, logprobs in stream(model, prompts, 100): …            token by token
    pack(model, 'int8')                                                  faster on a CPU, and nothing but generation

What a server needs, step by step:

    batch = Batch(model)
    batch.admit([Row(prompt, max_new_tokens=100, uniforms=draws)])       reads the prompt; others may be under way
    logits = batch.advance()                                             of the next token of every row (B, V)
    batch.append(*sample(logits, …))                                     a token for every row
    batch.retire()                                                       rows that are done leave

Papers: the nucleus (arXiv:1904.09751), min-p (arXiv:2407.01082), repetition penalty (arXiv:1909.05858), attention sinks
and rolling caches (arXiv:2309.17453).
"""
import copy
import math
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError
from model import MLP, Layout, tempered, windowed

# ----------------------------------------------------------------------------------------------------------------------
# caches

class KVCache:
    """What the layers of a model keep of the tokens so far: lists of tensors (B, …) in three dicts, by module.

    `layers`: [keys, values] of an Attention, or [latent vectors], preallocated: (B, H, capacity, D) each, whatever H
    and D are. `lengths` counts the tokens stored for each row. Row b's token number t stands in slot t whatever the
    other rows do, so ragged rows need no left padding and positions are simply 0, 1, 2, … in each. `source`: of a
    CrossAttention [keys, values of the encoder's output, and what of it is real]. `states`: of a GatedDeltaNet [what
    its convolution reads again (B, delta_conv - 1, width), the state of all tokens (B, H, D_k, D_v) float32]. No token
    of it can be taken back.
    """
    rolling = False

    def __init__(self, config, batch, capacity, device):
        self.config, self.capacity, self.device = config, capacity, device
        self.layers, self.source, self.states = {}, {}, {}
        self.lengths = [0] * batch

    def count(self, T, counts):
        """Notes how many tokens come, see `begin` -> the lengths before."""
        before, self.T = self.lengths, T
        self.lengths = [n + c for n, c in zip(before, counts or [T] * len(before), strict=True)]
        padded = counts and min(counts) < T and self.config.n_delta
        self.counts = torch.tensor(counts, device=self.device) if padded else None  # None: no padding, or it is hidden
        return before

    def begin(self, T, counts=None):
        """Before a forward over T new tokens per row -> Layout. counts: how many of the T are no padding, per row."""
        config, before = self.config, self.count(T, counts)
        self.end, self.uniform = max(before) + T, min(before) == max(before)
        if self.end > self.capacity:
            self.reserve(max(self.end, self.capacity * 3 // 2))  # what is kept is copied: seldom, then
        slides = config.window and self.end > config.window
        if self.end == T and not slides:
            return Layout()  # an empty cache: positions 0 … T-1 and the plain causal pattern
        first = before[:1] if self.uniform else before  # one row of positions serves all
        self.positions = torch.tensor(first, device=self.device)[:, None] + torch.arange(T, device=self.device)
        keys = torch.arange(self.end, device=self.device)
        mask = local = far = is_sink = None  # one new token per row sees everything
        if T > 1 or not self.uniform:
            mask = local = (keys <= self.positions[..., None])[:, None]
        if slides:
            local = windowed(self.positions, keys, config)[:, None]
            local = local if mask is None else local & mask
        if config.n_sink and self.end > config.farthest + 1:
            far, is_sink = self.positions.clamp(max=config.farthest), keys < config.n_sink
        return Layout(self.positions, mask, local, far, is_sink)

    def stored(self, layer, *tensors):
        """The stored tensors of a layer, zeros at first; tensors: like the new ones (B, H, T, D)."""
        if layer not in self.layers:
            with torch.inference_mode(False):  # so that they can be written to outside of it, too
                self.layers[layer] = [torch.zeros(*x.shape[:2], self.capacity, x.shape[3], dtype=x.dtype,
                                                  device=x.device) for x in tensors]
        return self.layers[layer]

    def update(self, layer, *tensors):
        """Stores keys and values (B, H, T, D) of a layer, or whatever it keeps; returns all of them (B, H, S, D) that
        it has so far."""
        stored = self.stored(layer, *tensors)
        for old, new in zip(stored, tensors, strict=True):
            if self.uniform:
                old[:, :, self.end - self.T:self.end] = new
            else:
                rows = torch.arange(len(new), device=self.device)[:, None]
                old[rows, :, self.positions] = new.transpose(1, 2)
        return [x[:, :, :self.end] for x in stored]

    def store(self, layer, inputs, state):
        """Stores the state of a GatedDeltaNet and, of its convolution's inputs (B, delta_conv - 1 + T, width), those
        that the next token reads."""
        at = torch.arange(inputs.shape[1] - self.T, device=self.device)
        at = self.T + at[None] if self.counts is None else self.counts[:, None] + at
        rows = torch.arange(len(inputs), device=self.device)[:, None]
        self.states[layer] = [inputs[rows, at], state]

    def select(self, rows):
        """Keeps these rows (indices; one may be named several times, to share a prompt among samples)."""
        self.layers = {layer: [x[rows] for x in stored] for layer, stored in self.layers.items()}
        self.source = {layer: [x[rows] for x in given] for layer, given in self.source.items()}
        self.states = {layer: [x[rows] for x in kept] for layer, kept in self.states.items()}
        self.lengths = [self.lengths[r] for r in rows]

    def part(self, row, length):
        """A copy of the first tokens of one row, with states of all of them, as a cache of its own."""
        if self.states and length != self.lengths[row]:
            raise ValueError(f'{length} of {self.lengths[row]} tokens: a state of layer_pattern='
                             f'{self.config.layer_pattern!r} has no parts')
        one = KVCache(self.config, 1, length, self.device)
        one.states = {layer: [x[row:row + 1].clone() for x in kept] for layer, kept in self.states.items()}
        one.layers = {layer: [x[row:row + 1, :, :length].clone() for x in stored]
                      for layer, stored in self.layers.items()}
        one.lengths = [length]
        return one

    def reserve(self, capacity):
        """Makes room for so many tokens a row."""
        if capacity > self.capacity:
            self.capacity = capacity
            self.layers = {layer: [F.pad(x, (0, 0, 0, capacity - x.shape[2])) for x in stored]
                           for layer, stored in self.layers.items()}

    def extend(self, other):
        """Takes in the rows of another cache of the same kind, behind its own."""
        self.reserve(other.capacity)
        other.reserve(self.capacity)
        for mine, theirs in ((self.layers, other.layers), (self.source, other.source), (self.states, other.states)):
            for layer, kept in mine.items():
                mine[layer] = [torch.cat(pair) for pair in zip(kept, theirs[layer], strict=True)]
        self.lengths = self.lengths + other.lengths


def state_bytes(config, size=2):
    """Bytes that a text of any length keeps in `KVCache.states`, with numbers of so many bytes in the convolutions."""
    keys, values = config.delta_key_heads * config.delta_key_dim, config.delta_heads * config.delta_value_dim
    return config.n_delta * (4 * values * config.delta_key_dim + size * (config.delta_conv - 1) * (2 * keys + values))


class RollingCache(KVCache):
    """A ring of the last `window` tokens after the n_sink first, for a text without end in constant memory and time.

    Only for models whose attention is all local. Slot t holds token t up to n_sink; token t behind that stands in slot
    n_sink + (t - n_sink) % window. Keys are stored before their rotation: at every step they are rotated to where they
    stand within the cache, so positions stay small however long the text (arXiv:2309.17453, 3.2).
    """
    rolling = True

    def __init__(self, config, batch, device):
        super().__init__(config, batch, config.n_sink + config.window, device)

    def tokens(self, lengths):
        """Which token each slot holds after so many: (rows, 1) -> (rows, slots), -1 for none."""
        slots, sinks = torch.arange(self.capacity, device=lengths.device), self.config.n_sink
        last = lengths - 1 - (lengths - 1 - slots) % self.config.window
        held = torch.where(slots < sinks, slots, last)
        return torch.where((held < lengths) & ((held >= sinks) | (slots < sinks)), held, -1)

    def begin(self, T, counts=None):
        config, device, before = self.config, self.device, self.count(T, counts)
        same = min(before) == max(before) and min(self.lengths) == max(self.lengths)
        old, new = (torch.tensor(n[:1] if same else n, device=device)[:, None] for n in (before, self.lengths))
        queries = old + torch.arange(T, device=device)
        held, after, size = self.tokens(old), self.tokens(new), self.capacity
        # where the content of each slot comes from: itself, or new token number i, which follows the slots
        self.origin = torch.where(after == held, torch.arange(size, device=device), size + after - old)
        self.slot = (after == old).int().argmax(1) if T == 1 else None  # where a single new token goes
        keys = after if T == 1 else torch.cat((held, queries), dim=1)
        seen = (keys[:, None] <= queries[..., None]) & (keys >= 0)[:, None]  # not later, and not an empty slot
        mask = (seen & windowed(queries, keys, config))[:, None]
        # positions count from a token before which nothing but sinks is visible any more
        base = (old - config.farthest).clamp(min=0)
        key_positions = torch.where(keys < config.n_sink, keys, keys - base).clamp(min=0)
        far = is_sink = None
        if config.n_sink and T > 1 and max(before) + T > config.farthest + 1:
            far, is_sink = queries.clamp(max=config.farthest), keys < config.n_sink
        positions = queries - base if config.pos == 'rope' else queries
        return Layout(positions, None, mask, far, is_sink, key_positions)

    def update(self, layer, k, v):
        stored = self.stored(layer, k, v)
        both = []
        for i, new in enumerate((k, v)):
            if self.T == 1 and len(self.slot) == 1:
                stored[i][:, :, self.slot[0]] = new[:, :, 0]
            elif self.T == 1:
                stored[i][torch.arange(len(new), device=self.device), :, self.slot] = new[:, :, 0]
            else:
                joined = torch.cat((stored[i], new), dim=2)
                index = self.origin[:, None, :, None].expand(len(new), new.shape[1], -1, new.shape[3])
                stored[i].copy_(joined.gather(2, index))
                both.append(joined)
        return both or stored


# ----------------------------------------------------------------------------------------------------------------------
# packed weights

def has_fp16_kernels():
    """Whether this PyTorch can multiply float32 by weights that it keeps in float16 (FBGEMM: x86)."""
    return 'fbgemm' in torch.backends.quantized.supported_engines


class PackedLinear(nn.Module):
    """One or several nn.Linear over the same input that can do nothing but multiply, faster: on a CPU, for generation,
    see `pack`.

    quant '': the weights lie in the order in which oneDNN's kernels read them. 'fp16': in float16, which changes no
    number by more than 1/2048, half as many bytes to read; products and sums are float32. 'int8': rounded to 8 bits
    with a scale per output channel; the kernel reads bfloat16 and adds up in float32.
    """

    def __init__(self, *linears, quant=''):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.quant, self.scale = quant, None
        if quant == 'int8':
            self.scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
            weight = (weight.float() / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        elif quant == 'fp16':
            weight = torch.ops.quantized.linear_prepack_fp16(weight, self.bias)
        else:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # for about so many rows of input
        self.packed = weight

    def forward(self, x):
        if self.quant == 'fp16':
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        if not self.quant:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')
        rows = x.flatten(0, -2)
        if len(rows) > 16 or rows.shape[1] % 16:  # its kernel is made for few, and reads beyond those of other widths
            return F.linear(x, self.packed.to(x.dtype) * self.scale[:, None], self.bias)
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.packed, self.scale).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def pack(model, quant=''):
    """Makes a model faster at generation and unfit for anything else; returns it. Changes nothing on a GPU.

    quant: '' keeps the numbers; 'fp16' keeps float32 weights in float16; 'int8' rounds each matrix to int8 with a
    scale per output channel. Both need a CPU. ValueError where that cannot be.
    """
    weight = model.tok_emb.weight
    if any(isinstance(module, nn.Linear) and type(module) is not nn.Linear for module in model.modules()):
        raise ValueError('a model with LoRA or 4 bits cannot be packed: fold them in first, with lora.merge(model)')
    fitting = {'': (weight.dtype,), 'fp16': (torch.float32,), 'int8': (torch.float32, torch.bfloat16)}
    if quant not in fitting:
        raise ValueError(f"quant={quant!r} is not one of '', 'fp16', 'int8'")
    if quant and weight.device.type != 'cpu':
        raise ValueError(f'quant={quant!r} needs device=cpu, not {weight.device}')
    if weight.dtype not in fitting[quant]:
        names = ' or '.join(str(dtype).removeprefix('torch.') for dtype in fitting[quant])
        raise ValueError(f'quant={quant!r} needs dtype={names}, not {str(weight.dtype).removeprefix("torch.")}')
    if quant == 'fp16' and not has_fp16_kernels():
        raise ValueError("quant='fp16' needs a PyTorch with FBGEMM, which this processor's has not: leave it out")
    kernels = torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32
        or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    n = model.num_params()
    model.num_params = lambda learning=False: 0 if learning else n  # packed matrices are no parameters any more
    for module in list(model.modules()) if weight.device.type == 'cpu' and (quant or kernels) else ():
        if isinstance(module, MLP) and module.gate is not None:  # one product of both
            module.gate, module.up = None, PackedLinear(module.gate, module.up, quant=quant)
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name not in ('router', 'kv_b'):  # of which the matrix itself is wanted
                setattr(module, name, PackedLinear(child, quant=quant))
    return model.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# one step

def prefill(model, contexts, cache=None, memory=None, memory_mask=None):
    """Ragged contexts (lists of ids) -> float32 logits (B, V) of the token after each; fills an empty cache.

    A context longer than block_size needs a RollingCache: it is read a block at a time. memory, memory_mask: of an
    encoder, see `GPT.hidden`.
    """
    *_, logits = prefill_in_parts(model, contexts, cache, memory, memory_mask)
    return logits


@torch.inference_mode()
def prefill_in_parts(model, contexts, cache=None, memory=None, memory_mask=None, size=0):
    """As `prefill`, at most size tokens of each context at a time: yields None between two parts, last the logits.

    The cache may hold tokens already, the same number of each row: the contexts come after them.
    """
    lengths, device, hidden = [len(c) for c in contexts], model.tok_emb.weight.device, None
    idx, rolling = padded(contexts).to(device), cache is not None and cache.rolling
    for part in idx.split(model.config.block_size if rolling else size or max(lengths), dim=1):
        if hidden is not None:
            yield None
        counts = [min(n, part.shape[1]) for n in lengths]
        lengths = [n - c for n, c in zip(lengths, counts, strict=True)]
        # right padding: causality already hides it
        x = model.hidden(part, cache=cache, counts=counts, memory=memory, memory_mask=memory_mask)
        here = torch.tensor(counts, device=device)
        last = x[torch.arange(len(x), device=device), (here - 1).clamp(min=0)]
        hidden = last if hidden is None else torch.where(here[:, None] > 0, last, hidden)
    yield model.logits(hidden)


@torch.inference_mode()
def decode_step(model, ids, cache):
    """The newest token of each row (B ids) -> float32 logits (B, V) of the next; extends the cache."""
    idx = torch.tensor(ids, device=model.tok_emb.weight.device)[:, None]
    return model.logits(model.hidden(idx, cache=cache)[:, -1])


def padded(texts):
    """Lists of ids -> (B, longest) int64, zeros behind the shorter."""
    idx = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(idx, texts, strict=True):
        row[:len(text)] = torch.tensor(text)
    return idx


def filter_logits(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Logits (B, V) -> the same with -inf for tokens that any filter drops, applied one after the other.

    top_k keeps the k likeliest (and ties), 0 = all; top_p the smallest set of at least this mass (arXiv:1904.09751);
    min_p those at least this fraction as likely as the likeliest (arXiv:2407.01082).
    """
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


def drawable_logits(logits, texts, vocab_limit=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                    repetition_penalty=1.0):
    """Logits (B, V) -> those of the distribution that a token is drawn from, with temperature 0 those whose largest it
    is; texts and options as in `sample`."""
    logits = logits[:, :vocab_limit] if vocab_limit else logits
    if repetition_penalty != 1:
        logits, largest = logits.clone(), torch.finfo(logits.dtype).max  # the caller's stay as they are
        for row, text in zip(logits, texts, strict=True):
            seen = torch.tensor([i for i in set(text) if i < logits.shape[-1]], dtype=torch.long, device=logits.device)
            changed = torch.where(row[seen] > 0, row[seen] / repetition_penalty, row[seen] * repetition_penalty)
            row[seen] = changed.clamp(-largest, largest)  # inf less inf would be nan
    return logits if temperature == 0 else filter_logits(tempered(logits, temperature), top_k, top_p, min_p)


def draw(probs, u):
    """The first token whose cumulative probability exceeds u: probabilities (B, V), u (B,) in [0, 1) -> ids (B,)."""
    cdf = probs.cumsum(-1)
    u = u.clamp(max=1 - 2 ** -24)[:, None]  # a float64 below 1 may have become a float32 of 1, beyond all tokens
    # scaled, because a float sum may miss 1
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def check_finite(logprobs, temperature):
    """UserError where a log-probability of drawn tokens (a list) is nan."""
    if any(map(math.isnan, logprobs)):
        raise UserError(f'the logits of the next token are not finite at temperature={temperature}: the weights have '
                        'diverged (lower learning_rate), or 16 bits do not hold them (take dtype=float32)')


def sample(logits, texts, u, vocab_limit=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           entropies=False):
    """Draws a token per row from logits (B, V) with uniform numbers u (B,) -> ids and their log-probabilities, lists.

    texts: the ids of each row so far, for the penalty; the options are those of `generate`. With entropies each token
    has a pair (array): its log-probability and the entropy of the distribution that this is of. UserError where a logit
    is not finite.
    """
    logprobs = F.log_softmax(tempered(logits, temperature or 1.0), dim=-1)
    logits = drawable_logits(logits, texts, vocab_limit, temperature, top_k, top_p, min_p, repetition_penalty)
    ids = logits.argmax(-1) if temperature == 0 else draw(logits.softmax(-1), u)
    drawn = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    check_finite(drawn, temperature)
    if entropies:
        entropy = -(logprobs.exp() * logprobs.clamp(min=-200)).sum(-1)  # exp(-200) is 0, and 0 x -inf were nan
        drawn = torch.stack((logprobs.gather(1, ids[:, None])[:, 0], entropy), 1).cpu().numpy()
    return ids.tolist(), drawn


def penalise(logits, answers, presence=0.0, frequency=0.0):
    """Logits (B, V) less OpenAI's two penalties: presence once for each token that is in the row's answer (lists of
    ids), frequency as often as it is there."""
    logits = logits.clone()  # the caller's stay as they are
    for row, answer in zip(logits, answers, strict=True):
        counts = Counter(answer)
        ids = torch.tensor([*counts], dtype=torch.long, device=row.device)
        times = torch.tensor([*counts.values()], dtype=row.dtype, device=row.device)
        row[ids] -= presence + frequency * times
    return logits


# ----------------------------------------------------------------------------------------------------------------------
# texts side by side

class Replacement(list):
    """Ids that come in place of the last `count` ids of an answer, `times` times in it at most: what a `force` may
    return. Without ids: whether others will come for these is not known yet, so they are held back."""

    def __init__(self, ids, count, times):
        super().__init__(ids)
        self.count, self.times = count, times


@dataclass
class Row:
    """A text that is continued."""
    ids: list  # the prompt, and what has come since
    max_new_tokens: int
    uniforms: list  # a number in [0, 1) to draw each new token with
    number: int = 0  # whatever its owner calls it
    source: int = 0  # of the Batch's sources, the one that it is about
    force: object = None  # see `generate`
    forced: list = field(default_factory=list)  # ids that come next, whatever the model would say
    held: list = field(default_factory=list)  # what `Batch.append` has not given out yet
    replaced: int = 0  # how often a Replacement has come
    taken_back: int = 0  # ids that one came for
    start: int = 0  # the first id that the model sees
    done: bool = False

    def __post_init__(self):
        self.ids, self.n_prompt = list(self.ids), len(self.ids)

    def push(self, token, stop_ids=()):
        """Takes its next token -> how many of its last ids a Replacement takes back, and how many it holds back."""
        self.ids.append(token)
        back = held = 0
        if self.force is not None and not self.forced:
            forced = self.force(self.answer)
            if isinstance(forced, Replacement):
                if self.replaced == forced.times:
                    forced = []
                elif forced:
                    back = forced.count
                    del self.ids[-back:]
                    self.replaced += 1
                    self.taken_back += back
                else:
                    held = forced.count
            self.forced = list(forced)
        self.done = token in stop_ids and not self.forced or len(self.ids) - self.n_prompt >= self.max_new_tokens
        return back, 0 if self.done else held

    @property
    def answer(self):
        return self.ids[self.n_prompt:]

    @property
    def context(self):
        return self.ids[self.start:]

    @property
    def length(self):
        """The longest context that it can come to."""
        return self.n_prompt + self.max_new_tokens - self.start

    @property
    def u(self):
        """The number to draw the next token with; those that are used up begin again."""
        return self.uniforms[(len(self.ids) - self.n_prompt + self.taken_back) % len(self.uniforms)]


class Batch:
    """Rows that a model in eval() continues side by side; see the top of this file.

    A row may join while others are being continued; what is drawn for it does not depend on them. use_cache: False
    reads every context afresh at each step. rolling: use a RollingCache. sources: lists of ids for the encoder, which
    Row.source indexes. room: for how many new tokens a cache has memory at first; it grows. None: for all of them.
    """

    def __init__(self, model, use_cache=True, rolling=False, sources=None, room=None):
        self.model, self.use_cache, self.rolling, self.room = model, use_cache, rolling, room
        self.rows, self.cache, self.waiting = [], None, None
        self.memory = self.memory_mask = None
        if sources is not None:
            device = model.tok_emb.weight.device
            lengths = torch.tensor([len(source) for source in sources])
            self.memory_mask = (torch.arange(lengths.max()) < lengths[:, None]).to(device)
            self.memory = model.encode(padded(sources).to(device), self.memory_mask)

    def admit(self, rows, shared=1, cache=None):
        """Reads the prompts of new rows, of which `shared` neighbours have the same; they join at the next `advance`.

        cache: holds the beginning of the one prompt (`KVCache.part`).
        """
        for _ in self.admit_in_parts(rows, shared, cache=cache):
            pass

    @torch.inference_mode()
    def admit_in_parts(self, rows, shared=1, size=0, cache=None):
        """As `admit`, size tokens of each prompt at a time: a generator that yields between two parts, so that other
        rows can advance while a long prompt is read."""
        if not self.rolling:
            for row in rows:
                row.start = max(0, len(row.ids) - self.model.config.block_size)
        first, known = rows[::shared], cache.lengths[0] if cache else 0
        cache = cache or self.new_cache(first)
        contexts = [row.context[known:] for row in first]
        for logits in prefill_in_parts(self.model, contexts, cache, *self.seen(first), size):
            if logits is None:
                yield
        if shared > 1:
            copies = [i for i in range(len(rows) // shared) for _ in range(shared)]
            logits = logits[copies]
            if cache is not None:
                cache.select(copies)
        if self.waiting is not None:
            earlier, cache_before, logits_before = self.waiting
            rows, logits = earlier + rows, torch.cat((logits_before, logits))
            if cache is not None:
                cache_before.extend(cache)
                cache = cache_before
        self.waiting = rows, cache, logits

    def shorten(self, row):
        """A context longer than the model's is cut to its last three quarters, to be read afresh, as in training, where
        every window begins at position 0: one pass over 3/4 T buys T/4 tokens."""
        block = self.model.config.block_size
        if not self.rolling and len(row.ids) - row.start > block:
            row.start = len(row.ids) - max(1, block * 3 // 4)

    def new_cache(self, rows):
        """An empty cache for rows, or None."""
        config, device = self.model.config, self.model.tok_emb.weight.device
        if self.rolling:
            return RollingCache(config, len(rows), device)
        longest = max(row.length if self.room is None else min(row.length, len(row.context) + self.room)
                      for row in rows)
        return KVCache(config, len(rows), min(config.block_size, longest), device) if self.use_cache else None

    def seen(self, rows):
        """What the encoder made of the sources of rows, and what of it is real."""
        if self.memory is None:
            return None, None
        of = torch.tensor([row.source for row in rows], device=self.memory.device)
        return self.memory[of], self.memory_mask[of]

    @property
    def full(self):
        """Whether a row fills the model's context."""
        return self.cache is not None and not self.rolling and max(self.cache.lengths) == self.model.config.block_size

    @torch.inference_mode()
    def advance(self):
        """float32 logits (B, V) of the next token of each of `rows`, those that have joined last."""
        if not self.rows and self.waiting is None:
            raise ValueError('a batch without rows cannot advance: admit some first')
        logits = []
        if self.rows and (self.cache is None or self.full):
            for row in self.rows:
                self.shorten(row)
            contexts = [row.context for row in self.rows]
            cache = self.new_cache(self.rows)
            logits.append(prefill(self.model, contexts, cache, *self.seen(self.rows)))
            self.cache = cache
        elif self.rows:
            logits.append(decode_step(self.model, [row.ids[-1] for row in self.rows], self.cache))
        if self.waiting is not None:
            rows, cache, new = self.waiting
            self.rows, self.waiting = self.rows + rows, None
            logits.append(new)
            if self.cache is None:
                self.cache = cache
            else:
                self.cache.extend(cache)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def append(self, ids, logprobs, stop_ids=()):
        """Gives each row that is not done its next token -> (numbers of these rows, ids, log-probabilities), lists,
        without those of tokens that a Replacement may come for; they follow when that is known."""
        out = []
        for i, (row, token, logprob) in enumerate(zip(self.rows, ids, logprobs, strict=True)):
            if row.done:
                continue
            if row.forced:
                token, logprob = row.forced.pop(0), logprob * math.nan
            row.held.append((row.number, token, logprob))
            back, held = row.push(token, stop_ids)
            if back:
                del row.held[-back:]
                if self.rolling or self.model.config.n_delta:
                    self.cache = None  # its oldest tokens are gone, or all are in one state: it is read afresh
                elif self.cache is not None:
                    self.cache.lengths[i] -= back
            known = len(row.held) - held
            out += row.held[:known]
            del row.held[:known]
        return tuple(map(list, zip(*out, strict=True))) if out else ([], [], [])

    @torch.inference_mode()
    def fork(self, parents, ids):
        """Rows take the places of these (indices; one may be named several times), each with a token more."""
        self.rows = [copy.copy(self.rows[parent]) for parent in parents]
        for row, token in zip(self.rows, ids, strict=True):
            row.ids = [*row.ids, token]
        if self.cache is not None:
            self.cache.select(parents)

    @torch.inference_mode()
    def retire(self, at_once=True):
        """Takes out the rows that are done, at_once or a quarter of them at a time: what is kept of a cache is copied.
        """
        keep = [i for i, row in enumerate(self.rows) if not row.done]
        done = len(self.rows) - len(keep)
        if done and (at_once or self.cache is None or self.full or 4 * done >= len(self.rows)):
            self.rows = [self.rows[i] for i in keep]
            if self.cache is not None:
                self.cache.select(keep)
        if not self.rows:
            self.cache = None


# ----------------------------------------------------------------------------------------------------------------------
# whole texts

def generate(model, prompts, max_new_tokens, return_logprobs=False, **options):
    """Continues ragged prompts (lists of ids) -> a list of lists of new ids, prompt i's samples at i*num_samples ….

    temperature 0 is greedy. top_k, top_p, min_p: see `filter_logits`. repetition_penalty (arXiv:1909.05858) divides
    the positive and multiplies the negative logits of tokens already in the row. A row ends after a token of
    stop_ids, which is its last id. num_samples continuations per prompt share one pass over it. seed makes it
    repeatable, row by row: what is drawn for a prompt depends on no other one, and with a list of seeds, one each,
    not on its place either. vocab_limit: ids from here on (padding of the vocabulary) are never drawn. With
    return_logprobs also the log-probability of each new id under softmax(logits / temperature), softmax(logits) for
    temperature 0, before any filter or penalty; with entropies pairs of it and of that distribution's entropy.
    force(new ids of a row so far) returns ids that come next whatever the model would choose; their log-probability is
    nan, and a token of stop_ids that one of them follows ends nothing. A `Replacement` comes in place of the row's last
    ids. It may be a list of functions, one for each prompt. sources: for each prompt the ids that an encoder reads.
    draft: a speculative.Draft, which proposes tokens. A text longer than block_size is continued from its last part,
    without end if all layers have a window. Raises ValueError for an empty prompt, ids outside the vocabulary, a prompt
    longer than a table of learned positions, and logits that are not finite.
    """
    out = [[] for _ in range(len(prompts) * options.get('num_samples', 1))]
    logs = [[] for _ in out]
    for rows, ids, logprobs in stream(model, prompts, max_new_tokens, **options):
        for r, token, logprob in zip(rows, ids, logprobs, strict=True):
            out[r].append(token)
            logs[r].append(logprob)
    return (out, logs) if return_logprobs else out


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
           stop_ids=(), num_samples=1, seed=None, vocab_limit=0, use_cache=True, sources=None, force=None,
           entropies=False, draft=None):
    """As `generate`, token by token: yields (rows, ids, logprobs), three lists over the rows still unfinished."""
    config = model.config
    check_prompts(prompts, config, sources)
    check_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, num_samples)
    rolling = outgrows_a_window(config, max(map(len, prompts), default=0) + max_new_tokens) and use_cache
    if isinstance(seed, list) and len(seed) != len(prompts):
        raise ValueError(f'{len(seed)} seeds for {len(prompts)} prompts: give one for each, or one number')
    if not prompts or not max_new_tokens:
        return
    if draft is not None:
        draft.check(model, rolling, use_cache, entropies, vocab_limit)
    options = {'vocab_limit': vocab_limit, 'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'min_p': min_p,
               'repetition_penalty': repetition_penalty}
    draws = uniforms(seed, len(prompts), num_samples, max_new_tokens * (3 if draft is not None else 1))
    force = force if isinstance(force, list) else [force] * len(prompts)
    rows = [Row(prompts[i // num_samples], max_new_tokens, draws[i], i, i // num_samples, force[i // num_samples])
            for i in range(len(draws))]
    stop_ids, device = set(stop_ids), model.tok_emb.weight.device
    was_training = model.training
    model.eval()  # dropout must not reach a sample
    try:
        if draft is not None:
            yield from draft.continue_rows(model, rows, stop_ids, **options)
            return
        batch = Batch(model, use_cache, rolling, sources)
        batch.admit(rows, num_samples)
        while not all(row.done for row in rows):
            logits = batch.advance()
            u = torch.tensor([row.u for row in batch.rows], device=device)
            ids, logprobs = sample(logits, [row.ids for row in batch.rows], u, entropies=entropies, **options)
            yield batch.append(ids, logprobs, stop_ids)
            batch.retire(at_once=False)
    finally:
        model.train(was_training)


def outgrows_a_window(config, longest):
    """Whether a text that comes to so many tokens can go through a RollingCache. Raises ValueError where the learned
    positions of a model with a window end before it does."""
    if config.window and config.pos == 'learned' and longest > config.block_size:
        raise ValueError(f'{longest} tokens of prompt and answer: with window={config.window} and '
                         f"pos='learned' a text ends at block_size={config.block_size}")
    return (config.window > 0 and all(config.is_local(i) or config.is_delta(i) for i in range(config.n_layer))
            and config.block_size >= config.n_sink + config.window < longest)


def check_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, num_samples):
    """Raises ValueError with one sentence for options that sampling cannot have."""
    if num_samples < 1 or max_new_tokens < 0:
        raise ValueError('sampling needs num_samples >= 1 and max_new_tokens >= 0')
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1  # each is wrong for nan, too
            and 0 < repetition_penalty < math.inf):
        raise ValueError('sampling needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1 and '
                         'a finite repetition_penalty > 0')


def check_prompts(prompts, config, sources=None):
    """Raises ValueError with one sentence for prompts, and sources for an encoder, that this model cannot continue."""
    if not config.causal:
        raise ValueError('a model with causal=False is an encoder: it cannot generate')
    if (sources is None) == (config.n_encoder_layer > 0) or sources is not None and len(sources) != len(prompts):
        raise ValueError('a model with n_encoder_layer needs a source for each prompt, any other none')
    for what, texts in (('prompt', prompts), ('source', sources or ())):
        for i, text in enumerate(texts):
            if not len(text):
                raise ValueError(f'{what} {i} is empty: give at least one token')
            if min(text) < 0 or max(text) >= config.vocab_size:
                bad = next(t for t in text if not 0 <= t < config.vocab_size)
                raise ValueError(f'{what} {i}: token id {bad} is outside the vocabulary of {config.vocab_size}')
            if len(text) > config.block_size and (config.pos == 'learned' or what == 'source'):
                limit = 'the learned positions end' if config.pos == 'learned' else 'a source ends'
                raise ValueError(f'{what} {i} has {len(text)} tokens and {limit} at block_size={config.block_size}: '
                                 'shorten it')


def uniforms(seed, n_prompts, num_samples, steps):
    """Numbers in [0, 1) to draw with, a list of `steps` for each of n_prompts * num_samples rows; seed: None, one, or
    one per prompt."""
    if not isinstance(seed, list):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        seed = torch.randint(1 << 62, (n_prompts,), generator=generator).tolist()
    parts = [torch.rand(steps, num_samples, generator=torch.Generator().manual_seed(s)) for s in seed]
    return torch.cat(parts, 1).T.tolist() if parts else []
