"""
Speculative decoding: a draft proposes the next tokens, the model reads all of them in one pass and keeps those that it
could have drawn itself. The text has exactly the model's distribution; greedily it is the same, token for token.

    draft = Draft(small, n_tokens=4)                  a model with the same tokenizer
    draft = Draft(n_tokens=3)                         the model's own further heads (GPTConfig.n_future)
    ids = generate(model, prompts, 100, draft=draft)
    draft.accepted / draft.proposed                   the share of its proposals that were kept

Papers: Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192), with the model's own heads
Blockwise Parallel Decoding (arXiv:1811.03115) and Multi-token Prediction (arXiv:2404.19737).
"""
import math

import torch
import torch.nn.functional as F

from generate import KVCache, check_finite, draw, drawable_logits, padded
from model import tempered


def verify(p, q, drafts, n_drafts, u_accept, u_draw):
    """Which proposals stay, and the token after them (arXiv:2211.17192, algorithm 1) -> how many (B,), ids (B,).

    p (B, k + 1, V): the model's distribution at the place of each proposal and at the next; q (B, k, V): those that the
    proposals, drafts (B, k), were drawn from; n_drafts (B,): how many of them a row has. A proposal x stays with
    probability min(1, p(x) / q(x)); the first that does not is drawn anew from max(p - q, 0), normalised, so that
    together its place has p. Where all stay, one more token is drawn from p. u_accept (B, k), u_draw (B, k + 1): in
    [0, 1), independent of each other and of what the drafts were drawn with.
    """
    at, rows = drafts[..., None], torch.arange(len(p), device=p.device)
    ratio = p[:, :-1].gather(2, at)[..., 0] / q.gather(2, at)[..., 0]
    stays = (u_accept < ratio) & (torch.arange(drafts.shape[1], device=p.device) < n_drafts[:, None])
    accepted = stays.int().cumprod(1).sum(1)
    p = p[rows, accepted]
    q = F.pad(q, (0, 0, 0, 1))[rows, accepted] * (accepted < n_drafts)[:, None]  # all stayed: nothing to subtract
    left = (p - q).clamp(min=0)
    total = left.sum(1, keepdim=True)
    left = torch.where(total > 0, left / total, p)  # 0: p and q differ by rounding alone
    return accepted, draw(left, u_draw[rows, accepted])


def probabilities(logits, texts, options):
    """The distributions that tokens are drawn from, after all filters: logits (B, V), their texts -> (B, V)."""
    logits = drawable_logits(logits, texts, **options)
    if options['temperature'] == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return logits.softmax(-1)


