"""
A model that scores texts: what reward.py trains, and what PPO takes for rewards or for its critic.

    scores = RewardModel(gpt, ScoreConfig('last'))(idx, real, answer)    # (B,), one number for each text
    rewards = model.rewards(idx, real, answer)                           # the same on a known scale
    values = model(idx, answer=answer, output='values')                  # (B, T), of each text up to each of its tokens
    logits = model(idx, answer=answer, output='steps')                   # (B, T), of the steps that end at `step_ends`

Papers: Fine-Tuning Language Models from Human Preferences (arXiv:1909.08593), DPO's implicit reward (arXiv:2305.18290),
Let's Verify Step by Step (arXiv:2305.20050).
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import pooled, real_first


@dataclass
class ScoreConfig:
    """How a reward model scores a text. Raises ValueError for an unknown score_head or score_steps."""
    score_head: str = 'last'  # a reward model's score is read at the 'last' token of a text or from the 'mean' of all
    score_likelihood: bool = False  # the score also counts the answer's log-probability, by the other head, which stays
    score_steps: str = ''  # a process reward model: each step has a probability, the 'min' or 'product' of them counts

    def __post_init__(self):
        if self.score_steps not in ('', 'min', 'product'):
            raise ValueError(f"score_steps={self.score_steps!r} is not one of '', 'min', 'product'")
        if self.score_head not in ('last', 'mean'):
            raise ValueError(f"score_head={self.score_head!r} is not one of 'last', 'mean'")


def hidden_and_losses(model, hidden, targets):
    """An `output` of GPT.forward: hidden states (B, T, C), and the cross-entropies (B, T) of targets, if any."""
    return hidden, None if targets is None else model.cross_entropy(hidden, targets, 'none')


def before(x):
    """The largest of x (B, T), not below 0, at the places before each: (B, T)."""
    return F.pad(x.cummax(1).values, (1, 0))[:, :-1]


class RewardModel(nn.Module):
    """A GPT, causal or not, that scores texts by a linear function of one vector per text (arXiv:1909.08593).

    With score_likelihood, the answer's log-probability times a learned gain is added: DPO's implicit reward
    (arXiv:2305.18290) without its reference. A small model finds a wrong number unlikely long before a score has
    learned that it is wrong. Without score_likelihood the head is removed from the gpt that is passed in.

    With score_steps (arXiv:2305.20050) the linear function gives the logit that a step is right at the step's last
    token, where score_likelihood counts this step alone, and the score of a text is the log of the smallest probability
    of its steps ('min') or of their product. A step is a line of the answer.
    """

    def __init__(self, gpt, score=None):
        super().__init__()
        self.gpt, self.score_config = gpt, score or ScoreConfig()
        if self.score_config.score_likelihood and gpt.head is None:
            raise ValueError('score_likelihood=True needs a model with a head')
        if gpt.encoder is not None:
            raise ValueError(f'n_encoder_layer={len(gpt.encoder)}: a reward model needs a decoder or an encoder alone')
        for field in ('score_likelihood', 'score_steps'):
            if (value := getattr(self.score_config, field)) and not gpt.config.causal:
                raise ValueError(f'{field}={value} needs causal=True')
        self.score = nn.Linear(gpt.config.n_embd, 1, device=gpt.tok_emb.weight.device)
        self.score_gain = None
        self.register_buffer('score_scale', torch.tensor([1.0, 0.0]))  # gain and bias of `rewards`
        if self.score_config.score_steps:  # Tokenizer.token_lines, see `step_ends`
            self.register_buffer('score_lines', torch.zeros(gpt.config.vocab_size, dtype=torch.uint8))
        if self.score_config.score_likelihood:
            self.score_gain = nn.Parameter(torch.full((1,), 0.1))  # DPO's usual beta
        else:
            gpt.head = None
        if not self.score.weight.is_meta:
            nn.init.normal_(self.score.weight, 0.0, (gpt.config.n_embd + 1) ** -0.5)
            nn.init.zeros_(self.score.bias)

    @property
    def config(self):
        return self.gpt.config

    def num_params(self, learning=False):
        """As `GPT.num_params`, with the score's own."""
        score = [p for name, p in self.named_parameters() if name.startswith('score')]
        return self.gpt.num_params(learning) + sum(p.numel() for p in score if p.requires_grad or not learning)

    def flops_per_token(self, T):
        return self.gpt.flops_per_token(T)

    def memory(self):
        return self.gpt.memory() + sum(t.nbytes for n, t in self.state_dict().items() if n.startswith('score'))

    def forward(self, idx, real=None, answer=None, output='scores'):
        """ids (B, T), bool (B, T) True where a token is real and where it is the answer's, None = all -> (B,) float32.

        Padding may stand anywhere. output='values' (a causal model, padding on the right, `real` is not used): (B, T)
        values, the score of each text up to each token, on the scale of `rewards`, for PPO's critic. output='steps'
        (alike, with score_steps): (B, T) logits that a step is right, which count where `step_ends`.
        """
        if output == 'values':
            if not self.config.causal:
                raise ValueError("output='values' needs causal=True: every token would see those after it")
            gain, bias = self.score_scale
            return gain * self.running(idx, answer) + bias
        if output == 'steps':
            return self.running(idx, answer, steps=True)
        idx, real, answer = real_first(idx, real, answer if answer is not None else torch.ones_like(idx).bool())
        if self.score_config.score_steps:
            return self.running(idx, answer & real)[:, -1]
        hidden, losses = self.read(idx, real, answer & real)
        with torch.autocast(idx.device.type, enabled=False):  # differences of scores want all digits
            scores = self.linear(pooled(hidden, real, self.score_config.score_head).float())
        return scores if losses is None else scores - self.score_gain.float() * losses.sum(1)

    def read(self, idx, real, answer):
        """Hidden states (B, T, C) and, with score_likelihood, the losses (B, T) of the answer's tokens."""
        targets = None
        if self.score_gain is not None:
            targets = idx.roll(-1, 1).masked_fill(~answer.roll(-1, 1), -100)
            targets[:, -1] = -100
        mask = None if self.config.causal else real[:, None, None]
        return self.gpt(idx, targets, mask=mask, real=real, output=hidden_and_losses)

    def linear(self, vectors):
        """float32 vectors (…, C) -> (…)."""
        return F.linear(vectors, self.score.weight.float(), self.score.bias.float())[..., 0]

    def step_ends(self, idx, answer):
        """Where the steps of answers end, and where one would if the answer ended there: two bool (B, T) of ids and
        bool (B, T).

        A step is a line that is not blank. It ends with the token that has its newline, the last one with the answer;
        an answer without any text is one step.
        """
        lines = self.score_lines[idx] * answer
        text = (lines & 1).long().cumsum(1)  # how many tokens with text there are up to each
        stops = (lines > 1) & (text > 0)
        inside = answer & ((text > before(text * stops)) | (text == 0))
        last = answer.cumsum(1) == answer.sum(1, keepdim=True)
        return inside & (stops | last), inside

    def running(self, idx, answer, steps=False):
        """Scores of texts up to each token, or for steps the logits of these, float32 (B, T); see `forward`."""
        real = answer.flip(1).cumsum(1).flip(1) > 0  # nothing but padding follows the answer
        hidden, losses = self.read(idx, real, answer)
        with torch.autocast(idx.device.type, enabled=False):
            vectors = hidden.float()
            if self.score_config.score_head == 'mean':
                vectors = vectors.cumsum(1) / torch.arange(1, idx.shape[1] + 1, device=idx.device)[:, None]
            scores = self.linear(vectors)
        how = self.score_config.score_steps
        ends, inside = self.step_ends(idx, answer) if how else (None, None)
        if losses is not None:
            losses = F.pad(losses.cumsum(1), (1, 0))[:, :-1]  # of the answer up to each token
            scores = scores - self.score_gain.float() * (losses - before(losses * ends) if how else losses)
        if not how or steps:
            return scores
        # of the steps that have ended, and of the one that is being written
        ended, now = (F.logsigmoid(scores).masked_fill(~which, 0.0) for which in (ends, inside))
        return torch.minimum(-before(-ended), now) if how == 'min' else ended.cumsum(1) - ended + now

    def rewards(self, idx, real=None, answer=None):
        """Scores (B,) times the gain and plus the bias of `score_scale`: what makes those of held-out answers have mean
        0 and variance 1, once these have been measured (arXiv:1909.08593)."""
        gain, bias = self.score_scale
        return gain * self(idx, real, answer) + bias
