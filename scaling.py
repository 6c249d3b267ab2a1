"""
A scaling law of runs that were made: loss = E + A / N^a + B / D^b, for N parameters and D tokens, with the intervals of
its coefficients, the sizes that a budget is best spent on, and what it predicts of a run that has not been made yet.

    python bench.py scaling             trains a ladder of models, fits the law, predicts a larger run, then makes it

Papers: Training Compute-Optimal Large Language Models (arXiv:2203.15556), whose third approach this is; Chinchilla
Scaling: A replication attempt (arXiv:2404.10102), on how far such a fit can be trusted.
"""
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from plot import new_figure
from tokenizer import UserError

HUBER = 1e-3  # residuals of log loss beyond this count linearly, as in the paper
STARTS = list(itertools.product((0.3, 0.7), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)))  # E over the lowest loss, a, b


class Law(NamedTuple):
    """loss = E + A / N^a + B / D^b, in nats per token."""
    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, n, d):
        return self.E + self.A * n ** -self.a + self.B * d ** -self.b

    def best_size(self, flops):
        """The N of the lowest loss where 6 N D = flops (arXiv:2203.15556, equation 4); nan where more of N or of D does
        not help."""
        if min(self.a, self.b) <= 0:
            return math.nan * flops
        scale = (math.log(self.a * self.A) - math.log(self.b * self.B)) / (self.a + self.b)
        return np.exp(scale + self.share * np.log(flops / 6))

    @property
    def share(self):
        """The exponent of N in `best_size`; that of D is 1 minus this."""
        return self.b / (self.a + self.b) if min(self.a, self.b) > 0 else math.nan


def fit(n, d, losses, starts=STARTS, law=None):
    """The law of runs with n parameters, d tokens and these losses (arrays), by the lowest sum of Huber losses of its
    log loss that L-BFGS finds from any of the starts, and from a law if one is given -> (Law, that sum).

    UserError where the runs have fewer than two sizes or token counts: nothing then tells the terms apart.
    """
    n, d, losses = (np.asarray(values, np.float64) for values in (n, d, losses))
    if min(len(set(n)), len(set(d))) < 2 or len(n) < len(Law._fields):
        raise UserError(f'a scaling law has five coefficients: {len(n)} runs of {len(set(n))} sizes and {len(set(d))} '
                        'token counts do not settle them')
    # logs from their means on: the coefficients are then nearly independent of the exponents
    x, y, target = (torch.from_numpy(np.log(values)) for values in (n, d, losses))
    x_mean, y_mean, lowest = x.mean(), y.mean(), losses.min()
    x, y = x - x_mean, y - y_mean
    points = [(math.log(part * lowest), math.log((1 - part) * lowest / 2), a, math.log((1 - part) * lowest / 2), b)
              for part, a, b in starts]
    if law:
        points.append((math.log(law.E), math.log(law.A) - law.a * x_mean, law.a, math.log(law.B) - law.b * y_mean,
                       law.b))
    best, least = None, math.inf
    for point in points:
        theta = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14,
                                      line_search_fn='strong_wolfe')

        def closure(theta=theta, optimizer=optimizer):
            optimizer.zero_grad()
            e, a, alpha, b, beta = theta
            log_loss = torch.stack((e.expand_as(x), a - alpha * x, b - beta * y)).logsumexp(0)
            value = torch.nn.functional.huber_loss(log_loss, target, reduction='sum', delta=HUBER)
            value.backward()
            return value
        optimizer.step(closure)
        value = closure().item()
        if value < least:
            best, least = theta.detach(), value
    e, a, alpha, b, beta = best.tolist()
    return Law(math.exp(e), math.exp(a + alpha * x_mean), alpha, math.exp(b + beta * y_mean), beta), least


def bootstrap(n, d, losses, law, count=300, seed=0):
    """Laws of as many runs, drawn with replacement from those given, count times. Each starts from the law of all, and
    from two others: where E has gone to 0 the loss does not say that it should come back."""
    rng, laws = np.random.default_rng(seed), []
    n, d, losses = (np.asarray(values, np.float64) for values in (n, d, losses))
    while len(laws) < count:
        drawn = rng.integers(len(n), size=len(n))
        if min(len(set(n[drawn])), len(set(d[drawn]))) > 1:
            laws.append(fit(n[drawn], d[drawn], losses[drawn], ((0.3, 0.2, 0.2), (0.7, 0.5, 0.5)), law)[0])
    return laws


def interval(values):
    """The middle 95 % of values, without those that are nan -> (low, high)."""
    low, high = np.nanquantile(np.asarray(values, np.float64), (0.025, 0.975))
    return float(low), float(high)


def predict(laws, residuals, n, d, seed=0):
    """The 95 % interval of the loss of one run that is not among those of the laws: theirs differ by what the fit does
    not know, and a residual of the log loss is drawn for each, since no run lies on its law -> (low, high)."""
    drawn = np.random.default_rng(seed).choice(residuals, (len(laws), 25))
    return interval([law.loss(n, d) * np.exp(row) for law, row in zip(laws, drawn, strict=True)])


def draw(path, runs, law, laws, made, measured):
    """Two panels: losses over tokens by size, with the law and the predicted run; sizes over FLOP, with the best ones.

    runs: [{'size', 'parameters', 'tokens', 'loss'}]; made: the prediction, a dict; measured: the loss of its run.
    """
    figure, ((left, right),) = new_figure(1, 2, 5, 4)
    d = np.geomspace(min(run['tokens'] for run in runs), made['tokens'], 50)
    for i, size in enumerate(dict.fromkeys(run['size'] for run in runs)):
        inside = [run for run in runs if run['size'] == size]
        n = inside[0]['parameters']
        left.plot([run['tokens'] for run in inside], [run['loss'] for run in inside], 'o', color=f'C{i}', markersize=4,
                  label=f'{size}: {n / 1e6:.2f} M')
        left.plot(d, law.loss(n, d), color=f'C{i}', linewidth=1)
        right.plot([6 * n * run['tokens'] for run in inside], [n] * len(inside), 'o', color=f'C{i}', markersize=4)
    n, predicted = made['parameters'], made['loss']
    left.plot(d, law.loss(n, d), 'k--', linewidth=1)
    left.errorbar([made['tokens']], [predicted], [[predicted - made['low']], [made['high'] - predicted]], color='k',
                  capsize=4, linewidth=1, label=f'{made["size"]}: {n / 1e6:.2f} M, predicted, 95 %')
    left.plot([made['tokens']], [measured], 'r*', markersize=9, label='the run, made afterwards')
    left.set(xlabel='training tokens', ylabel='held-out loss', xscale='log')
    left.legend(frameon=False, fontsize=7)
    flops = np.geomspace(min(6 * run['parameters'] * run['tokens'] for run in runs), 6 * n * made['tokens'], 50)
    low, high = np.nanquantile([other.best_size(flops) for other in laws], (0.025, 0.975), axis=0)
    right.plot(flops, law.best_size(flops), 'k', linewidth=1, label=f'best size, FLOP^{law.share:.2f}')
    right.fill_between(flops, low, high, color='k', alpha=0.15, linewidth=0, label='its 95 % interval')
    right.plot([6 * n * made['tokens']], [n], 'r*', markersize=9)
    right.set(xlabel='FLOP of training, 6 N D', ylabel='parameters', xscale='log', yscale='log')
    right.legend(frameon=False, fontsize=7)
    figure.savefig(path)
