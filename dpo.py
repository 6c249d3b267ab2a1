"""
Direct preference optimisation (DPO): a policy is trained on pairs of answers, of which one is preferred, without a
reward model. The pairs are given, or drawn from the policy itself while it learns.

    python dpo.py config/dpo_tiny.py                               word problems, from the model of config/sft_tiny.py
    python dpo.py config/dpo_tiny.py --beta=0.5 --loss_type=ipo
    python dpo.py config/dpo_tiny.py --loss_type=kto --label_smoothing=0    single answers, each labelled good or bad
    python dpo.py config/dpo_online.py                             pairs of its own answers, from config/sft_mixed.py
    python dpo.py config/dpo_tiny.py --reward_model=out/reward     a reward model scores the answers at evaluations
    python dpo.py config/dpo_smollm2.py --dataset=data/mine        SmolLM2-135M learns your pairs with LoRA
    torchrun --standalone --nproc_per_node=2 dpo.py config/dpo_tiny.py --gradient_accumulation_steps=2

The reference is the model that the run starts from. Its log-probabilities of given answers are computed once and kept
in the checkpoint. An evaluation answers held-out prompts twice: greedy answers are graded, and answers sampled at
temperature 1 estimate how far the policy has moved, as the KL divergence to the reference.

With --online=True a step samples num_generations answers to each prompt, rewards them (see rollout.py), and pairs the
best with the worst. Prompts whose answers all have the same reward give no pair. Held-out pairs are then pairs of the
policy's own answers to held-out prompts.

Papers: DPO (arXiv:2305.18290), IPO (arXiv:2310.12036), SLiC's hinge (arXiv:2305.10425), KTO (arXiv:2402.01306), SimPO
(arXiv:2405.14734), ORPO (arXiv:2403.07691), the SFT term (arXiv:2404.19733), cDPO's label smoothing (Mitchell 2023),
pairs of the policy's own answers (online: arXiv:2402.04792; best against worst: arXiv:2312.11456).
"""
import math
from typing import NamedTuple

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
import torch.nn.functional as F

from dataset import LabelledData, PrefData, find_dataset, pad_texts, prefs_of
from grade import accuracy_by, format_answer, format_metrics, grades, interval, outcomes, quality, summarise
from load import load_to_train
from lora import LoRAConfig
from model import GPTConfig
from optim import lr_factor, make_optimizers
from rollout import (
    Rewards,
    divergence,
    forcing,
    generate_rollouts,
    gold_scores,
    join_rollouts,
    load_prompt_data,
    load_scorer,
)
from rows import is_file_of_rows
from tokenizer import UserError

# where and what
out_dir = 'out/dpo'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'resume'; 'auto:MODEL': resume if out_dir has a run
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, dropout, new weights and samples
# given answers
max_length = 0  # maximum tokens of prompt and answer; 0 = block_size. A longer pair loses the start of its prompt
strict = True  # stop at a malformed row; False: skip and count it
# the policy's own answers
online = False  # True: dataset has prompts; each step samples answers to some and pairs the best with the worst
rewards = 'correct'  # online: a weighted sum: 'correct, 0.2*format, model, FILE.py:function', see rollout.py
num_generations = 8  # online: answers to each prompt
temperature = 1.0  # online: of sampling in training
dynamic_sampling = 0  # online: up to this many times a step, replace prompts that give no pair by new ones; 0 = off
max_bad_rewards = 20  # online: stop once more rewards than this have failed
# loss
loss_type = 'sigmoid'  # 'sigmoid' (DPO), 'ipo', 'hinge'; 'kto' (single answers); without a reference: 'simpo', 'orpo'
beta = 0.1  # larger: closer to the reference; 'simpo': scale of the margin; 'orpo': weight of the odds ratio
label_smoothing = 0.0  # 'sigmoid', 'simpo': assumed fraction of flipped labels (cDPO)
length_normalise = False  # log-probabilities per token, not per answer; always so for 'simpo' and 'orpo'
gamma = 0.5  # 'simpo': target margin, beside which its paper has a beta of 2 to 2.5
desirable_weight = 1.0  # 'kto': weight of good answers' losses
undesirable_weight = 1.0  # 'kto': weight of bad answers' losses; the weights make up for unequal numbers of both
sft_coef = 0.0  # weight of the SFT term, the cross-entropy of the chosen answers per token
# batches
batch_size = 16  # pairs per micro-batch, both answers of each; 'kto': answers; online: prompts
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
eval_interval = 100  # steps between evaluations, each with answers and a checkpoint
eval_rows = 256  # held-out pairs to evaluate on and prompts to answer, the same every time; 0 = all
eval_only = False  # evaluate init_from and exit, without training
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test', 'train', or 'unseen' (see data/wordproblems)
reward_model = ''  # directory of a run of reward.py that scores greedy answers; online: only with 'model' in rewards
max_new_tokens = 128  # maximum length of an answer, in tokens
tools: bool | str = False  # True: the calculator answers <tool>…</tool>; FILE.py: functions to be called (tools.py)
max_tool_calls = 8  # rounds of calls of functions in an answer, after which its turn ends for good
show_answers = 3  # answers printed at each evaluation
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

