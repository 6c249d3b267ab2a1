"""
What stages that learn from samples share: a policy's answers to prompts, their rewards, and their log-probabilities
under the model that is trained.

    rewards = Rewards('number, 0.2*format', policy_tokenizer, run, max_new_tokens=96)
    answers = generate_rollouts(model, data, data.rows(0, 8), run, max_new_tokens=96, num_samples=4)
    totals, parts = rewards(data, answers)
    logprobs, entropies, _ = compute_logprobs(net, run, answers, range(8), block_size)      with gradients
    logprobs, entropies = compute_all_logprobs(net, run, answers, block_size)               of all, without

Rewards never contain `dataset.quality`'s gold: that measures a run, which never learns from it (arXiv:2210.10760).
"""
import dataclasses
import importlib.util
import math
import numbers
from pathlib import Path

import numpy as np
import torch

from convert import load_model
from dataset import (
    GRADERS,
    PromptData,
    answered,
    as_metrics,
    by_value,
    follows_format,
    grade,
    grades,
    in_words,
    interval,
    last_number,
    load_prompts,
    pad_texts,
    padded_width,
    quality,
    shown,
    summarise,
)
from tokenizer import CALL, UserError, calculate

# ----------------------------------------------------------------------------------------------------------------------
# answers

@dataclasses.dataclass
class Rollout:
    """n answers to prompts. Arrays (n, A) hold a number for each token of an answer, A being those of the longest.

    rows: the numbers of their prompts in the data, int (n,); prompts, ids: lists of n lists of ids; texts: the answers
    as texts; response_mask: bool (n, A), which tokens the policy sampled: the rest was forced on it, or is padding;
    logprobs: float64 (n, A), of those as they were sampled, at that temperature, 0 elsewhere; ended: bool (n,),
    whether an answer came to its end by itself.
    """
    rows: np.ndarray
    prompts: list
    ids: list
    texts: list
    response_mask: np.ndarray
    logprobs: np.ndarray
    ended: np.ndarray

    def __len__(self):
        return len(self.ids)

    @property
    def lengths(self):
        """Tokens of each answer, int (n,)."""
        return np.array([len(ids) for ids in self.ids])

    @property
    def group_sizes(self):
        """Tokens of each prompt and the longest of the answers to it that stand side by side, int (n,): in the order of
        these they stay so."""
        sizes = self.lengths + np.array([len(prompt) for prompt in self.prompts])
        begins = np.flatnonzero(np.diff(self.rows, prepend=-1))
        return np.repeat(np.maximum.reduceat(sizes, begins), np.diff(begins, append=len(self)))

    def tokens(self, chosen):
        """How many tokens these answers have and, each once, their prompts where they stand side by side."""
        first = np.flatnonzero(np.diff(self.rows[chosen], prepend=-1))
        return int(self.lengths[chosen].sum()) + sum(len(self.prompts[chosen[i]]) for i in first)

    def take(self, chosen):
        """Those of these numbers."""
        chosen = np.asarray(chosen, int)
        longest = max((len(self.ids[i]) for i in chosen), default=0)
        return Rollout(self.rows[chosen], *([of[i] for i in chosen] for of in (self.prompts, self.ids, self.texts)),
                       self.response_mask[chosen, :longest], self.logprobs[chosen, :longest], self.ended[chosen])

    def cut(self, lengths, data):
        """The same with answers that end after so many tokens, int (n,); what is cut off did not end by itself."""
        keep = lengths < self.lengths
        ids = [ids[:n] for ids, n in zip(self.ids, lengths, strict=True)]
        texts = [data.text(part) if k else text for part, text, k in zip(ids, self.texts, keep, strict=True)]
        inside = np.arange(self.response_mask.shape[1]) < lengths[:, None]
        return dataclasses.replace(self, ids=ids, texts=texts, response_mask=self.response_mask & inside,
                                   logprobs=self.logprobs * inside, ended=self.ended & ~keep).take(range(len(self)))


