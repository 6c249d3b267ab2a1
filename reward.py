"""
Reward models: a model is trained on pairs of answers, of which one is preferred, to give any answer a scalar score.

    python reward.py config/reward_tiny.py                         word problems, from the model of config/sft_tiny.py
    python reward.py config/reward_tiny.py --loss_type=margin --margin=1.0
    python reward.py config/reward_tiny.py --causal=False --score_head=mean     the same as a bidirectional encoder
    python reward.py config/reward_smollm2.py --dataset=data/mine               SmolLM2-135M with LoRA learns your pairs
    python reward.py --init_from=out/reward --dataset=wordproblems --check=True              ten sanity checks
    python reward.py config/reward_process.py                      a process reward model: is each step right?
    torchrun --standalone --nproc_per_node=2 reward.py config/reward_tiny.py --gradient_accumulation_steps=2

A linear head on the hidden state of the last token (score_head='last') or on the mean over all tokens ('mean') gives
the score; with score_likelihood=True the answer's log-probability, times a trained gain, is added. The reward is a
score times a gain plus a bias, saved in the checkpoint, that give held-out answers mean 0 and variance 1.

A process reward model (loss_type='process') learns from labels of steps whether each is right; the smallest of a
solution's probabilities, or their product (score_steps), is its score.

Papers: InstructGPT (arXiv:2203.02155), learning to summarize (arXiv:2009.01325), fine-tuning from preferences
(arXiv:1909.08593), margins from grades (Llama 2, arXiv:2307.09288), centred rewards (arXiv:2312.09244), calibration
(arXiv:1706.04599), process supervision (arXiv:2305.20050).
"""
import math
import random
import re
from typing import NamedTuple

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
import torch.nn.functional as F

from dataset import PrefData, StepData, answered, find_dataset, pad_texts, prefs_of
from grade import interval, last_number, ratio_interval, visible
from load import load_to_score
from lora import LoRAConfig
from model import GPTConfig
from optim import lr_factor, make_optimizers
from reward_model import ScoreConfig
from rows import fraction_of, is_file_of_rows
from tokenizer import UserError