REFERENCE_FREE = ('simpo', 'orpo')

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1', 'label_smoothing': '>= 0 and < 0.5', 'max_new_tokens': '>= 1',
    'num_generations': '>= 2',
    **dict.fromkeys(('beta', 'temperature', 'desirable_weight', 'undesirable_weight'), '> 0'),
    **dict.fromkeys(('max_length', 'gamma', 'sft_coef', 'eval_rows', 'show_answers', 'dynamic_sampling',
                     'max_tool_calls', 'max_bad_rewards'), '>= 0'),
    'loss_type': ('sigmoid', 'ipo', 'hinge', 'kto', 'simpo', 'orpo'),
    'eval_split': ('val', 'test', 'unseen', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths. Shapes: B pairs or answers of a micro-batch; P prompts, G answers to each

def preference_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, loss_type='sigmoid', beta=0.1,
                    label_smoothing=0.0, length_normalise=False, gamma=0.5):
    """Losses of pairs -> (losses, implicit rewards of the chosen answers, of the rejected answers), (B,) each.

    chosen, rejected: log-probabilities of the answers under the policy, in nats, (B,); ref_chosen, ref_rejected: under
    the reference; n_chosen, n_rejected: tokens of the answers. r_c and r_r are the log-ratios of the two answers, log
    policy - log reference, with length_normalise per token; beta r is the implicit reward. 'simpo' and 'orpo' have no
    reference: their r is the log-probability per token. With h = r_c - r_r, s the logistic function, e label_smoothing:

        'sigmoid'   -(1 - e) log s(beta h) - e log s(-beta h)            DPO; with e > 0 cDPO
        'ipo'       (h - 1 / (2 beta))^2
        'hinge'     max(0, 1 - beta h)
        'simpo'     'sigmoid' with beta h - gamma in the place of beta h
        'orpo'      -r_c - beta log s(logit(r_c) - logit(r_r))           logit(r) = r - log(1 - exp(r))
    """
    if loss_type in REFERENCE_FREE:
        ref_chosen = ref_rejected = torch.zeros_like(chosen)
    if length_normalise or loss_type in REFERENCE_FREE:
        chosen = chosen / n_chosen
        rejected = rejected / n_rejected
        ref_chosen = ref_chosen / n_chosen
        ref_rejected = ref_rejected / n_rejected
    chosen_logratio = chosen - ref_chosen
    rejected_logratio = rejected - ref_rejected
    h = chosen_logratio - rejected_logratio
    if loss_type in ('sigmoid', 'simpo'):  # Bradley-Terry: s(x) is the probability that the chosen answer is preferred
        x = beta * h - (gamma if loss_type == 'simpo' else 0.0)
        losses = -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)
    elif loss_type == 'ipo':  # a finite target for h, which log s lets grow without end
        losses = (h - 1 / (2 * beta)).square()
    elif loss_type == 'hinge':  # no gradient once the implicit rewards are 1 apart
        losses = F.relu(1 - beta * h)
    else:  # 'orpo': the cross-entropy of the chosen answer, and the log odds ratio of the two
        log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
        losses = -chosen - beta * F.logsigmoid(log_odds_ratio)
    return losses, beta * chosen_logratio.detach(), beta * rejected_logratio.detach()


