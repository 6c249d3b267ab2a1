"""
Shared by the stages that learn from samples: a policy's answers to prompts, the rewards of these answers, and their
log-probabilities under the model that is trained.

    rewards = Rewards('number, 0.2*format', policy_tokenizer, run, max_new_tokens=96)
    answers = generate_rollouts(model, data, data.rows(0, 8), run, max_new_tokens=96, num_samples=4)
    totals, terms = rewards(data, answers)
    logprobs, entropies, _ = compute_logprobs(net, run, answers, range(8), block_size)      with gradients
    logprobs, entropies = compute_all_logprobs(net, run, answers, block_size)               of all, without

Shapes: n answers, the longest of A tokens; B rows of T tokens in a forward pass, where answers may share a row.

Rewards never contain `grade.quality`'s gold, which only measures how well a run does (arXiv:2210.10760).
"""
import dataclasses
import functools
import inspect
import math
import numbers
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import lora
from chat import CALL, read_calls
from dataset import PromptData, answered, load_prompts, pad_texts, padded_width
from generate import Replacement, generate, pack
from grade import (
    GRADERS,
    accuracy_by,
    as_metrics,
    check_gold,
    follows_format,
    format_answer,
    format_metrics,
    grade,
    grades,
    interval,
    is_correct,
    outcomes,
    quality,
    summarise,
)
from load import load_model
from model import GatedDeltaNet
from tokenizer import UserError, calculate
from tools import check_template, load_module, load_tools, messages_of, tool_turn, turn_starts

# ----------------------------------------------------------------------------------------------------------------------
# answers