class Reader:
    """A model, so many of its further heads, and what they have read of some texts: their cache, and the first token of
    each text that they see."""

    def __init__(self, model, rows, heads=0):
        self.model, self.heads, self.block = model, heads, model.config.block_size
        self.starts = [max(0, len(row.ids) - self.block) for row in rows]
        longest = max(row.n_prompt + row.max_new_tokens for row in rows)
        self.cache = KVCache(model.config, len(rows), min(self.block, longest), model.tok_emb.weight.device)

    def shorten(self, texts, more=0):
        """Cuts a text that would not fit with so many more tokens to its last part, as `Batch.shorten` does."""
        for b, text in enumerate(texts):
            if len(text) - self.starts[b] + more > self.block:
                self.starts[b] = len(text) - max(1, min(self.block * 3 // 4, self.block - more))
                self.cache.lengths[b] = 0

    def read(self, texts, places, n=1):
        """Reads on in texts (lists of ids) -> hidden states (B, n, C) of n tokens of each from places on, those behind
        its end of anything; with heads a list, see `GPT.hidden`."""
        first = [start + known for start, known in zip(self.starts, self.cache.lengths, strict=True)]
        if max(self.cache.lengths) + max(len(text) - i for text, i in zip(texts, first, strict=True)) > self.block:
            # padding behind a shorter part might stand beyond the last position: read all anew
            self.cache.lengths, first = [0] * len(texts), self.starts
        parts = [text[i:] for text, i in zip(texts, first, strict=True)]
        idx = padded(parts).to(self.cache.device)
        found = self.model.hidden(idx, cache=self.cache, counts=list(map(len, parts)), future=self.heads)
        at = torch.tensor([[place - i] for place, i in zip(places, first, strict=True)]) + torch.arange(n)
        at, rows = at.clamp(max=idx.shape[1] - 1).to(idx.device), torch.arange(len(texts), device=idx.device)[:, None]
        return [x[rows, at] for x in found] if self.heads else found[rows, at]

    def forget(self, b, length):
        """Of text b nothing stays known behind its first `length` tokens: what was rejected is overwritten."""
        self.cache.lengths[b] = max(0, min(self.cache.lengths[b], length - self.starts[b]))

    def select(self, rows):
        self.cache.select(rows)
        self.starts = [self.starts[b] for b in rows]


def uniforms_of(row, n):
    """The three numbers in [0, 1) of each of the next n places of a row; behind its end those of the last."""
    places = [min(len(row.ids) - row.n_prompt + j, row.max_new_tokens - 1) for j in range(n)]
    return [row.uniforms[3 * i:3 * i + 3] for i in places]


def push_all(row, tokens, stop_ids):
    """Gives a row these tokens up to its end or to where its `force` has others, and then those -> how many of these
    it took."""
    n = 0
    while n < len(tokens) and not row.done and not row.forced:
        if any(row.push(tokens[n], stop_ids)):
            raise ValueError('what takes tokens back, as num_waits does, goes without a draft')
        n += 1
    while row.forced and not row.done:
        row.push(row.forced.pop(0), stop_ids)
    return n


class Draft:
    """What proposes n_tokens at a time: a model, or None for the further heads of the model that is to generate.

    proposed, accepted: tokens; passes: of the model, a row each, which brought so many `tokens`.
    """

    def __init__(self, model=None, n_tokens=4):
        self.model, self.n_tokens = model, n_tokens
        self.reset()

    def reset(self):
        """Counts from 0."""
        self.proposed = self.accepted = self.passes = self.tokens = 0

    def check(self, model, rolling=False, use_cache=True, entropies=False, vocab_limit=0):
        """ValueError with one sentence where this cannot be a draft for a model."""
        config, own = model.config, (self.model or model).config
        sizes = {vocab_limit and min(c.vocab_size, vocab_limit) or c.vocab_size for c in (config, own)}
        for wrong, why in (
                (self.n_tokens < 1, f'a draft of {self.n_tokens} tokens: propose at least 1'),
                (self.model is None and not config.n_future,
                 'the model has no further heads (n_future=0) that could be its draft: give another model as draft'),
                (len(sizes) > 1, f'the draft has a vocabulary of {own.vocab_size} tokens and the model one of '
                                 f'{config.vocab_size}: give a draft with the same tokenizer'),
                (config.n_encoder_layer or own.n_encoder_layer or not own.causal,
                 'a draft goes with causal decoders alone'),
                (config.n_delta or own.n_delta,
                 f'layer_pattern={(config if config.n_delta else own).layer_pattern!r}: a draft goes with attention in '
                 'all layers, as a state takes no token back'),
                (rolling, f'window={config.window}: a text that outgrows the window of all layers is continued in a '
                          'cache that takes no token back: drop the draft, or ask for fewer tokens'),
                (not use_cache or entropies, 'a draft needs use_cache=True and entropies=False')):
            if wrong:
                raise ValueError(why)

    def continue_rows(self, model, rows, stop_ids, **options):
        """Continues rows (`generate.Row`) to their ends: yields (numbers, ids, log-probabilities) as `stream`.

        Each place of a text has three numbers in [0, 1) of its own, so that what is drawn depends on no other row: for
        the proposal, for its acceptance and for the token that takes its place.
        """
        heads = min(self.n_tokens, model.config.n_future) if self.model is None else 0
        temperature = options['temperature']
        target = Reader(model, rows, heads)
        readers = [target] if heads else [target, Reader(self.model, rows)]
        further = None  # the heads' hidden states at the last token that was read (B, heads, C)
        while rows:
            texts = [list(row.ids) for row in rows]
            target.shorten(texts)
            n_drafts = [self.how_many(row, target.starts[b], target.cache.lengths[b], model.config, further)
                        for b, row in enumerate(rows)]
            k = max(n_drafts)
            u = torch.tensor([uniforms_of(row, k + 1) for row in rows], device=target.cache.device)  # (B, k + 1, 3)
            ahead = model.logits(further[:, :k]) if heads and k else None
            drafts, q = self.propose(texts, ahead, readers[-1], u[:, :k, 0], options)

            # the model reads the newest token and all proposals
            lengths = [len(row.ids) for row in rows]
            texts = [text[:length + n] for text, length, n in zip(texts, lengths, n_drafts, strict=True)]
            found = target.read(texts, [length - 1 for length in lengths], k + 1)
            logits = model.logits(found[0] if heads else found)  # (B, k + 1, V)
            seen = [text[:length + j] for text, length in zip(texts, lengths, strict=True) for j in range(k + 1)]
            p = probabilities(logits.flatten(0, 1), seen, options).view(len(rows), k + 1, -1)
            accepted, last = verify(p, p[:, :0] if q is None else q, drafts, torch.tensor(n_drafts, device=p.device),
                                    u[:, :-1, 1], u[..., 2])
            tokens = F.pad(drafts, (0, 1)).scatter(1, accepted[:, None], last[:, None])
            scaled = tempered(logits, temperature or 1.0)
            logprobs = (scaled.gather(2, tokens[..., None])[..., 0] - scaled.logsumexp(-1)).tolist()

            # each row takes what stayed, up to its end or to where something is forced
            taken, kept = [], []
            for b, (row, n) in enumerate(zip(rows, accepted.tolist(), strict=True)):
                check_finite(logprobs[b][:n + 1], temperature)
                n_own = push_all(row, tokens[b, :n + 1].tolist(), stop_ids)
                kept.append(min(n_own, n))
                ids = row.ids[lengths[b]:]
                taken.append([(row.number, *pair) for pair in zip(
                    ids, logprobs[b][:n_own] + [math.nan] * (len(ids) - n_own), strict=True)])
                for reader in readers:
                    reader.forget(b, lengths[b] + kept[b])
            self.count(n_drafts, kept, taken)
            for j in range(max(map(len, taken))):
                yield tuple(map(list, zip(*(out[j] for out in taken if len(out) > j), strict=True)))

            keep = [b for b, row in enumerate(rows) if not row.done]
            if heads:
                further = torch.stack(found[1:], 2)[torch.arange(len(rows)), kept][keep]
            if len(keep) < len(rows):
                rows = [rows[b] for b in keep]
                for reader in readers:
                    reader.select(keep)

    def how_many(self, row, start, known, config, further):
        """How many tokens are proposed for a row, of which the model sees all from start on and knows so many."""
        length = len(row.ids)
        # the last token needs no proposal, and a text does not outgrow the model's context with proposals
        n = min(row.n_prompt + row.max_new_tokens - length - 1, start + config.block_size - length)
        if self.model is not None:
            n = min(n, self.n_tokens, self.model.config.block_size - 1)
        elif further is None or start + known < length - 1:
            n = 0  # the heads know nothing before the first pass, and nothing of tokens that were forced after the last
        else:
            n = min(n, self.n_tokens, config.n_future)
        return max(0, n)

    def propose(self, texts, ahead, helper, u, options):
        """k tokens for each of the texts, which they are appended to: ids (B, k), and the distributions (B, k, V) that
        they were drawn from with u (B, k), or None for k = 0. ahead: logits of the heads (B, k, V), or None: the
        helper reads the texts."""
        drafts, q = torch.zeros(u.shape, dtype=torch.long, device=u.device), []
        if self.model is not None:
            helper.shorten(texts, min(self.n_tokens, helper.block - 1))
        for j in range(u.shape[1]):
            if self.model is None:
                logits = ahead[:, j]
            else:
                logits = self.model.logits(helper.read(texts, [len(text) - 1 for text in texts])[:, 0])
            q.append(probabilities(logits, texts, options))
            drafts[:, j] = draw(q[-1], u[:, j])
            check_finite(q[-1].gather(1, drafts[:, j:j + 1])[:, 0].tolist(), options['temperature'])
            for text, token in zip(texts, drafts[:, j].tolist(), strict=True):
                text.append(token)
        return drafts, torch.stack(q, 1) if q else None

    def count(self, n_drafts, kept, taken):
        self.passes += len(taken)
        self.proposed += sum(n_drafts)
        self.accepted += sum(kept)
        self.tokens += sum(map(len, taken))

    def report(self):
        """How often its proposals were accepted, in words."""
        return (f'{self.accepted:,} of {self.proposed:,} proposed tokens accepted, '
                f'{self.accepted / max(1, self.proposed):.0%}; {self.tokens / max(1, self.passes):.2f} tokens per pass')