def kto_loss(logps, ref_logps, labels, kl, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO's losses of single answers (arXiv:2402.01306, eq. 7 and 8) -> (losses, margins), (B,) each.

    logps, ref_logps: log-probabilities of the answers under the policy and the reference, in nats, (B,); labels: 1 of
    a good answer, 0 of a bad one; kl: an estimate of KL(policy || reference) >= 0, see `kl_baseline`. With r the
    log-ratio and s the logistic function:

        good    desirable_weight (1 - s(beta (r - kl)))
        bad     undesirable_weight (1 - s(beta (kl - r)))

    margins: what s is taken of; it is positive where the policy has moved as the label says.
    """
    margins = (2 * labels - 1) * beta * (logps - ref_logps - kl)
    weights = labels * desirable_weight + (1 - labels) * undesirable_weight
    return weights * (1 - torch.sigmoid(margins)), margins.detach()


def losses_of(logps, ref_logps, n_tokens, labels, kl):
    """Losses by the knobs above -> (losses, margins of the implicit rewards), (B,) each.

    The arguments are those of B pairs, (2 B,), all chosen answers and then all rejected ones, or with 'kto' of B single
    answers, (B,); kl: for 'kto'.
    """
    if loss_type == 'kto':
        losses, margins = kto_loss(logps, ref_logps, labels, kl, beta, desirable_weight, undesirable_weight)
    else:
        losses, chosen_rewards, rejected_rewards = preference_loss(
            *logps.chunk(2), *ref_logps.chunk(2), *n_tokens.chunk(2), loss_type, beta, label_smoothing,
            length_normalise, gamma)
        margins = chosen_rewards - rejected_rewards
    # the SFT term: the margin can grow while both answers become less likely; this keeps the chosen one likely
    # (arXiv:2404.19733)
    cross_entropy = -(labels * logps / n_tokens).view(-1, len(losses)).sum(0)
    return losses + sft_coef * cross_entropy, margins


def best_and_worst(totals):
    """Rewards (P, G), nan where there is none -> where the best and the worst of each prompt stand among all P G
    answers, int (n,) each, of the n prompts that have answers of different rewards; the first of equal ones."""
    valid = np.isfinite(totals)
    high = np.where(valid, totals, -np.inf)
    low = np.where(valid, totals, np.inf)
    start = np.arange(len(totals)) * totals.shape[1]
    differ = high.max(1) > low.min(1)
    return (start + high.argmax(1))[differ], (start + low.argmin(1))[differ]


def log1mexp(x):
    """log(1 - exp(x)) for x < 0, numerically stable (Mächler 2012)."""
    x = x.clamp(max=-1e-6)  # x = 0, probability 1, would give -inf
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# ----------------------------------------------------------------------------------------------------------------------
# answers and their log-probabilities

class Answers(NamedTuple):
    """Answers to learn from: those of pairs, all chosen ones and then all rejected ones, or with 'kto' single ones."""
    examples: list  # of each answer: ids of its prompt and of itself, and which of them are the policy's to choose
    labels: np.ndarray  # bool: the chosen one of a pair, a good single one
    ref_logps: np.ndarray  # log-probabilities under the reference, in nats, float64

    @property
    def n_tokens(self):
        """Tokens of each answer, int (n,)."""
        return np.array([is_answer[1:].sum() for _, is_answer in self.examples])


def compute_logps(model, run, examples, block_size):
    """Log-probabilities of the answers of a batch of examples (ids, is_answer), summed over tokens: on the device."""
    idx, _, is_answer = pad_texts(examples, block_size)
    targets = np.full(idx.shape, -100)
    targets[:, :-1] = np.where(is_answer[:, 1:], idx[:, 1:], -100)  # the target of position t is token t + 1
    with run.autocast(idx.shape[1]):
        return -model(*run.to_device(idx, targets), reduction='none').sum(1)


@torch.no_grad()
def compute_all_logps(net, run, examples, block_size):
    """As `compute_logps`, of any number of examples, shared by the processes: float64 array (len(examples),)."""
    def work(part):
        logps = compute_logps(net, run, [examples[i] for i in part], block_size)
        return logps.cpu().double().numpy()[:, None]
    net.eval()
    logps = run.distributed_map(work, [len(ids) for ids, _ in examples])
    net.train()
    return logps[:, 0]


def reference_logps(model, net, reference, run, examples, block_size):
    """As `compute_all_logps`, under the reference."""
    with run.swapped_weights(model, reference):
        return compute_all_logps(net, run, examples, block_size)


def mismatched(examples, block_size):
    """Each prompt with the answer to the prompt before it, the first with that to the last, as examples; one of more
    than block_size tokens loses the start of its prompt."""
    found = []
    for (ids, is_answer), (other_ids, other_is_answer) in zip(examples, examples[-1:] + examples[:-1], strict=True):
        end, start = is_answer.argmax(), other_is_answer.argmax()
        found.append((np.concatenate((ids[:end], other_ids[start:]))[-block_size:],
                      np.concatenate((is_answer[:end], other_is_answer[start:]))[-block_size:]))
    return found


def kl_baseline(model, net, reference, run, examples, block_size):
    """KTO's estimate of KL(policy || reference), from answers to other prompts (arXiv:2402.01306, 4.1): their mean
    log-ratio, at least 0. No gradient goes through it, and dropout is off."""
    others = mismatched(examples, block_size)
    logps = compute_all_logps(net, run, others, block_size)
    return max(0.0, float((logps - reference_logps(model, net, reference, run, others, block_size)).mean()))


def examples_of(pairs):
    """A Rollout of pairs -> (examples, labels) of Answers; forced tokens, a calculator's results, do not count."""
    examples = [(np.array(prompt + ids), np.concatenate((np.zeros(len(prompt), bool), mask[:len(ids)])))
                for prompt, ids, mask in zip(pairs.prompts, pairs.ids, pairs.response_mask, strict=True)]
    return examples, np.arange(len(pairs)) < len(pairs) // 2


def pair_up(answers, totals, n_prompts):
    """A Rollout of so many prompts and its rewards -> [the best answers, the worst ones], a Rollout each."""
    return [answers.take(indices) for indices in best_and_worst(totals.reshape(n_prompts, -1))]


def generate_pairs(model, data, rows_seen, step, run, reward, force):
    """Pairs of the policy's own answers to the next prompts -> (Rollout: all best and then all worst answers, metrics,
    rows_seen).

    With dynamic_sampling, prompts whose answers all have the same reward are replaced by those that follow; the metrics
    of answers are of the prompts before that.
    """
    parts = []
    wanted = missing = batch_size * gradient_accumulation_steps
    for attempt in range(dynamic_sampling + 1):
        sample_seed = 1 + step * (dynamic_sampling + 1) + attempt  # evaluations have 0
        rows = data.rows(rows_seen, missing)  # of an endless sequence, shuffled anew in each epoch
        rows_seen += missing
        answers = generate_rollouts(model, data, rows, run, max_new_tokens, num_generations, temperature, sample_seed,
                                    force=force)
        totals, _ = reward(data, answers)
        if attempt == 0:  # of prompts as they come
            metrics = {'response_len': answers.lengths.mean()}
            for name, values in (('reward/mean', totals), ('reward/gold', gold_scores(data, answers))):
                if np.isfinite(values).any():
                    metrics[name] = np.nanmean(values)
        parts.append(pair_up(answers, totals, missing))
        missing -= len(parts[-1][0])
        if missing == 0:
            break
    best, worst = zip(*parts, strict=True)
    return join_rollouts(best + worst), metrics | {'pairs': (wanted - missing) / wanted}, rows_seen


# ----------------------------------------------------------------------------------------------------------------------
# evaluation

def answer_metrics(held, logps, kl):
    """Metrics of held-out Answers; logps: under the policy, float64 (n,); kl: see `kl_baseline`."""
    arrays = (logps, held.ref_logps, held.n_tokens, held.labels)
    losses, margins = losses_of(*(torch.from_numpy(x).double() for x in arrays), kl)
    hits = ((torch.sign(margins) + 1) / 2).tolist()  # a tie counts half
    name = 'val/labels_met' if loss_type == 'kto' else 'val/accuracy'  # the latter: of pairs, how many are ordered
    low, high = interval(hits)  # 95 %
    return {'val/loss': losses.mean().item(), name: float(np.mean(hits)), f'{name}_low': low, f'{name}_high': high,
            'val/margin': margins.mean().item()} | {
            f'val/logp_{kind}': float(logps[which].mean()) if which.any() else math.nan
            for kind, which in (('chosen', held.labels), ('rejected', ~held.labels))}


def grade_answers(data, answers, scorer):
    """Grades of answers (Rollout) to the prompts of pairs -> (rows, grades of each: [{name: number}])."""
    rows = [data.rows_kept[i] for i in answers.rows]
    answer_grades = [quality(row, text) | grades(row, text) for row, text in zip(rows, answers.texts, strict=True)]
    if scorer is not None:
        scores = scorer([(row['messages'][:-1], text) for row, text in zip(rows, answers.texts, strict=True)])
        for answer_grade, score in zip(answer_grades, scores, strict=True):
            answer_grade |= {'model': float(score), 'model_share': float(score > 0)}
    return rows, answer_grades


def load_data(run, split, tokenizer, length, reward, force):
    """A split of the dataset: prompts online, pairs or, for 'kto', single answers."""
    if online:
        data = load_prompt_data(run, dataset, split, tokenizer, length, max_new_tokens, seed, strict, val_fraction,
                                force)
        reward.check(data.rows_kept)
        return data
    data = prefs_of(dataset, split, tokenizer, length, seed, strict, val_fraction, run.print0, tools,
                    LabelledData if loss_type == 'kto' else PrefData, force=force)
    if data.labels.all() or not data.labels.any():
        raise UserError(f'{dataset}, {split}: every answer has the same label: give good and bad ones')
    return data


def held_out(model, net, reference, run, data):
    """The Answers of a split's fixed rows; None online."""
    if online:
        return None
    texts = data.texts(data.fixed(eval_rows))
    examples = [data.example(text) for text in texts]
    ref_logps = reference_logps(model, net, reference, run, examples, model.config.block_size)
    return Answers(examples, data.labels[texts], ref_logps)


def evaluate(model, net, reference, held, data, run, scorer, reward, force):
    """A policy on held-out answers, and its own answers to held-out prompts -> (metrics, summary, samples).

    model is sampled from, net (the model in DDP, FSDP or torch.compile) is called. reference: {name: tensor} of the
    trained parameters before training, see `Run.swapped_weights`; held: held-out Answers; None online, where they are
    pairs of the policy's own answers of now, by reward; force: what `forcing` gives.
    """
    block_size = model.config.block_size
    rows = data.fixed(eval_rows)
    if loss_type == 'kto':  # an answer is compared with that of the row, which should be a good one
        rows = rows[data.labels[rows]]

    # answers: sampled ones estimate the KL divergence to the reference, greedy ones are graded
    each = 2 if online else 1  # two make a pair
    sampled = generate_rollouts(model, data, rows, run, max_new_tokens, each, temperature=1.0, force=force)
    greedy = generate_rollouts(model, data, rows, run, max_new_tokens, temperature=0, force=force)
    # log-ratios of the sampled answers, whose mean estimates the KL divergence; those to one prompt are not independent
    kl = divergence(net, model, reference, run, sampled, block_size).sum(1).reshape(-1, each).mean(1)
    low, high = interval(kl.tolist())
    metrics = {'kl': float(kl.mean()), 'kl_low': low, 'kl_high': high, 'response_len': float(greedy.lengths.mean())}
    if online:
        totals, _ = reward(data, sampled)
        metrics['val/reward'] = float(totals[np.isfinite(totals)].mean()) if np.isfinite(totals).any() else math.nan
        examples, labels = examples_of(join_rollouts(pair_up(sampled, totals, len(rows))))
        if examples:  # there may be no pair
            held = Answers(examples, labels, reference_logps(model, net, reference, run, examples, block_size))
    if held:
        baseline = 0.0
        if loss_type == 'kto':
            baseline = kl_baseline(model, net, reference, run, held.examples, block_size)
        metrics |= answer_metrics(held, compute_all_logps(net, run, held.examples, block_size), baseline)
    rows, answer_grades = grade_answers(data, greedy, scorer)
    metrics |= outcomes(rows, answer_grades)
    means, ranges = summarise(answer_grades)
    if 'gold' in means:
        metrics['reward/gold_sampled'] = float(np.nanmean(gold_scores(data, sampled)))
    for name, mean in means.items():
        key = f'reward/{name}' if name in ('gold', 'model', 'model_share') else f'val/{name}'
        metrics |= {key: mean, f'{key}_low': ranges[name][0], f'{key}_high': ranges[name][1]}

    samples = list(map(format_answer, rows[:show_answers], map(data.transcript, greedy.ids), answer_grades))
    shown_means = {name: means[name] for name in means if name in ('gold', 'correct', 'f1', 'model_share')}
    summary = []
    if held:
        name, words = ('labels_met', 'labels met') if loss_type == 'kto' else ('accuracy', 'pairs ordered')
        hits, low, high = (metrics[f'val/{name}{end}'] for end in ('', '_low', '_high'))
        summary += [f'val loss {metrics["val/loss"]:.4f}', f'{words} {hits:.1%} ({low:.1%} to {high:.1%})',
                    f'margin {metrics["val/margin"]:.2f}',
                    f'log-probabilities {metrics["val/logp_chosen"]:.1f} and {metrics["val/logp_rejected"]:.1f}']
    if online:
        summary.append(f'sampled reward {metrics["val/reward"]:.3f}')
    summary.append(f'KL {metrics["kl"]:.2f} ({metrics["kl_low"]:.2f} to {metrics["kl_high"]:.2f})\n'
                   f'greedy answers: {format_metrics(shown_means, ranges)}')
    if scorer is not None:
        summary.append(f'reward {means["model"]:.2f}')
    if by_steps := accuracy_by(rows, answer_grades, 'steps'):
        summary[-1] += f'; correct by steps: {by_steps}'
    return metrics, ', '.join(summary), samples


# ----------------------------------------------------------------------------------------------------------------------

def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig and LoRAConfig: those are given
    config, given = runtime.configure(globals(), GPTConfig, LoRAConfig)
    if loss_type == 'kto_pair':
        raise UserError("loss_type='kto_pair' is now 'kto', which learns from single answers: it splits pairs itself")
    runtime.check_ranges(config, RANGES)
    if label_smoothing and loss_type not in ('sigmoid', 'simpo'):
        raise UserError(f"label_smoothing={label_smoothing} needs loss_type='sigmoid' or 'simpo', not {loss_type!r}")
    kind = 'prompts' if online else 'rows' if loss_type == 'kto' else 'pairs'  # what is learned from
    rows_per_step = gradient_accumulation_steps * batch_size
    if loss_type == 'kto' and (online or length_normalise):
        raise UserError("loss_type='kto' is of whole single answers: it goes without online and length_normalise")
    if loss_type == 'kto' and rows_per_step < 2:
        raise UserError("loss_type='kto' estimates the KL from answers to other prompts of the step: raise batch_size")
    if loss_type != 'kto' and (desirable_weight, undesirable_weight) != (1.0, 1.0):
        raise UserError(f"desirable_weight and undesirable_weight need loss_type='kto', not {loss_type!r}")
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # model
    resume_from = run.find_checkpoint(init_from, writes=not eval_only)
    # the base's dropout is not taken on; a resumed run keeps its own
    start = load_to_train('dpo', init_from.removeprefix('auto:'), resume_from,
                          given if resume_from else {'dropout': 0.0, 'lora_dropout': 0.0} | given, seed)
    model, tokenizer = start.model, start.tokenizer
    length = start.row_length(max_length)
    if max_new_tokens >= model.config.block_size:
        raise UserError(f'max_new_tokens={max_new_tokens} must be < block_size={model.config.block_size}, which needs '
                        'room for the prompt: lower it')
    reward = Rewards(rewards, tokenizer, run, max_new_tokens, reward_model, max_bad_rewards) if online else None
    scorer = reward.scorer if online else load_scorer(reward_model, run) if reward_model else None
    force = forcing(tokenizer, tools, 0, max_tool_calls)  # with tools, inserts the results of calls into the answers
    if not is_file_of_rows(dataset):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    if eval_only:
        initial = start.initial_weights()  # {} where no run of this stage has trained it: it is its own reference
        net = run.wrap(model, compile)
        data = load_data(run, eval_split, tokenizer, length, reward, force)
        reference = {name: run.like(p, initial[name]) for name, p in model.named_parameters() if name in initial}
        held = held_out(model, net, reference, run, data)
        _, summary, samples = evaluate(model, net, reference, held, data, run, scorer, reward, force)
        run.print0(f'{init_from} on {len(data.fixed(eval_rows)):,} {kind} of {dataset}, {eval_split}: {summary}')
        run.print0('\n'.join(samples))
        return

    # data
    train_data, val_data = (load_data(run, split, tokenizer, length, reward, force) for split in ('train', 'val'))
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(model.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum, lora_lr_ratio)

    # the reference: the policy before its first step. Only the trained parameters are kept twice, with LoRA the small
    # matrices alone; for a forward pass of the reference they are swapped with the model's
    reference = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ref_logps = torch.full((len(train_data.targets_in),), math.nan, dtype=torch.float64)  # of texts; nan: not computed
    ref_texts = train_data.fingerprint()

    # resume
    step, rows_seen, clock = 0, 0, runtime.Clock()
    if resume_from:
        checkpoint = start.checkpoint
        run.resume(checkpoint, start.origin, optimizers, config)
        if kind not in checkpoint:
            raise UserError(f'{start.origin} has not been trained on {kind}: resume with its own online and loss_type')
        step, rows_seen, clock = checkpoint['iter'], checkpoint[kind], runtime.Clock(checkpoint['seconds'])
        if online:
            reward.failed = checkpoint['failed']
        for name, tensor in reference.items():
            tensor.copy_(run.like(tensor, checkpoint['reference'][name]))
        if checkpoint['ref_texts'] == ref_texts:  # else the data have changed, and all are computed again
            ref_logps = checkpoint['ref_logps']
        checkpoint = start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * rows_per_step / train_data.n_rows
    run.announce(
        f'{dataset}: {train_data.n_rows:,} {kind} to train on, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {rows_per_step} {kind}: {epochs:.2f} epochs')

    # the reference never changes: its log-probabilities of given answers are computed once, of the held-out ones and of
    # all that this run trains on; for 'simpo' and 'orpo' the latter stay nan and are not read
    held = held_out(model, net, reference, run, val_data)
    clock.start()
    if not online and loss_type not in REFERENCE_FREE:
        texts = train_data.texts(np.unique(train_data.rows(0, max_iters * rows_per_step)))
        texts = texts[torch.isnan(ref_logps[texts]).numpy()]
        if len(texts):
            examples = [train_data.example(text) for text in texts]
            ref_logps[texts] = torch.from_numpy(reference_logps(model, net, reference, run, examples, length))
            run.print0(f'log-probabilities of {len(texts):,} answers under the reference, {clock.read():.1f} s')
    warmed_up = not run.ddp
    warned = False
    # speed and means of metrics, from one row of the log to the next
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(length))
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate(model, net, reference, held, val_data, run, scorer, reward, force)
            run.log(metrics | {'iter': step, 'seconds': clock.read()})
            run.print0(f'step {step}, {clock.read():.1f} s of training: {summary}')
            run.sample(step, '\n'.join(samples))
            score, last_eval = -metrics['val/reward'] if online else metrics['val/loss'], step
        stop = run.stop_signal()
        if evaluating or (stop and step > last_eval):
            clock.stop()
            run.save_checkpoint(start.model_state() | {'iter': step, kind: rows_seen, 'seconds': clock.read()},
                                optimizers, score, keep_checkpoints,
                                {'reference': reference, 'ref_logps': ref_logps, 'ref_texts': ref_texts,
                                 'failed': reward.failed if online else 0})
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # the answers of this step, of all processes; rows_seen is a function of the steps before: a resumed run repeats
        # no row
        first = rows_seen
        if online:
            pairs, metrics, rows_seen = generate_pairs(model, train_data, first, step, run, reward, force)
            meter.add(**metrics)
            if len(pairs) // 2 < gradient_accumulation_steps:  # a micro-batch would have no pair: no update
                if not warned:
                    run.print0(f'step {step}: {len(pairs) // 2} of {rows_per_step} prompts have answers of different '
                               'rewards: steps without a pair for each micro-batch update nothing')
                warned = True
                step += 1
                continue
            examples, labels = examples_of(pairs)
            ref = np.full(len(examples), np.nan)
            if loss_type not in REFERENCE_FREE:
                ref = reference_logps(model, net, reference, run, examples, length)
            batch = Answers(examples, labels, ref)
        else:
            texts = train_data.texts(train_data.rows(first, rows_per_step))
            rows_seen += rows_per_step
            batch = Answers([train_data.example(text) for text in texts], train_data.labels[texts],
                            ref_logps[texts].numpy())
        # the baseline is that of all answers of the step: it does not depend on how they are cut into micro-batches
        kl = kl_baseline(model, net, reference, run, batch.examples, length) if loss_type == 'kto' else 0.0
        # places of the answers, a column for each row: the two of a pair, or a single one; some columns a micro-batch
        places = np.arange(len(batch.examples)).reshape(1 if loss_type == 'kto' else 2, -1)
        n_rows = places.shape[1]
        parts = np.array_split(places, gradient_accumulation_steps, axis=1)
        if not warmed_up:
            # DDP fixes the order in which it sums gradients at its first backward pass: one that is discarded makes
            # that order the same for a new and a resumed run
            run.seed_dropout(first)
            run.warm_up_ddp(net, compute_logps(net, run, batch.examples[:2], length).mean())
            warmed_up = True

        # the learning rate of this step
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # forward and backward, over this process's micro-batches
        step_loss = 0.0
        for number in run.micro_batches(net, gradient_accumulation_steps):
            # one forward pass for both answers of a pair: half the calls, and one backward pass per micro-batch, as
            # DDP needs
            part = parts[number].flatten()
            run.seed_dropout(first + number * batch_size)  # the position in the data decides, not what ran before
            logps = compute_logps(net, run, [batch.examples[i] for i in part], length)
            ref, n_tokens, labels = run.to_device(*(x[part].astype(np.float32) for x in (
                batch.ref_logps, batch.n_tokens, batch.labels)))
            losses, margins = losses_of(logps, ref, n_tokens, labels, kl)
            loss = losses.sum() * gradient_accumulation_steps / n_rows  # so that the step has the mean over its rows
            # the routers of a mixture of experts have a loss of their own, which balances their load
            run.backward((loss + model.router_loss()) / micro_steps)
            step_loss += loss.detach() / micro_steps
            meter.add(sum(len(batch.examples[i][0]) for i in part),
                      **{'train/accuracy': (torch.sign(margins).mean() + 1) / 2, 'train/margin': margins.mean()})
            if loss_type == 'kto':
                meter.add(**{'train/kl': kl})
            else:  # of single answers a micro-batch may have none that are bad
                chosen, rejected = logps.detach().chunk(2)
                meter.add(**{'train/logp_chosen': chosen.mean(), 'train/logp_rejected': rejected.mean()})

        # clip and update; a gradient that is not finite skips the update, which the device decides: the host need not
        # wait (float16: clip_grad_norm unscales the gradients)
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        run.skip_if_not_finite(optimizers, grad_norm)
        optimizers.step()
        optimizers.zero_grad()
        step += 1

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    best = f'held-out reward {-run.best:.4f}' if online else f'validation loss {run.best:.4f}'
    run.print0(f'done: best {best}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True{f" --tools={tools}" if tools else ""}')


if __name__ == '__main__':
    runtime.cli(main)