@dataclasses.dataclass
class Rollout:
    """n answers to prompts."""
    rows: np.ndarray  # int (n,): the row of an answer's prompt in the data
    prompts: list  # n lists of ids
    ids: list  # n lists of ids: the answers
    texts: list  # n strings: the answers
    response_mask: np.ndarray  # bool (n, A): True on sampled tokens, False on forced ones and padding
    logprobs: np.ndarray  # float64 (n, A): of sampled tokens, at the temperature of sampling; 0 on the others
    entropies: np.ndarray  # float64 (n, A): of the distributions that they were sampled from; 0 on the others
    ended: np.ndarray  # bool (n,): True if the answer ends its turn, False if it was cut off

    def __len__(self):
        return len(self.ids)

    @property
    def lengths(self):
        """Tokens of each answer, int (n,)."""
        return np.array([len(ids) for ids in self.ids])

    @property
    def group_sizes(self):
        """Tokens of each answer's prompt plus those of the longest answer in its group, int (n,).

        A group is answers with the same prompt that are neighbours. All of it has one size, so that a stable sort by
        size keeps its answers together.
        """
        sizes = self.lengths + np.array([len(prompt) for prompt in self.prompts])
        starts = np.flatnonzero(np.diff(self.rows, prepend=-1))
        return np.repeat(np.maximum.reduceat(sizes, starts), np.diff(starts, append=len(self)))

    def tokens(self, chosen):
        """Tokens in a forward pass over the answers of these indices; neighbours with the same prompt share it."""
        starts = np.flatnonzero(np.diff(self.rows[chosen], prepend=-1))
        return int(self.lengths[chosen].sum()) + sum(len(self.prompts[chosen[i]]) for i in starts)

    def take(self, chosen):
        """The answers of these indices as a Rollout, in this order, its arrays as wide as the longest of them."""
        chosen = np.asarray(chosen, int)
        longest = max((len(self.ids[i]) for i in chosen), default=0)
        return Rollout(
            rows=self.rows[chosen],
            prompts=[self.prompts[i] for i in chosen],
            ids=[self.ids[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            response_mask=self.response_mask[chosen, :longest],
            logprobs=self.logprobs[chosen, :longest],
            entropies=self.entropies[chosen, :longest],
            ended=self.ended[chosen])

    def cut(self, lengths, data):
        """The answers up to these lengths, int (n,), as a Rollout; ended is False for those that lose tokens."""
        shorter = lengths < self.lengths
        ids = [answer[:n] for answer, n in zip(self.ids, lengths, strict=True)]
        texts = [data.text(answer) if is_cut else text
                 for answer, text, is_cut in zip(ids, self.texts, shorter, strict=True)]
        inside = np.arange(self.response_mask.shape[1]) < lengths[:, None]
        answers = dataclasses.replace(self, ids=ids, texts=texts, response_mask=self.response_mask & inside,
                                      logprobs=self.logprobs * inside, entropies=self.entropies * inside,
                                      ended=self.ended & ~shorter)
        return answers.take(range(len(self)))

    def state(self):
        """As a dict that a checkpoint can hold."""
        return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in vars(self).items()}

    @classmethod
    def from_state(cls, state):
        return cls(**{name: x.clone().numpy() if isinstance(x, torch.Tensor) else x for name, x in state.items()})


class Forcing:
    """Inserts tool results and </think> while an answer is sampled: the `force` of `generate.generate`.

    tools: what a model may call, as `tools.load_tools` takes it. The calculator: after a token that completes
    <tool>EXPRESSION</tool> comes '[RESULT]', as `calculate` returns it, for the first max_calls calls of a turn. Where
    that token has text after </tool>, nothing is inserted: the result belongs right after </tool>, where `chat_ids`
    cuts tokens in training texts. Functions: after the end of a turn with <tool_call>{"name": …, "arguments": …}
    </tool_call> in it come the turns of the chat template with the results of all its calls, and the header of the
    assistant's next turn, max_tool_calls times an answer.
    max_think_tokens: this many tokens after the one that completes <think>, '</think>' and a newline are inserted if
    the thought is still open; if a call is completed there, after its result. 0 = no limit.
    num_waits: the first so many times that an answer would end its thought, the text `wait` comes in place of </think>,
    unless max_think_tokens are used up (budget forcing, arXiv:2501.19393).

    It has no state: what is inserted is a function of the answer so far, and of the row of the data that it answers,
    which functions may read. UserError for a tokenizer that cannot encode these texts.
    """

    def __init__(self, tokenizer, tools=True, max_think_tokens=0, max_calls=32, max_tool_calls=8, num_waits=0,
                 wait='Wait'):
        self.tokenizer = tokenizer
        self.tools = load_tools(tools)
        self.max_think_tokens = max_think_tokens
        self.max_calls = max_calls
        self.max_tool_calls = max_tool_calls
        self.turn_ids = set(tokenizer.turn_ids)
        self.close = tokenizer.encode('</think>\n', start=False)
        self.num_waits = num_waits
        self.wait = wait
        if self.tools.functions:
            check_template(tokenizer, self.tools)
        for key, value, text in (('tools', self.tools.calculator, '<tool></tool>[-0123456789.error]'),
                                 ('max_think_tokens', max_think_tokens, '<think></think>\n'),
                                 ('num_waits', num_waits, f'<think>{wait}</think>')):
            if value and tokenizer.decode(tokenizer.encode(text)) != text:
                raise UserError(f'{key}={value}: tokenizer {tokenizer.name} cannot spell {text!r}: take a model whose '
                                'tokenizer can')
        if num_waits and (not wait or '<' in wait):
            raise UserError(f'wait={wait!r} comes in place of </think>: it must be some text without <')

    def __call__(self, ids, row=None, record=None):
        """The ids of an answer so far, and the row that it answers -> the ids to insert after them, perhaps none.

        record: a list, which gets the messages of calls and their results.
        """
        if self.tools.functions:
            if ids[-1] in self.turn_ids:
                return self._tool_turn(ids, row, record)
            ids = ids[turn_starts(self.tokenizer, ids)[-1]:]  # what follows is about the last turn
        return self._result(ids) or self._closing(ids) or self._waiting(ids)

    def _tool_turn(self, ids, row, record):
        starts = turn_starts(self.tokenizer, ids)
        said = self.tokenizer.decode(ids[starts[-1]:-1])
        calls = read_calls(said) if len(starts) <= self.max_tool_calls else []
        results = [self.tools.answer(call, row) for call in calls]
        if record is not None and results:
            record += messages_of(said, results)
        return tool_turn(self.tokenizer, self.tools.signatures, results) if results else []

    def _result(self, ids):
        # 7 bytes, so 7 tokens at most
        if not self.tools.calculator or not self.tokenizer.decode_bytes(ids[-7:]).endswith(b'</tool>'):
            return []
        text = self.tokenizer.decode(ids)
        calls = [*CALL.finditer(text)]
        if not calls or calls[-1].end() < len(text) or len(calls) > self.max_calls:
            return []
        return self.tokenizer.encode(f'[{calculate(calls[-1][1])}]', start=False)

    def _closing(self, ids):
        if not self.max_think_tokens:
            return []
        # the budget is used up if <think> is complete within the first `end` tokens. It is looked for in the last of
        # these only, because one further back is closed by now: nothing but a call's result, of up to 25 bytes, can
        # delay that
        end = len(ids) - self.max_think_tokens
        first = max(0, end - 25 - len(b'<think>'))
        opened = self.tokenizer.decode_bytes(ids[first:max(0, end)]).rfind(b'<think>')
        if opened < 0 or b'</think>' in self.tokenizer.decode_bytes(ids[first:])[opened:]:
            return []
        return self.close

    def _waiting(self, ids):
        if not self.num_waits:
            return []
        # the last ids may spell </think>, or its beginning: then the next ones tell; the first of them may hold more
        tail, tag = self.tokenizer.decode_bytes(ids[-len('</think>'):]), b'</think>'
        end = tail[tail.rfind(b'<'):]
        if b'<' not in tail or not (tag.startswith(end) or end.startswith(tag)):
            return []
        count = next(n for n in range(1, len(ids) + 1) if len(self.tokenizer.decode_bytes(ids[-n:])) >= len(end))
        earlier = self.tokenizer.decode_bytes(ids[:-1])
        if earlier.rfind(b'<think>') <= earlier.rfind(tag) or self._closing(ids[:-count]):
            return []  # no thought is open, or its budget is used up
        if not end.startswith(tag):
            return Replacement([], count, self.num_waits)
        kept = self.tokenizer.decode(ids[-count:], start=False).partition('</think>')[0]
        return Replacement(self.tokenizer.encode(kept + self.wait, start=False), count, self.num_waits)


def forcing(tokenizer, tools, max_think_tokens=0, max_tool_calls=8, num_waits=0, wait='Wait'):
    """The Forcing for these knobs of a stage, or None if there is nothing to insert."""
    if not tools and not max_think_tokens and not num_waits:
        return None
    return Forcing(tokenizer, tools, max_think_tokens, max_tool_calls=max_tool_calls, num_waits=num_waits, wait=wait)


def forces(force, rows):
    """The `force` of `generate.generate` for the prompts of these rows: a Forcing reads the row, another one does not.
    """
    return [functools.partial(force, row=row) for row in rows] if isinstance(force, Forcing) else force


def join_rollouts(parts):
    """Several Rollouts as one."""
    longest = max(part.response_mask.shape[1] for part in parts)
    fields = {}
    for field in dataclasses.fields(Rollout):
        values = [getattr(part, field.name) for part in parts]
        if field.name in ('response_mask', 'logprobs', 'entropies'):
            values = [np.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in values]
        fields[field.name] = sum(values, []) if isinstance(values[0], list) else np.concatenate(values)
    return Rollout(**fields)


def load_prompt_data(run, dataset, split, tokenizer, block_size, max_new_tokens, seed=0, strict=True, val_fraction=0.1,
                     force=None):
    """A split of a dataset as PromptData, with the tools of a Forcing; prints which rows were skipped."""
    rows, skipped = load_prompts(dataset, split, strict, val_fraction)
    data = PromptData(force.tools.rows(rows) if force else rows, tokenizer, block_size, max_new_tokens, seed, strict)
    if lost := data.left_out(skipped):
        run.print0(f'{dataset}, {split}: {lost}')
    return data


# how rollouts can be generated: dtype, None = that of all generation, and `generate.pack`'s quant
SAMPLERS = {'': (None, ''), 'int8': (None, 'int8'), 'fp16': (torch.float32, 'fp16'), 'bfloat16': (torch.bfloat16, ''),
            'float32': (torch.float32, '')}


def make_sampler(model, run, quant=''):
    """A copy of a model that can do nothing but generate, fast; quant: one of SAMPLERS, ValueError where the device or
    the dtype is not made for it."""
    dtype, packed = SAMPLERS[quant]
    with run.unsharded(model):
        copy = lora.merge(model, dtype or run.decode_dtype(model.num_params()))
        return pack(copy.to(run.device).eval(), packed)


def generate_answers(model, prompts, run, max_new_tokens, num_samples=1, sample_seed=0, at_once=32, force=None,
                     quant='', **options):
    """Answers to prompts, lists of ids -> for each prompt num_samples lists of ids, the same in every process.

    options: of `generate.generate`; with return_logprobs, pairs (ids, log-probabilities) take the place of ids.
    at_once: prompts per batch. quant: see `make_sampler`. The samples depend on the run's seed, sample_seed and the
    index of the prompt, and on the number of processes and threads by rounding alone. A prompt longer than block_size
    loses its beginning.
    """
    sampler = make_sampler(model, run, quant)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # by length, for little padding
    seeds = np.random.SeedSequence([run.seed, sample_seed]).generate_state(len(prompts)).tolist()
    at_once = max(1, min(at_once, -(-len(order) // run.world_size)))
    answers = {}
    firsts = range(run.rank * at_once, len(order), run.world_size * at_once)
    for number in run.counted(len(firsts), 'answering'):
        part = order[firsts[number]:firsts[number] + at_once]
        new = generate(sampler, [prompts[i][-model.config.block_size:] for i in part], max_new_tokens,
                       num_samples=num_samples, seed=[seeds[i] for i in part], **options,
                       force=[force[i] for i in part] if isinstance(force, list) else force)
        if options.get('return_logprobs'):
            new = list(zip(*new, strict=True))
        for k, i in enumerate(part):
            answers[i] = new[k * num_samples:(k + 1) * num_samples]
    answers = run.collect(answers)
    return [answers[i] for i in range(len(prompts))]


def generate_rollouts(model, data, rows, run, max_new_tokens, num_samples=1, temperature=1.0, sample_seed=0, at_once=64,
                      force=None, quant=''):
    """num_samples answers to the prompt of each of these rows of a PromptData -> Rollout, the same in every process.

    Answers to one prompt are neighbours. temperature 0: greedy. sample_seed: the samples are a function of the run's
    seed and of this one. force: see `generate.generate`; its tokens are False in response_mask. A prompt that leaves
    no room for max_new_tokens loses its beginning. quant: see `make_sampler`.
    """
    tokenizer = data.tokenizer
    room = model.config.block_size - max_new_tokens
    prompts = [data.prompt(i)[-room:] for i in rows]
    groups = generate_answers(model, prompts, run, max_new_tokens, num_samples, sample_seed, at_once,
                              forces(force, [data.rows_kept[i] for i in rows]), quant=quant, return_logprobs=True,
                              entropies=True, temperature=temperature, stop_ids=tokenizer.turn_ids,
                              vocab_limit=tokenizer.n_vocab)
    ids, details = zip(*(answer for group in groups for answer in group), strict=True)
    inside = np.arange(max(map(len, ids))) < np.array([len(answer) for answer in ids])[:, None]
    table = np.full((*inside.shape, 2), np.nan)  # stays nan on padding; what is known of a forced token is nan, too
    table[inside] = np.concatenate(details)
    turn_ids = set(tokenizer.turn_ids)
    return Rollout(
        rows=np.repeat(rows, num_samples),
        prompts=[prompt for prompt in prompts for _ in range(num_samples)],
        ids=list(ids),
        texts=[data.text(answer) for answer in ids],
        response_mask=~np.isnan(table[..., 0]),
        logprobs=np.nan_to_num(table[..., 0]),
        entropies=np.nan_to_num(table[..., 1]),
        ended=np.array([answer[-1] in turn_ids and not np.isnan(of[-1][0])  # not within the results of a call
                        for answer, of in zip(ids, details, strict=True)]))


# ----------------------------------------------------------------------------------------------------------------------
# log-probabilities

SHARED_ROW = 512  # most tokens in a row that answers share: longer rows save copies of the prompt, but attention is T^2


def lay_out(part, block_size, share=True):
    """The answers of a Rollout as rows for a training forward -> (arrays, at).

    arrays: 'idx' and 'targets', int64 (B, T), the targets -100 where no sampled token follows; where answers share a
    row also 'positions', int64 (B, T), and 'mask', bool (B, 1, T, T), which tokens (last axis) a token attends to.
    at, int64 (n, A): for each token of an answer, the index of the output that predicts it in the flattened (B * T,).

    share: neighbours with the same prompt are put into one row behind a single copy of it, as many as fit, and each
    sees only the prompt and itself, so that the forward pass over the prompt is made once (arXiv:2506.05433). The
    output at a token predicts the next one, so the first token of every answer is predicted at the prompt's last token:
    the segment of an answer begins with a copy of that token and ends before the answer's last one. With one answer to
    a row this is the usual order.
    """
    rows, sizes = [], []  # rows: the indices of the answers in each
    for i, (prompt, ids) in enumerate(zip(part.prompts, part.ids, strict=True)):
        fits = share and rows and sizes[-1] + len(ids) <= min(block_size, SHARED_ROW)
        if fits and part.prompts[rows[-1][0]] == prompt:
            rows[-1].append(i)
            sizes[-1] += len(ids)
        else:
            rows.append([i])
            sizes.append(len(prompt) - 1 + len(ids))
    T = padded_width(max(sizes), block_size)
    idx = np.zeros((len(rows), T), np.int64)
    targets = np.full((len(rows), T), -100)
    positions = np.zeros_like(idx)
    segments = np.full_like(idx, -1)  # 0: the prompt; 1, 2, …: an answer; -1: padding
    at = np.zeros(part.response_mask.shape, np.int64)
    for b, row in enumerate(rows):
        prompt = part.prompts[row[0]]
        end = len(prompt) - 1
        idx[b, :end] = prompt[:-1]
        positions[b, :end] = np.arange(end)
        segments[b, :end] = 0
        for number, i in enumerate(row, 1):
            ids = part.ids[i]
            span = slice(end, end + len(ids))
            idx[b, span] = [prompt[-1], *ids[:-1]]
            segments[b, span] = number
            targets[b, span] = np.where(part.response_mask[i, :len(ids)], ids, -100)
            positions[b, span] = np.arange(len(ids)) + len(prompt) - 1
            at[i, :len(ids)] = b * T + np.arange(span.start, span.stop)
            end = span.stop
    arrays = {'idx': idx, 'targets': targets}
    if len(rows) < len(part):
        seen = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
        arrays |= {'positions': positions, 'mask': seen[:, None]}
    return arrays, at


def losses_and_entropies(model, hidden, targets, temperature=1.0, entropies=True):
    """An `output` of GPT.forward: -log p of targets (B, T), the entropies of the distributions, with logits divided by
    the temperature, or None without entropies, which cost time, and the hidden states (B, T, C)."""
    if entropies:
        return *model.cross_entropy(hidden, targets, 'details', temperature), hidden
    return model.cross_entropy(hidden, targets, 'none', temperature), None, hidden


def compute_logprobs(net, run, answers, chosen, block_size, temperature=1.0, share=True, entropies=True):
    """The training forward over the answers of these indices in a Rollout -> (logprobs, entropies, values).

    Tensors (n, A) on the device, as answers.take(chosen) has them, 0 where a token was not sampled. entropies: of the
    distributions that tokens were sampled from, or None if not asked for; values: a critic's before each token, or
    None.

    net(idx, targets, output=…) returns losses and entropies, (B, T), and a critic's values, (B, T), or else hidden
    states, which are ignored. share: see `lay_out`.
    """
    part = answers.take(chosen)
    share = share and not any(isinstance(module, GatedDeltaNet) for module in net.modules())  # no mask stops a state
    arrays, at = lay_out(part, block_size, share)
    tensors = dict(zip(arrays, run.to_device(*arrays.values()), strict=True))
    at, response_mask = run.to_device(at, part.response_mask)
    with run.autocast(tensors['idx'].shape[1]):
        output = functools.partial(losses_and_entropies, temperature=temperature, entropies=entropies)
        losses, entropies, extra = net(**tensors, output=output)
    outputs = [-losses, entropies, extra if extra.ndim == 2 else None]
    return [None if x is None else x.float().flatten()[at] * response_mask for x in outputs]


@torch.no_grad()
def compute_all_logprobs(net, run, answers, block_size, temperature=1.0, share=True, entropies=True):
    """As `compute_logprobs` for all answers, without gradients, the work divided among the processes -> a list of
    float64 arrays (n, A): logprobs, the entropies if asked for and, with a critic, values."""
    A = answers.response_mask.shape[1]

    def work(part):
        outputs = compute_logprobs(net, run, answers, part, block_size, temperature, share, entropies)
        padded = [np.pad(x.cpu().double().numpy(), ((0, 0), (0, A - x.shape[1]))) for x in outputs if x is not None]
        return np.concatenate(padded, 1)
    net.eval()
    outputs = run.distributed_map(work, answers.group_sizes, 32)
    net.train()
    return np.split(outputs, outputs.shape[1] // A, 1)


def importance_weights(logprobs, sampled, cap, level='token'):
    """Truncated importance sampling: weights min(p / p of the sampler, cap) for what policy p learns from answers that
    the sampler gave, with weights of fewer bits, other kernels or of some steps ago.

    logprobs, sampled (B, A): of the answers' tokens under both, 0 where no token counts. -> (B, A) of the tokens, or
    with level 'sequence' (B, 1) of whole answers, whose ratio is the product of their tokens'.
    (https://fengyao.notion.site/off-policy-rl; the ratio of the decoupled loss in AReaL, arXiv:2505.24298.)
    """
    log_ratio = logprobs - sampled
    if level == 'sequence':
        log_ratio = log_ratio.sum(1, keepdim=True)
    return log_ratio.exp().clamp(max=cap)


def to_batch(run, indices, width, *arrays):
    """Rows of arrays (n,) or (n, A), the latter cut to width -> float32 tensors on the device; None stays None."""
    def select(array):
        return array[indices] if array.ndim == 1 else array[indices][:, :width]
    return [None if array is None else run.to_device(select(array).astype(np.float32))[0] for array in arrays]


def kl_terms(logprobs, ref_logprobs, kind='k3'):
    """Estimates of KL(policy || reference) per token (…), from tokens that the policy sampled (Schulman 2020).

    With r = reference probability / policy probability:
    'k1'  -log r           unbiased, may be negative
    'k2'  (log r)^2 / 2    biased, of low variance
    'k3'  r - 1 - log r    unbiased, never negative
    """
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
    """A reward model -> a function of pairs (messages, answer) that returns their normalised scores, float64 (n,).

    tokenizer: the policy's; UserError if the reward model has another one.
    """
    model, model_tokenizer = load_model(path, scores=True)
    if tokenizer is not None and not model_tokenizer.same_as(tokenizer):
        raise UserError(f'{path}: its tokenizer ({model_tokenizer.name}, {model_tokenizer.n_vocab:,} tokens) is not '
                        f'that of the policy ({tokenizer.name}, {tokenizer.n_vocab:,}): train a reward model from the '
                        'same base')
    model = model.to(run.device)
    length = model.config.block_size

    @torch.no_grad()
    def score(pairs):
        texts = [answered(model_tokenizer, messages, answer, length, strip=True) for messages, answer in pairs]

        def work(part):
            arrays = pad_texts([texts[i] for i in part], length)
            with run.autocast(arrays[0].shape[1]):
                return model.rewards(*run.to_device(*arrays)).cpu().double().numpy()[:, None]
        return run.distributed_map(work, [len(ids) for ids, _ in texts], 32)[:, 0]
    return score


def load_function(spec):
    """'FILE.py:function' -> that function, which returns a number for a row and the text of an answer to it."""
    path, _, name = spec.rpartition(':')
    module = load_module(path, 'rewards')
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f'rewards: {path} has no function {name!r}')
    try:
        signature = inspect.signature(function)
        signature.bind({}, '')
    except TypeError:
        raise UserError(f'rewards: {path}: {name}{signature} must take two arguments, a row and the text of an answer '
                        'to it') from None
    except ValueError:  # some that are built in do not say what they take
        pass
    return function


BUILT_IN = ('correct', 'format', 'length', 'model', *GRADERS)  # names of rewards


class Rewards:
    """A weighted sum of rewards, written as 'NAME, WEIGHT*NAME, …'; a weight is 1 unless given:

    correct     1 if the answer is right by the row's grader, else 0
    number      1 if its last number is that of the row's `answer`, else 0
    exact       1 if it is the row's `answer`, normalised, else 0
    math        1 if it is mathematically equal to the row's `answer`, else 0
    format      1 if it is one <think> … </think> and then an answer, else 0
    length      its tokens / max_new_tokens
    model       its score by the reward model in the directory reward_model, normalised
    FILE.py:f   f(row, text), a number; row: as `load_prompts` returns it, text: the answer

    An answer whose reward raises or is not a finite number gets nan and is counted in `failed`; each kind of failure is
    printed once. UserError for another name, where none of the first answers has one of the rewards, and when more than
    max_bad_rewards have failed.
    """

    def __init__(self, words, tokenizer, run, max_new_tokens, reward_model='', max_bad_rewards=20):
        self.run = run
        self.max_new_tokens = max_new_tokens
        self.max_bad_rewards = max_bad_rewards
        self.failed = 0
        self.first = True  # nothing was rewarded yet
        self.reported = set()
        self.terms = []
        for term in words.split(','):
            weight, times, name = term.rpartition('*')
            name = name.strip()
            try:
                number = float(weight) if times else 1.0
                if not math.isfinite(number):
                    raise ValueError
            except ValueError:
                raise UserError(f'rewards={words!r}: {weight.strip()!r} before * is not a number') from None
            function = None
            if ':' in name:
                function = load_function(name)
                name = name.rpartition(':')[2]
                if name in BUILT_IN:
                    raise UserError(f'rewards={words!r}: a reward is named {name!r} already: rename the function')
            elif name not in BUILT_IN:
                raise UserError(f'rewards={words!r}: {name!r} is not one of {", ".join(BUILT_IN)} or FILE.py:function')
            self.terms.append((number, name, function))
        self.names = [name for _, name, _ in self.terms]
        if len(set(self.names)) < len(self.names):
            raise UserError(f'rewards={words!r} names one twice')
        if ('model' in self.names) != bool(reward_model):
            raise UserError(f'rewards={words!r} and reward_model={reward_model!r}: a reward model and the name model '
                            'go together: give --reward_model=DIRECTORY of a run of reward.py, or neither')
        self.scorer = load_scorer(reward_model, run, tokenizer) if reward_model else None

    def check(self, rows):
        """UserError for the first row that has no `answer` for a grader, or one that no answer could equal."""
        for name in (name for name in self.names if name in ('correct', *GRADERS)):
            for row in rows:
                if 'answer' not in row:
                    raise UserError(f'{row["where"]}: it has no "answer", which rewards={name!r} compares with: add it '
                                    'or drop that reward')
                try:
                    if name != 'correct':  # the row's own grader was asked where rows are read
                        check_gold(row['answer'], name)
                except UserError as e:
                    raise UserError(f'{row["where"]}: {e}; rewards=correct asks the grader of each row') from e

    def __call__(self, data, answers):
        """Answers (Rollout) to prompts of data -> (totals (n,), terms {name: (n,)}), float64, nan where one failed."""
        rows = [data.rows_kept[i] for i in answers.rows]
        found = {}  # of each answer the pairs of `_value`
        for i in range(self.run.rank, len(answers), self.run.world_size):  # this process's answers
            found[i] = [self._value(name, function, rows[i], answers.texts[i], len(answers.ids[i]))
                        for _, name, function in self.terms]
        found = self.run.collect(found)
        table = np.array([[value for value, _ in found[i]] for i in range(len(answers))])
        failures = [(rows[i].get('where', f'prompt {answers.rows[i]}'), name, problem) for i in range(len(answers))
                    for name, (_, problem) in zip(self.names, found[i], strict=True) if problem]
        failed = Counter(name for _, name, _ in failures)
        for where, name, problem in failures:
            if self.first and failed[name] == len(answers) > 1:  # not the rows but the function is wrong
                raise UserError(f'{where}: the reward {name!r} {problem}, and no other of {len(answers):,} answers has '
                                'one: fix the function')
        self.first = False
        if self.scorer is not None:
            pairs = [(row['prompt'], text) for row, text in zip(rows, answers.texts, strict=True)]
            table[:, self.names.index('model')] = self.scorer(pairs)
        for where, name, problem in failures:
            self.failed += 1
            if (name, problem) not in self.reported:
                self.reported.add((name, problem))
                self.run.print0(f'{where}: the reward {name!r} {problem}: such answers are skipped')
            if self.failed > self.max_bad_rewards:
                raise UserError(f'{where}: the reward {name!r} {problem}; {self.failed} answers had no reward '
                                f'(max_bad_rewards={self.max_bad_rewards}): fix the function or the rows')
        return table @ np.array([weight for weight, _, _ in self.terms]), dict(zip(self.names, table.T, strict=True))

    def _value(self, name, function, row, text, length):
        """One reward of one answer -> (number, '') or (nan, the problem)."""
        if function is not None:
            try:
                value = function(row, text)
                value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
                finite = isinstance(value, numbers.Real | np.number | np.bool_) and math.isfinite(value)
            except Exception as error:  # the user's own code can raise anything; it is named, counted and limited
                ours, *frames = traceback.extract_tb(error.__traceback__)
                lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename] or [ours.lineno]
                return math.nan, (f'raised {type(error).__name__}: {" ".join(str(error).split())} '
                                  f'({Path((frames or [ours])[0].filename).name}:{lines[-1]})')
            if not finite:
                return math.nan, f'gave {value!r:.40}, not a finite number'
            return float(value), ''
        if name == 'format':
            return float(follows_format(text)), ''
        if name == 'length':
            return length / self.max_new_tokens, ''
        if name == 'model':
            return 0.0, ''  # __call__ replaces it: the model scores all answers together
        return float(is_correct(row, text) if name == 'correct' else grade(text, row['answer'], name)), ''


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

def gold_scores(data, answers):
    """`grade.quality`'s gold of answers, float64 (n,), nan where a row is no word problem."""
    rows = [data.rows_kept[i] for i in answers.rows]
    return np.array([quality(row, text).get('gold', math.nan)
                     for row, text in zip(rows, answers.texts, strict=True)])


def divergence(net, model, reference, run, answers, block_size, temperature=1.0):
    """k1, the policy's log-probability minus the reference's, of each sampled token, float64 (n, A), 0 elsewhere.

    reference: {name: tensor}, the parameters in which it differs from the policy, see `Run.swapped_weights`.
    """
    logprobs = compute_all_logprobs(net, run, answers, block_size, temperature, entropies=False)[0]
    with run.swapped_weights(model, reference):
        return logprobs - compute_all_logprobs(net, run, answers, block_size, temperature, entropies=False)[0]


def evaluate_policy(net, model, reference, data, run, rewards, chosen, max_new_tokens, temperature=1.0, force=None):
    """A policy's answers to the held-out prompts of these rows -> (metrics, summary, the greedy answers as texts).

    Greedy answers are graded: val/correct, val/gold, val/f1 … and val/response_len.
    Sampled answers are rewarded: val/reward, its terms as val/reward_NAME, val/gold_sampled and val/ended; if there is
    a reference they are compared with it: val/kl, in nats, is k1 summed over an answer, the mean over answers. (The kl
    that grpo.py logs in training is k3, the mean over tokens.)
    """
    greedy, sampled = (generate_rollouts(model, data, chosen, run, max_new_tokens, 1, t, force=force)
                       for t in (0, temperature))
    rows = [data.rows_kept[i] for i in chosen]
    row_grades = [grades(row, text) | ({'gold': parts['gold']} if (parts := quality(row, text)) else {})
                  for row, text in zip(rows, greedy.texts, strict=True)]
    means, ranges = summarise(row_grades)
    metrics = as_metrics(means, ranges) | outcomes(rows, row_grades)
    totals, terms = rewards(data, sampled)
    values = {'reward': totals} | {f'reward_{name}': term for name, term in terms.items()}
    if reference is not None:
        values['kl'] = divergence(net, model, reference, run, sampled, model.config.block_size, temperature).sum(1)
        metrics['val/kl_low'], metrics['val/kl_high'] = interval(values['kl'].tolist())
    values['gold_sampled'] = gold_scores(data, sampled)
    for name, per_answer in values.items():
        finite = per_answer[np.isfinite(per_answer)]
        if len(finite):
            metrics[f'val/{name}'] = float(finite.mean())
    metrics |= {'val/response_len': float(greedy.lengths.mean()), 'val/ended': float(sampled.ended.mean())}
    graded = format_metrics({k: v for k, v in means.items() if k in ('correct', 'gold', 'f1')}, ranges)
    summary = f'held-out: {graded}; sampled: ' if graded else 'held-out, sampled: '
    summary += f'reward {metrics.get("val/reward", math.nan):.3f}'
    summary += f', KL {metrics["val/kl"]:.3f}' if 'val/kl' in metrics else ''
    summary += f', gold {metrics["val/gold_sampled"]:.3f}' if 'val/gold_sampled' in metrics else ''
    if by_steps := accuracy_by(rows, row_grades, 'steps'):
        summary += f'\ncorrect by steps: {by_steps}'
    samples = list(map(format_answer, rows, map(data.transcript, greedy.ids), row_grades))
    return metrics, summary, samples