# where and what
out_dir = 'out/reward'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'scratch'; 'resume'; 'auto:MODEL', as in the other stages
base = 'out/sft'  # init_from='scratch': model with the tokenizer and shape of the new one
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, dropout and new weights
# rows: pairs, or for loss_type='process' solutions with labelled steps
max_length = 0  # maximum tokens of prompt and answer; 0 = block_size. A longer row loses the start of its prompt
strict = True  # stop at a malformed row; False: skip and count it
# loss
loss_type = 'bt'  # 'bt' (Bradley-Terry), 'bt_margin' (minus the row's margin), 'margin' (ranking), 'process' (steps)
margin = 1.0  # 'margin': required difference of the two scores; 'bt_margin': factor on the rows' margins
center_coef = 0.0  # weight of the squared sum of a pair's scores, which keeps scores near 0; 0.01 is usual
# batches
batch_size = 16  # rows per micro-batch: pairs, both answers of each, or solutions
gradient_accumulation_steps = 1  # micro-batches per step, over all processes together
max_iters = 500  # steps
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 3e-4  # peak learning rate of AdamW
embed_lr = 0.0  # peak learning rate of the token embedding; 0 = learning_rate
lora_lr_ratio = 1.0  # LoRA+: learning rate of LoRA's B over that of A; 16 is usual
muon_lr = 0.02  # peak learning rate of Muon
muon_momentum = 0.95  # Nesterov momentum of Muon
weight_decay = 0.0  # applied to matrices only
beta1 = 0.9  # AdamW: decay rate of the first moment
beta2 = 0.99  # AdamW: decay rate of the second moment
grad_clip = 1.0  # maximum gradient norm; 0 = no clipping
# schedule
lr_schedule = 'cosine'  # after the warmup: 'cosine', 'linear', 'wsd' (constant, then linear) or 'constant'
warmup_iters = 20  # steps of linear warmup
lr_decay_iters = 0  # step at which the learning rate reaches min_lr; 0 = max_iters
min_lr = 0.0  # final learning rate; every group decays by the same factor
decay_frac = 0.5  # 'wsd': fraction of lr_decay_iters that the final decay takes
# evaluation and logging
eval_interval = 100  # steps between evaluations, each with a checkpoint
eval_rows = 512  # held-out rows to score, the same every time; 0 = all
eval_only = False  # evaluate init_from and exit, without training
check = False  # run ten sanity checks on init_from and exit, without training
eval_split = 'val'  # split of eval_only and check: 'val', 'test', 'train', or 'unseen' (see data/wordproblems)
log_interval = 10  # steps between lines of the log
keep_checkpoints = 2  # checkpoints to keep: ckpt.pt, and older ones as ckpt.1.pt …
max_bad_steps = 10  # stop after this many skipped updates in a row (loss or gradient not finite)
tensorboard_log = False  # log to out_dir/tensorboard
wandb_log = False  # log to Weights & Biases
wandb_project = 'flatgpt'  # Weights & Biases: project
wandb_run_name = ''  # Weights & Biases: name of the run; empty = out_dir
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best available
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits if the device is faster at it
compile = False  # torch.compile: slow to start, then faster
activation_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
fsdp = False  # under torchrun: shard parameters, gradients and optimizer state (FSDP2), not replicate them (DDP)

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1',
    **dict.fromkeys(('max_length', 'margin', 'center_coef', 'eval_rows'), '>= 0'),
    'loss_type': ('bt', 'margin', 'bt_margin', 'process'), 'eval_split': ('val', 'test', 'unseen', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths. Shapes: B rows of a batch, n held-out ones, K steps of the longest solution

def bradley_terry(chosen, rejected, margins=0.0):
    """-log s(chosen - rejected - margins), s the logistic function: scores (B,) -> losses (B,), in nats."""
    return -F.logsigmoid(chosen - rejected - margins)


def margin_ranking(chosen, rejected, margin):
    """max(0, margin - (chosen - rejected)): scores (B,) -> losses (B,)."""
    return F.relu(margin - (chosen - rejected))


def pair_loss(chosen, rejected, row_margins, loss_type, margin, center_coef):
    """Scores of pairs (B,), row_margins (B,): how much better the data rate the chosen answers -> losses (B,).

        'bt'         -log s(chosen - rejected)                           Bradley-Terry (arXiv:2009.01325)
        'bt_margin'  -log s(chosen - rejected - margin * row_margins)    Llama 2 (arXiv:2307.09288, eq. 2)
        'margin'     max(0, margin - (chosen - rejected))                ranking

    each plus center_coef * (chosen + rejected)^2 (arXiv:2312.09244).
    """
    if loss_type == 'margin':
        losses = margin_ranking(chosen, rejected, margin)
    else:
        losses = bradley_terry(chosen, rejected, margin * row_margins if loss_type == 'bt_margin' else 0.0)
    return losses + center_coef * (chosen + rejected).square()


def step_losses(logits, labels):
    """Binary cross-entropy of steps (arXiv:2305.20050): logits that they are right (B, K), labels (B, K), 1 or 0, nan
    where a solution has none -> losses (B, K), in nats, 0 there."""
    labelled = labels.isfinite()
    return F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction='none') * labelled


