"""
A model that scores texts: what reward.py trains, and what PPO takes for rewards or for its critic.

    scores = RewardModel(gpt, ScoreConfig('last'))(idx, real, answer)    # (B,), one number for each text
    rewards = model.rewards(idx, real, answer)                           # the same on a known scale
    values = model(idx, answer=answer, output='values')                  # (B, T), of each text up to each of its tokens

Papers: Fine-Tuning Language Models from Human Preferences (arXiv:1909.08593), DPO's implicit reward (arXiv:2305.18290).
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import pooled, real_first


@dataclass
class ScoreConfig:
    """How a reward model scores a text. Raises ValueError for an unknown score_head."""
    score_head: str = 'last'  # a reward model's score is read at the 'last' token of a text or from the 'mean' of all
    score_likelihood: bool = False  # the score also counts the answer's log-probability, by the other head, which stays

    def __post_init__(self):
        if self.score_head not in ('last', 'mean'):
            raise ValueError(f"score_head={self.score_head!r} is not one of 'last', 'mean'")


def hidden_and_losses(model, hidden, targets):
    """An `output` of GPT.forward: hidden states (B, T, C), and the cross-entropies (B, T) of targets, if any."""
    return hidden, None if targets is None else model.cross_entropy(hidden, targets, 'none')


class RewardModel(nn.Module):
    """A GPT, causal or not, that scores texts by a linear function of one vector per text (arXiv:1909.08593).

    With score_likelihood, the answer's log-probability times a learned gain is added: DPO's implicit reward
    (arXiv:2305.18290) without its reference. A small model finds a wrong number unlikely long before a score has
    learned that it is wrong. Without score_likelihood the head is removed from the gpt that is passed in.
    """

    def __init__(self, gpt, score=None):
        super().__init__()
        self.gpt, self.score_config = gpt, score or ScoreConfig()
        if self.score_config.score_likelihood and gpt.head is None:
            raise ValueError('score_likelihood=True needs a model with a head')
        if gpt.encoder is not None:
            raise ValueError(f'n_encoder_layer={len(gpt.encoder)}: a reward model needs a decoder or an encoder alone')
        if self.score_config.score_likelihood and not gpt.config.causal:
            raise ValueError('score_likelihood=True needs causal=True')
        self.score = nn.Linear(gpt.config.n_embd, 1, device=gpt.tok_emb.weight.device)
        self.score_gain = None
        self.register_buffer('score_scale', torch.tensor([1.0, 0.0]))  # gain and bias of `rewards`
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
        values, the score of each text up to each token, on the scale of `rewards`, for PPO's critic.
        """
        if output == 'values':
            return self.values(idx, answer)
        idx, real, answer = real_first(idx, real, answer if answer is not None else torch.ones_like(idx).bool())
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

    def values(self, idx, answer):
        """See `forward`."""
        if not self.config.causal:
            raise ValueError("output='values' needs causal=True: every token would see those after it")
        real = answer.flip(1).cumsum(1).flip(1) > 0  # nothing but padding follows the answer
        hidden, losses = self.read(idx, real, answer)
        with torch.autocast(idx.device.type, enabled=False):
            vectors = hidden.float()
            if self.score_config.score_head == 'mean':
                vectors = vectors.cumsum(1) / torch.arange(1, idx.shape[1] + 1, device=idx.device)[:, None]
            scores = self.linear(vectors)
        if losses is not None:
            scores = scores - self.score_gain.float() * F.pad(losses.cumsum(1), (1, 0))[:, :-1]
        gain, bias = self.score_scale
        return gain * scores + bias

    def rewards(self, idx, real=None, answer=None):
        """Scores (B,) times the gain and plus the bias of `score_scale`: what makes those of held-out answers have mean
        0 and variance 1, once these have been measured (arXiv:1909.08593)."""
        gain, bias = self.score_scale
        return gain * self(idx, real, answer) + bias