class Forcing:
    """What answers go on with whatever the model would say: a `force` of `GPT.generate`, see there.

    tools: a token that completes <tool>EXPRESSION</tool> is followed by '[what `calculate` makes of it]', in as many as
    max_calls calls of an answer. Where a token says something after </tool> too, which no text teaches (`chat_ids` cuts
    there), the call is not answered: a result belongs right after it.
    max_think_tokens: <think> that is still open so many tokens after the one that completes it is closed, by the
    '</think>' and newline of the data; after the result of a call that is being answered then. 0 = whenever it likes.

    It keeps no state: what follows is a function of the end of an answer. UserError for a tokenizer that cannot spell
    these.
    """

    def __init__(self, tokenizer, tools=True, max_think_tokens=0, max_calls=32):
        self.tokenizer, self.tools, self.max_think_tokens = tokenizer, tools, max_think_tokens
        self.max_calls, self.close = max_calls, tokenizer.encode('</think>\n')
        for key, used, text in (('tools', tools, '<tool></tool>[-0123456789.error]'),
                                ('max_think_tokens', max_think_tokens, '<think></think>\n')):
            if used and tokenizer.decode(tokenizer.encode(text)) != text:
                raise UserError(f'{key}={used}: tokenizer {tokenizer.name} cannot spell {text!r}: take a model whose '
                                'tokenizer can')

    def __call__(self, ids):
        """New ids of an answer so far -> those that follow, perhaps none."""
        return (self.tools and self._result(ids)) or (self.max_think_tokens and self._closing(ids)) or []

    def _result(self, ids):
        if not self.tokenizer.decode_bytes(ids[-7:]).endswith(b'</tool>'):  # a token has a byte at least
            return []
        text = self.tokenizer.decode(ids)
        calls = [*CALL.finditer(text)]
        if not calls or calls[-1].end() < len(text) or len(calls) > self.max_calls:
            return []
        return self.tokenizer.encode(f'[{calculate(calls[-1][1])}]')

    def _closing(self, ids):
        # <think> is complete within the first `end` tokens; not long before, or it has been closed: at most the result
        # of a call was still to be said, of up to 25 bytes
        end = len(ids) - self.max_think_tokens
        first = max(0, end - 25 - len(b'<think>'))
        begun = self.tokenizer.decode_bytes(ids[first:max(0, end)])
        opened = begun.rfind(b'<think>')
        if opened < 0 or b'</think>' in self.tokenizer.decode_bytes(ids[first:])[opened:]:
            return []
        return self.close


def forcing(tokenizer, tools, max_think_tokens=0):
    """The Forcing that a stage's knobs ask for, or None where they ask for none."""
    return Forcing(tokenizer, tools, max_think_tokens) if tools or max_think_tokens else None


def join_rollouts(parts):
    """Several Rollouts as one."""
    longest = max(part.response_mask.shape[1] for part in parts)
    wide = [[np.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in (part.response_mask, part.logprobs)]
            for part in parts]
    return Rollout(np.concatenate([part.rows for part in parts]),
                   *(sum((getattr(part, name) for part in parts), []) for name in ('prompts', 'ids', 'texts')),
                   *(np.concatenate(x) for x in zip(*wide, strict=True)), np.concatenate([p.ended for p in parts]))


def load_prompt_data(run, dataset, split, tokenizer, block_size, max_new_tokens, seed=0, strict=True, val_fraction=0.1):
    """A split of a dataset as PromptData; says what was left out."""
    rows, skipped = load_prompts(dataset, split, strict, val_fraction)
    data = PromptData(rows, tokenizer, block_size, max_new_tokens, seed)
    if lost := data.left_out(skipped):
        run.print0(f'{dataset}, {split}: {lost}')
    return data