class Bin(NamedTuple):
    """Pairs of similar confidence, from low to high: how many, their mean confidence, and their accuracy."""
    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration(margins, n_bins=10):
    """Confidence in the order of pairs and their accuracy: margins, chosen minus rejected, (n,) -> ([Bin], ECE).

    The confidence of a pair is s(|margin|); equal bins divide [0.5, 1], and empty ones are dropped. Expected
    calibration error = sum over bins of count / n * |accuracy - confidence| (arXiv:1706.04599, eq. 3).
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    hits = pair_accuracy(margins)
    index = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    bins = []
    for i in np.unique(index):
        inside = index == i
        bins.append(Bin(0.5 + i / (2 * n_bins), 0.5 + (i + 1) / (2 * n_bins), int(inside.sum()),
                        confidence[inside].mean(), hits[inside].mean()))
    return bins, sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / len(margins)


def pair_accuracy(margins):
    """Whether pairs are ordered correctly: margins (…) -> 1 or 0, and 1/2 for a tie."""
    return (np.sign(margins) + 1) / 2


# ----------------------------------------------------------------------------------------------------------------------
# scoring and evaluation

def compute_scores(model, run, examples, block_size):
    """Scores of a batch of examples (ids, is_answer): float32 (len(examples),) on the device."""
    idx, real, answer = run.to_device(*pad_texts(examples, block_size))
    with run.autocast(idx.shape[1]):
        return model(idx, real, answer)


def compute_step_logits(net, model, run, examples, block_size, n_steps):
    """Logits that the first n_steps steps of each example are right: (len(examples), n_steps) on the device."""
    idx, real, answer = run.to_device(*pad_texts(examples, block_size))
    with run.autocast(idx.shape[1]):
        logits = net(idx, real, answer, output='steps')
    ends, _ = model.step_ends(idx, answer)
    ends = ends.int().argsort(dim=1, descending=True, stable=True)  # the ends first, in their order
    return F.pad(logits.gather(1, ends[:, :n_steps]), (0, max(0, n_steps - idx.shape[1])))


@torch.no_grad()
def compute_all(compute, net, run, examples):
    """What compute(some of the examples) gives, (n, k), of any number of them, shared by the processes: float64 array
    (len(examples), k)."""
    def work(part):
        return compute([examples[i] for i in part]).cpu().double().numpy()
    net.eval()
    found = run.distributed_map(work, [len(ids) for ids, _ in examples])
    net.train()
    return found


def compute_all_scores(net, run, examples, block_size):
    """As `compute_scores`, of any number of examples: float64 array (len(examples),)."""
    return compute_all(lambda part: compute_scores(net, run, part, block_size)[:, None], net, run, examples)[:, 0]


def labels_of(data, rows):
    """Labels of the steps of these rows of StepData: float32 (n, K), 1 or 0, nan where there is none."""
    labels = [data.rows_kept[row]['labels'] for row in rows]
    found = np.full((len(rows), max(map(len, labels))), np.nan, np.float32)
    for values, own in zip(found, labels, strict=True):
        values[:len(own)] = [np.nan if label is None else label for label in own]
    return found


def check_steps(model, data):
    """UserError where the model does not see just the steps that a row of StepData has labels for."""
    for i, row in enumerate(data.rows_kept):
        idx, counts = map(torch.from_numpy, data.example(i))
        found = int(model.step_ends(idx[None].long(), counts[None])[0].sum())
        if found != len(row['labels']):
            raise UserError(f'{row["where"]}: {len(row["labels"])} lines of steps, of which the chat template and the '
                            f'tokenizer ({data.tokenizer.name}) leave {found}: labels would be those of other steps')


class Evaluation(NamedTuple):
    """Scores of held-out answers, by what they are: {name: (n,)}; metrics; a line and tables about them."""
    scores: dict
    metrics: dict
    summary: str
    tables: str


def evaluate(net, model, run, data, rows):
    """Rows of data, by index -> Evaluation."""
    if model.score_config.score_steps:
        return evaluate_steps(net, model, run, data, rows)
    return evaluate_pairs(net, run, data, rows)


def evaluate_pairs(net, run, data, pairs):
    """Pairs of PrefData, by index -> Evaluation of the chosen and of the rejected answers."""
    # data.texts gives the chosen answers of all pairs, then the rejected ones: hence reshape(2, -1)
    scores = compute_all_scores(net, run, [data.example(text) for text in data.texts(pairs)], data.block_size)
    chosen, rejected = scores.reshape(2, -1)
    margins = chosen - rejected
    rows = [data.rows_kept[i] for i in pairs]
    row_margins = torch.tensor([float(row.get('margin', 0)) for row in rows], dtype=torch.float64)
    losses = pair_loss(*torch.from_numpy(scores).chunk(2), row_margins, loss_type, margin, center_coef)
    hits = pair_accuracy(margins)
    low, high = interval(hits.tolist())  # 95 %
    bins, ece = calibration(margins)
    metrics = {'val/loss': losses.mean().item(), 'val/accuracy': float(hits.mean()), 'val/accuracy_low': low,
               'val/accuracy_high': high, 'val/margin': float(margins.mean()), 'val/ece': ece,
               'reward/mean': float(scores.mean()), 'reward/std': float(scores.std())}
    summary = f'val loss {metrics["val/loss"]:.4f}, accuracy {metrics["val/accuracy"]:.1%} ({low:.1%} to {high:.1%})'
    flipped = np.array([bool(row.get('flipped')) for row in rows])
    true_hits = pair_accuracy(np.where(flipped, -margins, margins))
    if any('flipped' in row for row in rows):  # the data know which labels are wrong
        metrics |= {'val/true_accuracy': float(true_hits.mean()), 'val/label_noise': float(flipped.mean())}
        summary += f', of the true labels {true_hits.mean():.1%} ({flipped.mean():.1%} of labels are flipped)'
    summary += f', mean margin {metrics["val/margin"]:.2f}, calibration error {ece:.3f}'
    tables = [*by_defect(rows, true_hits), 'confidence    pairs   mean  accuracy']
    tables += [f'{b.low:.2f} to {b.high:.2f} {b.count:6,} {b.confidence:6.1%} {b.accuracy:9.1%}' for b in bins]
    return Evaluation({'chosen': chosen, 'rejected': rejected}, metrics, summary, '\n'.join(tables))


def evaluate_steps(net, model, run, data, rows):
    """Solutions of StepData, by index -> Evaluation of those all of whose labels are right, and of the others.

    A step is judged right if its probability is above 1/2, a solution if all of its steps are. first_error: of wrong
    solutions, how often the first step that is judged wrong is the first wrong one (ProcessBench, arXiv:2412.06559).
    """
    examples, labels = [data.example(row) for row in rows], labels_of(data, rows)
    rows = [data.rows_kept[row] for row in rows]
    logits = compute_all(lambda part: compute_step_logits(net, model, run, part, data.block_size, labels.shape[1]),
                         net, run, examples)
    scores = compute_all_scores(net, run, examples, data.block_size)
    losses = step_losses(torch.from_numpy(logits), torch.from_numpy(labels).double()).numpy()
    labelled = np.isfinite(labels)
    wrong, judged_wrong = labels == 0, (logits <= 0) & labelled
    hits = (wrong == judged_wrong) & labelled
    flawed = wrong.any(1)
    solved = (judged_wrong.any(1) == flawed).astype(float)
    low, high = ratio_interval(hits.sum(1).tolist(), labelled.sum(1).tolist())  # 95 %, of solutions
    metrics = {'val/loss': float(losses.sum() / labelled.sum()), 'val/accuracy': float(hits.sum() / labelled.sum()),
               'val/accuracy_low': low, 'val/accuracy_high': high, 'val/solution_accuracy': float(solved.mean()),
               'reward/mean': float(scores.mean()), 'reward/std': float(scores.std())}
    summary = (f'val loss {metrics["val/loss"]:.4f}, of steps {metrics["val/accuracy"]:.1%} ({low:.1%} to {high:.1%}) '
               f'judged as labelled, of solutions {metrics["val/solution_accuracy"]:.1%}')
    if flawed.any():
        found = judged_wrong.any(1) & (judged_wrong.argmax(1) == wrong.argmax(1))
        metrics['val/first_error'] = float(found[flawed].mean())
        summary += f', first errors found {metrics["val/first_error"]:.1%}'
    tables = [share_of(f'{name} steps', hits[which]) for name, which in (('right', labels == 1), ('wrong', wrong))
              if which.any()]
    groups = {name: scores[which] for name, which in (('right', ~flawed), ('wrong', flawed)) if which.any()}
    return Evaluation(groups, metrics, summary, '\n'.join([*tables, *by_defect(rows, solved)]))


def share_of(name, hits):
    """The mean of hits (n,), from 0 to 1, as a line of text."""
    low, high = interval([float(hit) for hit in hits])
    return f'{name:>14}: {np.mean(hits):6.1%} right of {len(hits):,} ({low:.1%} to {high:.1%})'


def by_defect(rows, hits):
    """The mean of hits (n,) for each `defect` of rows, as lines of text."""
    groups = {}
    for row, hit in zip(rows, hits, strict=True):
        if 'defect' in row:
            groups.setdefault(row['defect'], []).append(hit)
    return [share_of(defect, own) for defect, own in sorted(groups.items())]


def format_rewards(scores, gain, bias):
    """The distribution of the rewards of each group of scores, {name: (n,)}, as text."""
    lines = []
    for name, values in scores.items():
        rewards = gain * values + bias
        low, *quantiles, high = np.quantile(rewards, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))
        inner = ', '.join(f'{q:.2f}' for q in quantiles)
        lines.append(f'{name}: mean {rewards.mean():.2f}, sd {rewards.std():.2f}, {low:.2f} to {high:.2f} '
                     f'(5, 25, 50, 75, 95 %: {inner})')
    return '\n'.join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# sanity checks -> (name, passes, result as text); passes is None where the data do not allow the check

def noisy(low, high, *limits):
    """The words that a limit lies in the 95 % interval from low to high of what was measured, or '' if none does."""
    return ', within noise' if any(low < limit < high for limit in limits) else ''


def length_check(rows, scores, lengths):
    """Scores do not follow lengths, among problems with equally many steps: their quality and difficulty are alike."""
    by_steps = {}
    for i, row in enumerate(rows):
        by_steps.setdefault(row.get('steps'), []).append(i)
    groups = [indices for indices in by_steps.values() if len(indices) > 2]
    if all(lengths[group].std() == 0 for group in groups):
        return 'length', None, 'all answers have the same length'
    x, y = (np.concatenate([values[group] - values[group].mean() for group in groups]) for values in (lengths, scores))
    r = float(np.corrcoef(x, y)[0, 1]) if y.std() > 0 else 0.0
    error = 1.96 / math.sqrt(max(1, len(x) - 3))  # of artanh(r), Fisher 1915
    low, high = (math.tanh(math.atanh(max(-0.999999, min(r, 0.999999))) + side * error) for side in (-1, 1))
    return 'length', abs(r) <= 0.3, (f'correlation of score and length of better answers {r:.2f} ({low:.2f} to '
                                     f'{high:.2f}; limit ±0.3{noisy(low, high, -0.3, 0.3)})')


def halves_check(prompts, hits):
    """Accuracy is the same in two halves of the prompts, within the 95 % interval of the difference."""
    first = np.array([fraction_of(str(prompt)) < 0.5 for prompt in prompts])
    if first.all() or not first.any():
        return 'two halves agree', None, 'too few rows'
    a, b = hits[first], hits[~first]
    error = 1.96 * math.sqrt(a.var() / len(a) + b.var() / len(b))
    passes = abs(a.mean() - b.mean()) <= max(error, 1e-9) and min(a.mean(), b.mean()) > 0.5
    return 'two halves agree', passes, (f'accuracy {a.mean():.1%} and {b.mean():.1%} (at most {error:.1%} apart, both '
                                        'above 50%)')


def other_answer(i, prompts, answers):
    """The next answer after row i, cyclically, that differs from it and has another prompt; '' if there is none."""
    for j in (*range(i + 1, len(prompts)), *range(i)):
        if prompts[j] != prompts[i] and answers[j] != answers[i]:
            return answers[j]
    return ''


def checks(reward, rows, tokenizer):
    """Ten sanity checks of a reward model: list of (name, passes, result).

    reward(list of (messages, answer)) returns normalised scores (n,); rows: those of `load_prefs`. Damaged answers are
    compared with the truly better answer of each pair: the rejected one where the label is flipped. Results have their
    95 % intervals, and say where these leave the verdict open.
    """
    better_pairs, worse_pairs = [], []
    for row in rows:
        chosen, rejected = ((row['prompt'] + row[key][:-1], row[key][-1]['content']) for key in ('chosen', 'rejected'))
        better_pairs.append(rejected if row.get('flipped') else chosen)
        worse_pairs.append(chosen if row.get('flipped') else rejected)
    better_scores, worse_scores = reward(better_pairs), reward(worse_pairs)
    prompts, better = zip(*better_pairs, strict=True)
    results = [length_check(rows, better_scores, np.array([len(tokenizer.encode(answer)) for answer in better], float))]

    rng = random.Random(0)
    shuffled = [' '.join(rng.sample(words, len(words))) for words in map(str.split, better)]
    wrong = [re.sub(r'\d+(?!.*\d)', lambda last: str(int(last[0]) + rng.choice([1, 2, 10])), answer, flags=re.S)
             for answer in better]
    everything = list(range(len(rows)))
    with_words = [i for i in everything if len(set(better[i].split())) > 1]
    with_number = [i for i, row in enumerate(rows) if row.get('grader', 'number') == 'number' and 'answer' in row
                   and last_number(visible(better[i])) is not None]
    for name, minimum, indices, answers in (
            ('empty answer', 0.95, everything, [''] * len(rows)),
            ('repeated answer', 0.9, everything, [f'{answer}\n{answer}' for answer in better]),
            ('answer to another question', 0.9, everything, [other_answer(i, prompts, better) for i in everything]),
            ('shuffled words', 0.95, with_words, shuffled),
            ('wrong number', 0.9, with_number, wrong)):
        if not indices:
            results.append((name, None, 'no row of this data allows it'))
            continue
        scores = reward([(prompts[i], answers[i]) for i in indices])
        hits = pair_accuracy(better_scores[indices] - scores)
        low, high = interval(hits)
        results.append((name, hits.mean() >= minimum,
                        f'the better answer wins in {hits.mean():.1%} of {len(indices):,} ({low:.1%} to {high:.1%}; at '
                        f'least {minimum:.0%}{noisy(low, high, minimum)})'))
    for name, tail in (('trailing space', ' '), ('trailing newline', '\n')):
        scores = reward([(prompt, answer + tail) for prompt, answer in better_pairs])
        shifts = np.abs(scores - better_scores)
        low, high = interval(shifts)
        results.append((name, shifts.mean() <= 0.1, f'moves a score by {shifts.mean():.3f} sd on average ({low:.3f} to '
                                                    f'{high:.3f}; at most 0.1{noisy(low, high, 0.1)})'))

    results.append(halves_check(prompts, pair_accuracy(better_scores - worse_scores)))
    scores = np.concatenate((better_scores, worse_scores))
    mean, sd = scores.mean(), scores.std()
    noise = noisy(*interval(scores), -0.1, 0.1) or noisy(*interval((scores - mean) ** 2), 0.8 ** 2, 1.25 ** 2)
    results.append(('drift of the mean', abs(mean) <= 0.1 and 0.8 <= sd <= 1.25,
                    f'mean {mean:.3f}, sd {sd:.3f} (within ±0.1, and 0.8 to 1.25{noise})'))
    return results


def run_checks(net, model, run, data):
    """Prints the results of the checks on held-out pairs: WARN where one fails, -- where the data do not allow it."""
    gain, bias = model.score_scale.tolist()

    def reward(answers):
        examples = [answered(data.tokenizer, messages, answer, data.block_size, strip=True)
                    for messages, answer in answers]
        return gain * compute_all_scores(net, run, examples, data.block_size) + bias
    results = checks(reward, [data.rows_kept[i] for i in data.fixed(eval_rows)], data.tokenizer)
    for name, passes, result in results:
        run.print0(f'{"  --" if passes is None else "pass" if passes else "WARN"}  {name:<27} {result}')
    verdicts = [bool(passes) for _, passes, _ in results if passes is not None]
    run.print0(f'{sum(verdicts)} of {len(verdicts)} checks pass on {dataset}, {eval_split}')


# ----------------------------------------------------------------------------------------------------------------------

def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig, LoRAConfig and ScoreConfig: those
    # are given
    config, given = runtime.configure(globals(), GPTConfig, LoRAConfig, ScoreConfig)
    runtime.check_ranges(config, RANGES)
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)
    if loss_type == 'process':
        given = {'score_steps': 'min'} | given

    # model
    resume_from = run.find_checkpoint(init_from, writes=not (eval_only or check))
    # base at the end: where the tokenizer and the shape of new weights are from, if init_from is 'scratch'
    # dropout is off unless it is given, whatever the base was trained with; a resumed run keeps its own
    start = load_to_score('reward', init_from.removeprefix('auto:'), resume_from,
                          given if resume_from else {'dropout': 0.0} | given, seed, base)
    model, tokenizer = start.model, start.tokenizer
    length = start.row_length(max_length)
    process = bool(model.score_config.score_steps)
    what = 'solutions' if process else 'pairs'
    if process:
        model.score_lines[:tokenizer.n_vocab] = torch.from_numpy(tokenizer.token_lines())
    if process != (loss_type == 'process') and not eval_only and not check:
        raise UserError(f'loss_type={loss_type!r} with score_steps={model.score_config.score_steps!r}: a model with '
                        "score_steps, and no other, learns by loss_type='process'")
    if (eval_only or check) and start.new_head:
        raise UserError(f'{start.origin} is not a reward model, its score head is untrained: train one and give it as '
                        '--init_from')
    if not is_file_of_rows(dataset):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only or check:
        net = run.wrap(model, compile)
        if eval_only:
            data = prefs_of(dataset, eval_split, tokenizer, length, seed, strict, val_fraction, run.print0,
                            strip=True, kind=StepData if process else PrefData)
            found = evaluate(net, model, run, data, data.fixed(eval_rows))
            run.print0(f'{init_from} on {len(data.fixed(eval_rows)):,} {what} of {dataset}, {eval_split}: '
                       f'{found.summary}\n{found.tables}\n'
                       f'{format_rewards(found.scores, *model.score_scale.tolist())}')
        if check:  # of pairs, also of a process reward model
            data = prefs_of(dataset, eval_split, tokenizer, length, seed, strict, val_fraction, run.print0, strip=True)
            run_checks(net, model, run, data)
        return

    # data
    train_data, val_data = (prefs_of(dataset, split, tokenizer, length, seed, strict, val_fraction, run.print0,
                                     strip=True, kind=StepData if process else PrefData) for split in ('train', 'val'))
    if process:
        check_steps(model, train_data)
        check_steps(model, val_data)
    missing = next((row['where'] for row in train_data.rows_kept + val_data.rows_kept if 'margin' not in row), None)
    if loss_type == 'bt_margin' and missing:
        raise UserError(f"{missing}: loss_type='bt_margin' needs a number in every row: 'margin', how much better the "
                        'chosen answer is')
    row_margins = np.array([float(row.get('margin', 0)) for row in train_data.rows_kept], np.float32)

    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(model.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum, lora_lr_ratio)

    # resume
    step, rows_seen, clock = 0, 0, runtime.Clock()
    if resume_from:
        run.resume(start.checkpoint, start.origin, optimizers, config)
        step, rows_seen = start.checkpoint['iter'], start.checkpoint['pairs']
        clock = runtime.Clock(start.checkpoint['seconds'])
        start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    rows_per_step = gradient_accumulation_steps * batch_size
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * rows_per_step / train_data.n_rows
    run.announce(
        f'{dataset}: {train_data.n_rows:,} {what} to train on, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {rows_per_step} {what}: {epochs:.2f} epochs')

    if run.ddp:
        # DDP fixes the order in which it sums gradients at its first backward pass: one that is discarded makes that
        # order the same for a new and a resumed run
        first = rows_seen + run.rank * batch_size
        run.seed_dropout(first)
        examples = [train_data.example(text) for text in train_data.texts(train_data.rows(first, batch_size))]
        warmup = compute_step_logits(net, model, run, examples, length, 1) if process else compute_scores(
            net, run, examples, length)
        run.warm_up_ddp(net, warmup.mean())
    # speed and means of metrics, from one row of the log to the next
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
    clock.start()
    meter.reset(step)
    while True:
        # a stopped run is evaluated before it is saved: score_scale must belong to the weights beside it
        stop = run.stop_signal()
        if step > last_eval and (stop or step % eval_interval == 0 or step == max_iters):
            clock.stop()
            found = evaluate(net, model, run, val_data, val_data.fixed(eval_rows))
            metrics = found.metrics
            # the loss sees differences of scores only, so their mean is arbitrary, and PPO needs a known scale: rewards
            # have mean 0 and variance 1 on held-out answers (arXiv:1909.08593)
            std = max(metrics['reward/std'], 1e-6)
            gain = 1 / std
            bias = -metrics['reward/mean'] / std
            with torch.no_grad():
                model.score_scale.copy_(torch.tensor([gain, bias]))
            run.log(metrics | {'iter': step, 'seconds': clock.read()})
            run.print0(f'step {step}: {found.summary}, {clock.read():.1f} s of training')
            run.sample(step, f'{found.tables}\n{format_rewards(found.scores, gain, bias)}')
            run.save_checkpoint(start.model_state() | {'iter': step, 'pairs': rows_seen, 'seconds': clock.read()},
                                optimizers, metrics['val/loss'], keep_checkpoints)
            last_eval = step
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # the learning rate of this step
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # forward and backward, over this process's micro-batches
        step_loss = 0.0
        for number in run.micro_batches(net, gradient_accumulation_steps):
            first = rows_seen + number * batch_size  # a function of the step alone: a resumed run repeats no row
            rows = train_data.rows(first, batch_size)
            examples = [train_data.example(text) for text in train_data.texts(rows)]
            run.seed_dropout(first)  # a function of the seed and the position in the data, not of what ran before
            if process:
                labels, = run.to_device(labels_of(train_data, rows))
                logits = compute_step_logits(net, model, run, examples, length, labels.shape[1])
                loss = step_losses(logits, labels).sum() / labels.isfinite().sum()
                hits = ((logits > 0) == labels).sum() / labels.isfinite().sum()
            else:
                # one forward pass for both answers, all chosen ones and then all rejected ones: half the calls, and one
                # backward pass per micro-batch, as DDP needs
                chosen, rejected = compute_scores(net, run, examples, length).chunk(2)
                margins, = run.to_device(row_margins[rows])
                loss = pair_loss(chosen, rejected, margins, loss_type, margin, center_coef).mean()
                hits = (torch.sign(chosen - rejected).mean() + 1) / 2
            # the routers of a mixture of experts have a loss of their own, which balances their load
            run.backward((loss + model.gpt.router_loss()) / micro_steps)
            step_loss += loss.detach() / micro_steps
            meter.add(sum(len(ids) for ids, _ in examples), **{'train/accuracy': hits.detach()})

        # clip and update; a gradient that is not finite skips the update, which the device decides: the host need not
        # wait (float16: clip_grad_norm unscales the gradients)
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        run.skip_if_not_finite(optimizers, grad_norm)
        optimizers.step()
        optimizers.zero_grad()
        step += 1
        rows_seen += rows_per_step

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best validation loss {run.best:.4f}; check it: python reward.py --init_from={out_dir} '
               f'--dataset={dataset} --check=True')


if __name__ == '__main__':
    runtime.cli(main)