def generate_answers(model, prompts, run, max_new_tokens, num_samples=1, sample_seed=0, at_once=32, **options):
    """Answers to prompts, lists of ids -> for each a list of num_samples lists of ids, with return_logprobs of
    pairs (ids, their log-probabilities); options of `GPT.generate`.

    A merged, packed copy of the model generates, which is fastest. at_once: prompts per batch. The samples depend on
    the run's seed, sample_seed and the prompt's index, not on the number of processes. A prompt longer than block_size
    keeps its end.
    """
    with run.unsharded(model):
        dtype = run.decode_dtype(model.num_params())
        writer = model.merged(dtype).to(run.device).eval().pack()
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    seeds = np.random.SeedSequence([run.seed, sample_seed]).generate_state(len(prompts)).tolist()
    at_once = max(1, min(at_once, -(-len(order) // run.world_size)))
    for first in range(run.rank * at_once, len(order), run.world_size * at_once):
        part = order[first:first + at_once]
        new = writer.generate([prompts[i][-model.config.block_size:] for i in part], max_new_tokens,
                              num_samples=num_samples, seed=[seeds[i] for i in part], **options)
        new = list(zip(*new, strict=True)) if options.get('return_logprobs') else new
        for k, i in enumerate(part):
            found[i] = new[k * num_samples:(k + 1) * num_samples]
    found = run.collect(found)
    return [found[i] for i in range(len(prompts))]


def generate_rollouts(model, data, rows, run, max_new_tokens, num_samples=1, temperature=1.0, sample_seed=0, at_once=64,
                      force=None):
    """num_samples answers to each of these prompts of a PromptData, side by side -> Rollout, the same in every process.

    A prompt that leaves no room for max_new_tokens loses its beginning. temperature 0: greedy. sample_seed: the samples
    are a function of the run's seed and of this. force: see `GPT.generate`.
    """
    tokenizer, room = data.tokenizer, model.config.block_size - max_new_tokens
    prompts = [data.prompt(i)[-room:] for i in rows]
    found = generate_answers(model, prompts, run, max_new_tokens, num_samples, sample_seed, at_once,
                             return_logprobs=True, temperature=temperature, stop_ids=tokenizer.turn_ids,
                             vocab_limit=tokenizer.n_vocab, force=force)
    ids, logprobs = zip(*(pair for of in found for pair in of), strict=True)
    inside = np.arange(max(map(len, ids))) < np.array([len(x) for x in ids])[:, None]
    table = np.full(inside.shape, np.nan)
    table[inside] = np.concatenate(logprobs)
    ends = set(tokenizer.turn_ids)
    return Rollout(np.repeat(rows, num_samples), [p for p in prompts for _ in range(num_samples)], list(ids),
                   [data.text(x) for x in ids], ~np.isnan(table), np.nan_to_num(table),
                   np.array([x[-1] in ends for x in ids]))


SHARED_ROW = 512  # tokens of a row in which several answers share their prompt: attention grows with its square


def lay_out(part, block_size, share=True):
    """The answers of a Rollout as rows for a training forward -> (arrays, at): arrays {'idx', 'targets'}, int64 (B, T),
    and where answers share a row also 'positions' (B, T) and 'mask', bool (B, 1, T, T); at, int64 (n, A), where in the
    flattened (B * T,) the model's output for each token stands. Targets are the tokens that were sampled.

    With share, answers to one prompt that follow one another stand side by side after it, as many as fit, and each sees
    it and itself: it is read once for all of them (arXiv:2506.05433). An answer begins with the prompt's last token,
    which says its first. With one answer to a row, that is the usual order.
    """
    rows, sizes = [], []
    for i, (prompt, ids) in enumerate(zip(part.prompts, part.ids, strict=True)):
        fits = share and rows and sizes[-1] + len(ids) <= min(block_size, SHARED_ROW)
        if fits and part.prompts[rows[-1][0]] == prompt:
            rows[-1].append(i)
            sizes[-1] += len(ids)
        else:
            rows.append([i])
            sizes.append(len(prompt) - 1 + len(ids))
    T = padded_width(max(sizes), block_size)
    idx, targets = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -100)
    positions, segments = np.zeros_like(idx), np.full_like(idx, -1)  # 0 is the prompt, answers follow
    at = np.zeros(part.response_mask.shape, np.int64)
    for b, row in enumerate(rows):
        prompt = part.prompts[row[0]]
        end = len(prompt) - 1
        idx[b, :end], positions[b, :end], segments[b, :end] = prompt[:-1], np.arange(end), 0
        for number, i in enumerate(row, 1):
            ids = part.ids[i]
            here = slice(end, end + len(ids))
            idx[b, here], segments[b, here] = [prompt[-1], *ids[:-1]], number
            targets[b, here] = np.where(part.response_mask[i, :len(ids)], ids, -100)
            positions[b, here] = np.arange(len(ids)) + len(prompt) - 1
            at[i, :len(ids)] = b * T + np.arange(here.start, here.stop)
            end = here.stop
    arrays = {'idx': idx, 'targets': targets}
    if len(rows) < len(part):
        seen = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
        arrays |= {'positions': positions, 'mask': seen[:, None]}
    return arrays, at


def compute_logprobs(net, run, answers, chosen, block_size, temperature=1.0, share=True):
    """The training forward over these answers of a Rollout -> (logprobs, entropies, extra), tensors (B, A) on the
    device, A as in answers.take(chosen); 0 where a token was not sampled.

    net(idx, targets, reduction='details', temperature=…) gives losses and entropies (B, T) and, where it has a critic,
    its value before each token (B, T), which becomes extra, or else extra is None. share: see `lay_out`.
    """
    part = answers.take(chosen)
    arrays, at = lay_out(part, block_size, share)
    tensors = dict(zip(arrays, run.to_device(*arrays.values()), strict=True))
    at, response_mask = run.to_device(at, part.response_mask)
    with run.autocast(tensors['idx'].shape[1]):
        losses, entropies, extra = net(**tensors, reduction='details', temperature=temperature)
    found = [-losses, entropies, extra if extra.ndim == 2 else None]
    return [None if x is None else x.float().flatten()[at] * response_mask for x in found]


@torch.no_grad()
def compute_all_logprobs(net, run, answers, block_size, temperature=1.0, share=True):
    """As `compute_logprobs`, of all answers, shared by the processes, without gradients: float64 arrays (n, A)."""
    A = answers.response_mask.shape[1]

    def work(part):
        found = compute_logprobs(net, run, answers, part, block_size, temperature, share)
        wide = [np.pad(x.cpu().double().numpy(), ((0, 0), (0, A - x.shape[1]))) for x in found if x is not None]
        return np.concatenate(wide, 1)
    net.eval()
    found = run.distributed_map(work, answers.group_sizes, 32)
    net.train()
    return np.split(found, found.shape[1] // A, 1)


def kl_terms(logprobs, ref_logprobs, kind='k3'):
    """Estimates of KL(policy || reference) from tokens that the policy drew, per token (…), Schulman 2020: with
    log r = ref - logprob, 'k1' is -log r, 'k2' (log r)^2 / 2, 'k3' r - 1 - log r. k1 and k3 have the right mean."""
    log_r = ref_logprobs - logprobs
    if kind == 'k1':
        return -log_r
    if kind == 'k2':
        return log_r ** 2 / 2
    if kind != 'k3':
        raise UserError(f"kl_estimator={kind!r} is not one of 'k1', 'k2', 'k3'")
    return (log_r.exp() if isinstance(log_r, torch.Tensor) else np.exp(log_r)) - 1 - log_r


# ----------------------------------------------------------------------------------------------------------------------
# rewards

def load_scorer(path, run, tokenizer=None):
    """A reward model -> what gives its normalised scores of (messages, answer): float64 array (n,).

    tokenizer: the policy's; UserError where the reward model's is another one.
    """
    model, own = load_model(path, scores=True)
    if tokenizer is not None and not own.same_as(tokenizer):
        raise UserError(f'{path}: its tokenizer ({own.name}, {own.n_vocab:,} tokens) is not that of the policy '
                        f'({tokenizer.name}, {tokenizer.n_vocab:,}): train a reward model from the same base')
    model = model.to(run.device).eval()
    length = model.config.block_size

    @torch.no_grad()
    def score(pairs):
        texts = [answered(own, messages, answer, length) for messages, answer in pairs]

        def work(part):
            arrays = pad_texts([texts[i] for i in part], length)
            with run.autocast(arrays[0].shape[1]):
                return model.rewards(*run.to_device(*arrays)).cpu().double().numpy()[:, None]
        return run.distributed_map(work, [len(ids) for ids, _ in texts], 32)[:, 0]
    return score


def load_function(place):
    """'FILE.py:function' -> the function of a row and the text of an answer to it that gives a number."""
    path, _, name = place.rpartition(':')
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code can raise anything
        raise UserError(f'rewards: {path}: {type(error).__name__}: {error}') from None
    if not callable(getattr(module, name, None)):
        raise UserError(f'rewards: {path} has no function {name!r}')
    return getattr(module, name)


OWN = ('correct', 'format', 'length', 'model')  # rewards beside the graders


class Rewards:
    """A weighted sum of rewards, in words 'NAME, WEIGHT*NAME, …':

    correct     1 where the row's own grader says so, else 0; number, exact: that grader
    format      1 for one <think> … </think> and then an answer
    length      the share of max_new_tokens that an answer takes
    model       the normalised score of the reward model in the directory reward_model
    FILE.py:f   f(row, text), a number, of the row as `load_prompts` makes it and the text of an answer

    An answer whose reward raises or is no finite number gets nan, is counted in `failed` and named once per kind of
    failure; after max_bad_rewards of them the run ends. UserError for a name that is none of these.
    """

    def __init__(self, words, tokenizer, run, max_new_tokens, reward_model='', max_bad_rewards=20):
        self.run, self.longest, self.limit, self.failed, self.reported = run, max_new_tokens, max_bad_rewards, 0, set()
        self.terms, self.scorer = [], None
        for term in words.split(','):
            weight, times, name = term.rpartition('*')
            try:
                number, name = float(weight) if times else 1.0, name.strip()
                if not math.isfinite(number):
                    raise ValueError
            except ValueError:
                raise UserError(f'rewards={words!r}: {weight.strip()!r} before * is not a number') from None
            if ':' not in name and name not in (*OWN, *GRADERS):
                raise UserError(f'rewards={words!r}: {name!r} is not one of {", ".join((*OWN, *GRADERS))} or '
                                'FILE.py:function')
            function, name = load_function(name) if ':' in name else None, name.rpartition(':')[2]
            if function and name in (*OWN, *GRADERS):
                raise UserError(f'rewards={words!r}: a reward is named {name!r} already: rename the function')
            self.terms.append((number, name, function))
        self.names = [name for _, name, _ in self.terms]
        if len(set(self.names)) < len(self.names):
            raise UserError(f'rewards={words!r} names one twice')
        if ('model' in self.names) != bool(reward_model):
            raise UserError(f'rewards={words!r} and reward_model={reward_model!r}: a reward model and the name model '
                            'go together')
        if reward_model:
            self.scorer = load_scorer(reward_model, run, tokenizer)

    def check(self, rows):
        """UserError for the first row whose `answer` a grader would miss, or find nothing equal to."""
        for graded in (name for name in self.names if name in ('correct', *GRADERS)):
            for row in rows:
                if 'answer' not in row:
                    raise UserError(f'{row["where"]}: it has no "answer", which rewards={graded!r} compares with: add '
                                    'it or leave that reward out')
                grader = row.get('grader', 'number') if graded == 'correct' else graded
                if grader == 'number' and last_number(str(row['answer'])) is None:
                    raise UserError(f'{row["where"]}: its "answer" {row["answer"]!r:.40} has no number, so the grader '
                                    "'number' finds nothing right: fix it or give another \"grader\"")

    def __call__(self, data, answers):
        """Answers (Rollout) to prompts of data -> (totals (n,), {name: (n,)}), float64, nan where a reward failed."""
        rows, mine = [data.rows_kept[i] for i in answers.rows], range(self.run.rank, len(answers), self.run.world_size)
        values, wrong = {}, []
        for i in mine:
            values[i] = []
            for _, name, function in self.terms:
                value, problem = self._value(name, function, rows[i], answers.texts[i], len(answers.ids[i]))
                values[i].append(value)
                wrong += [(rows[i].get('where', f'prompt {answers.rows[i]}'), name, problem)] * bool(problem)
        values = self.run.collect(values)
        wrong = self.run.collect({(self.run.rank, k): what for k, what in enumerate(wrong)})
        table = np.array([values[i] for i in range(len(answers))], float).reshape(len(answers), len(self.terms))
        if self.scorer is not None:
            pairs = [(row['prompt'], text) for row, text in zip(rows, answers.texts, strict=True)]
            table[:, self.names.index('model')] = self.scorer(pairs)
        for where, name, problem in wrong.values():
            self.failed += 1
            if (name, problem) not in self.reported:
                self.reported.add((name, problem))
                self.run.print0(f'{where}: the reward {name!r} {problem}: such answers are left out')
            if self.failed > self.limit:
                raise UserError(f'{where}: the reward {name!r} {problem}; {self.failed} answers had no reward '
                                f'(max_bad_rewards={self.limit}): fix the function or the rows')
        return table @ np.array([weight for weight, _, _ in self.terms]), dict(zip(self.names, table.T, strict=True))

    def _value(self, name, function, row, text, length):
        """One reward of one answer -> (number, '') or (nan, what went wrong)."""
        if function is not None:
            try:
                value = function(row, text)
                finite = isinstance(value, numbers.Real | np.number | np.bool_) and math.isfinite(value)
            except Exception as error:  # the user's own code can raise anything; it is named, counted and limited
                return math.nan, f'raised {type(error).__name__}: {" ".join(str(error).split())}'
            if not finite:
                return math.nan, f'gave {value!r:.40}, not a finite number'
            return float(value), ''
        if name == 'format':
            return float(follows_format(text)), ''
        if name == 'length':
            return length / self.longest, ''
        if name == 'model':
            return 0.0, ''  # all at once, later
        return float(grade(text, row['answer'], row.get('grader', 'number') if name == 'correct' else name)), ''


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

def gold_scores(data, answers):
    """`dataset.quality`'s gold of answers, float64 (n,), nan where a row has no `answer`."""
    rows = [data.rows_kept[i] for i in answers.rows]
    return np.array([quality(row, text)['gold'] if 'answer' in row else math.nan
                     for row, text in zip(rows, answers.texts, strict=True)])


def divergence(net, model, reference, run, answers, block_size, temperature=1.0):
    """log policy - log reference of each sampled token, float64 (n, A); reference: as `Run.swapped_weights` has it."""
    ours = compute_all_logprobs(net, run, answers, block_size, temperature)[0]
    with run.swapped_weights(model, reference):
        return ours - compute_all_logprobs(net, run, answers, block_size, temperature)[0]


def evaluate_policy(net, model, reference, data, run, rewards, chosen, max_new_tokens, temperature=1.0, force=None):
    """A policy on held-out prompts of these numbers: greedy answers are graded, sampled ones rewarded and compared with
    the reference, where there is one -> (metrics, words, greedy answers as they are shown).

    val/correct, val/gold, val/f1 … and val/response_len are of greedy answers; val/reward and its parts,
    val/gold_sampled and val/kl, nats per answer, of sampled ones.
    """
    greedy, sampled = (generate_rollouts(model, data, chosen, run, max_new_tokens, 1, t, force=force)
                       for t in (0, temperature))
    rows = [data.rows_kept[i] for i in chosen]
    marks = [grades(row, text) | ({'gold': quality(row, text)['gold']} if 'answer' in row else {})
             for row, text in zip(rows, greedy.texts, strict=True)]
    means, ranges = summarise(marks)
    metrics = as_metrics(means, ranges)
    totals, parts = rewards(data, sampled)
    kl, gold = np.array([]), gold_scores(data, sampled)
    if reference is not None:
        kl = divergence(net, model, reference, run, sampled, model.config.block_size, temperature).sum(1)
        metrics['val/kl_low'], metrics['val/kl_high'] = interval(kl.tolist())
    for name, values in (('reward', totals), *((f'reward_{k}', v) for k, v in parts.items()), ('kl', kl),
                         ('gold_sampled', gold)):
        values = values[np.isfinite(values)]
        if len(values):
            metrics[f'val/{name}'] = float(values.mean())
    metrics |= {'val/response_len': float(greedy.lengths.mean()), 'val/ended': float(sampled.ended.mean())}
    graded = in_words({k: v for k, v in means.items() if k in ('correct', 'gold', 'f1')}, ranges)
    words = f'held-out: {graded}; sampled: reward {metrics.get("val/reward", math.nan):.3f}'
    words += f', KL {metrics["val/kl"]:.3f}' if 'val/kl' in metrics else ''
    words += f', gold {metrics["val/gold_sampled"]:.3f}' if 'val/gold_sampled' in metrics else ''
    if by := by_value(rows, marks, 'steps'):
        words += f'\ncorrect by steps: {by}'
    return metrics, words, [shown(*of) for of in zip(rows, greedy.texts, marks, strict=True)]
