"""
Group relative policy optimisation (GRPO): a model learns from rewards of its own answers, each compared with the other
answers to the same prompt.

    python grpo.py config/grpo_tiny.py                             word problems, from the model of config/sft_mixed.py
    python grpo.py config/grpo_tiny.py --rewards=model --reward_model=out/reward    a reward model instead of a grader
    python grpo.py config/grpo_tiny.py --rewards="correct, 0.5*mine.py:politeness"      a function of yours
    python grpo.py config/grpo_smollm2.py                          SmolLM2-135M learns with LoRA
    torchrun --standalone --nproc_per_node=2 grpo.py config/grpo_tiny.py

One training step, in `main`:

    rollout     num_generations answers (the papers' outputs or completions) are sampled to each of prompts_per_step
                prompts; the answers to one prompt are a group
    rewards     each answer gets a number, the sum that `rewards` names (see rollout.py); reward/gold, the true quality
                of answers to word problems, is logged but part of no reward
    advantage   an answer's reward minus the mean of its group, over the group's standard deviation; the same for all
                tokens of the answer, it replaces the critic of PPO
    updates     num_epochs passes over the answers: the loss clips the ratio of new to old probabilities, as PPO does,
                and contains the KL to the model that the run began with. Weights (tis_cap) correct for what is
                between that old policy and the sampler: rounding, rollout_quant, or the steps of rollout_lag

loss_type sets only how the ratio enters the loss, where it is clipped, and what the sum over tokens is divided by. The
papers' full recipes:

    Dr. GRPO                --loss_type=dr_grpo --scale_rewards=none --kl_coef=0
    DAPO                    --loss_type=dapo --scale_rewards=group --kl_coef=0 --dynamic_sampling=4 --overlong_buffer=32
    GSPO                    --loss_type=gspo --scale_rewards=group --kl_coef=0
    CISPO                   --loss_type=cispo --scale_rewards=group --kl_coef=0
    RLOO                    --baseline=leave_one_out --scale_rewards=none --loss_type=dr_grpo
    REINFORCE++             --baseline=batch --scale_rewards=batch --loss_type=dapo
    REINFORCE++-baseline    --baseline=group --scale_rewards=advantages --loss_type=dapo

(RLOO and REINFORCE++ have the KL in the reward; here it is in the loss.)

Papers: DeepSeekMath's GRPO (arXiv:2402.03300), the k3 estimator of KL (Schulman 2020), Dr. GRPO (arXiv:2503.20783),
DAPO (arXiv:2503.14476), CISPO (MiniMax-M1, arXiv:2506.13585, its bound from ScaleRL, arXiv:2510.13786), GSPO
(arXiv:2507.18071), RLOO (arXiv:2402.14740), REINFORCE++ (arXiv:2501.03262), INTELLECT-2 (arXiv:2505.07291), PPO's clip
(arXiv:1707.06347), asynchronous training (arXiv:2410.18252).
"""
import math
from typing import NamedTuple

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch

from dataset import find_dataset
from load import load_to_train
from lora import LoRAConfig
from model import GPTConfig
from optim import lr_factor, make_optimizers
from rollout import (
    SAMPLERS,
    SHARED_ROW,
    Rewards,
    Rollout,
    compute_all_logprobs,
    compute_logprobs,
    evaluate_policy,
    forcing,
    generate_rollouts,
    gold_scores,
    importance_weights,
    join_rollouts,
    kl_terms,
    load_prompt_data,
    make_sampler,
    to_batch,
)
from rows import is_file_of_rows
from tokenizer import UserError

# where and what
out_dir = 'out/grpo'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'resume'; 'auto:MODEL': resume if out_dir has a run
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, new weights and samples
strict = True  # stop at a malformed row; False: skip and count it
# rewards
rewards = 'correct'  # a weighted sum: 'correct, 0.2*format, -0.1*length, model, FILE.py:function', see rollout.py
reward_model = ''  # directory of a run of reward.py: for 'model' in rewards, and only then
max_bad_rewards = 20  # stop once more rewards than this have failed
overlong_buffer = 0  # DAPO's L_cache: the reward falls, by up to 1, in this many tokens before max_new_tokens; 0 = off
# answers
prompts_per_step = 32  # prompts per step
num_generations = 8  # answers to each prompt: the group size G; 1 is enough for baseline='batch'
max_new_tokens = 128  # maximum length of an answer, in tokens
tools: bool | str = False  # True: the calculator answers <tool>…</tool>; FILE.py: functions; results are not learned
max_tool_calls = 8  # rounds of calls of functions in an answer, after which its turn ends for good
max_think_tokens = 0  # close <think> after this many tokens; that </think> is masked out of the loss; 0 = no limit
temperature = 1.0  # of sampling; the log-probabilities in the loss are computed at it, too
mask_truncated = False  # True: answers that max_new_tokens has cut off are masked out of the loss
dynamic_sampling = 0  # DAPO: up to this many times a step, replace groups of equal rewards by new prompts; 0 = off
rollout_quant = ''  # the sampler's weights: 'int8' or 'fp16' (as quant in sample.py), 'bfloat16', 'float32'; '' = auto
rollout_lag = 0  # answers are drawn with the weights of this many steps ago, as asynchronous trainers do; 0 = of now
# loss
loss_type = 'grpo'  # 'grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo' or 'gspo'
baseline = 'group'  # subtracted from a reward: the mean of its 'group', of 'leave_one_out' (RLOO), or of the 'batch'
scale_rewards = 'group'  # what divides advantages: std of the 'group's or 'batch's rewards, of all 'advantages'; 'none'
clip_eps = 0.0  # lower end of the ratio's clip: 1 - clip_eps; 0 = the loss's own, see LOSSES; 'cispo' has none
clip_eps_high = 0.0  # upper end of the ratio's clip: 1 + clip_eps_high; 0 = clip_eps where a loss has one for both ends
delta = 0.0  # INTELLECT-2: bounds the ratio where the advantage is negative, which the clip does not; 0 = no bound
tis_cap = 2.0  # truncated importance sampling: weight min(old policy / sampler, tis_cap) of a loss; 0 = no weights
tis_level = 'token'  # these weights are of each 'token', or of a whole answer: 'sequence'
kl_coef = 0.04  # beta: weight of KL(policy || reference) in the loss, k3 per token; 0 = no reference model
entropy_coef = 0.0  # weight of the entropy bonus, per token
# batches
batch_size = 64  # answers per micro-batch
gradient_accumulation_steps = 4  # micro-batches per update, over all processes together
num_epochs = 1  # passes over the answers of a step: GRPO's mu
max_iters = 100  # steps; each samples prompts_per_step * num_generations answers and is trained on them
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 1e-4  # peak learning rate of AdamW
embed_lr = 0.0  # peak learning rate of the token embedding; 0 = learning_rate
lora_lr_ratio = 1.0  # LoRA+: learning rate of LoRA's B over that of A; 16 is usual
muon_lr = 0.002  # peak learning rate of Muon
muon_momentum = 0.95  # Nesterov momentum of Muon
weight_decay = 0.0  # applied to matrices only
beta1 = 0.9  # AdamW: decay rate of the first moment
beta2 = 0.99  # AdamW: decay rate of the second moment
grad_clip = 1.0  # maximum gradient norm; 0 = no clipping
# schedule
lr_schedule = 'constant'  # after the warmup: 'cosine', 'linear', 'wsd' (constant, then linear) or 'constant'
warmup_iters = 5  # steps of linear warmup
lr_decay_iters = 0  # step at which the learning rate reaches min_lr; 0 = max_iters
min_lr = 0.0  # final learning rate; every group decays by the same factor
decay_frac = 0.5  # 'wsd': fraction of lr_decay_iters that the final decay takes
# evaluation and logging
eval_interval = 25  # steps between evaluations, each with answers and a checkpoint
eval_rows = 256  # held-out prompts per evaluation, always the same; 0 = all
eval_only = False  # evaluate init_from and exit, without training
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test', 'train', or 'unseen' (see data/wordproblems)
show_answers = 3  # answers printed at each evaluation
log_interval = 1  # steps between lines of the log
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

# Losses with the clip of their papers: (clip_eps, clip_eps_high). 'bnpo' and 'dapo' are the same mean over tokens; TRL
# takes it over a micro-batch for its 'bnpo' and over the full update for 'dapo', which is right and done here for both
LOSSES = {'grpo': (0.2, 0.2), 'bnpo': (0.2, 0.2), 'dr_grpo': (0.2, 0.2), 'dapo': (0.2, 0.28), 'cispo': (math.inf, 4.0),
          'gspo': (3e-4, 4e-4)}
# Losses whose value and gradient stay the same when answers with advantage 0 are skipped: all of these, which divide by
# the update's number of answers or tokens. One of yours that divides by the micro-batch's does not belong here.
SKIPS_ZERO_ADVANTAGE = ('grpo', 'bnpo', 'dr_grpo', 'dapo', 'cispo', 'gspo')

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    'val_fraction': '> 0 and < 1', 'temperature': '> 0',
    **dict.fromkeys(('prompts_per_step', 'num_generations', 'max_new_tokens', 'num_epochs'), '>= 1'),
    **dict.fromkeys(('dynamic_sampling', 'rollout_lag', 'clip_eps', 'clip_eps_high', 'delta', 'tis_cap', 'kl_coef',
                     'overlong_buffer', 'max_bad_rewards', 'max_think_tokens', 'max_tool_calls', 'eval_rows',
                     'show_answers'), '>= 0'),
    'rollout_quant': tuple(SAMPLERS), 'loss_type': tuple(LOSSES), 'baseline': ('group', 'leave_one_out', 'batch'),
    'scale_rewards': ('group', 'batch', 'advantages', 'none'), 'tis_level': ('token', 'sequence'),
    'eval_split': ('val', 'test', 'unseen', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths. Shapes: P prompts, G answers to each; B answers of a micro-batch, the longest of A tokens

def group_advantages(totals, scale='group', baseline='group'):
    """Rewards (P, G), nan where there is none -> advantages (P, G), 0 there.

    A reward minus a baseline: 'group', the mean of its group (arXiv:2402.03300, 4.1.2); 'leave_one_out', the mean of
    the others in its group (RLOO, arXiv:2402.14740); 'batch', the mean of all, which then are one group (REINFORCE++,
    arXiv:2501.03262). Divided by a standard deviation plus 1e-4: of the rewards of the 'group', of the rewards of the
    'batch', of all 'advantages' (REINFORCE++-baseline), or by nothing ('none', arXiv:2503.20783). Variances have n - 1
    in their denominators; of one number the standard deviation is 0.
    """
    groups = totals.reshape(1, -1) if baseline == 'batch' else totals
    valid = torch.isfinite(groups)
    values = groups.nan_to_num(0.0) * valid
    n = valid.sum(1, keepdim=True)
    means = values.sum(1, keepdim=True) / n.clamp(min=1)
    # of equal rewards the mean may round to another number, and Adam would make a full step of the difference
    centred = (values - means) * valid * has_spread(groups)[:, None]
    advantages = centred
    if baseline == 'leave_one_out':  # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        advantages = centred * n / (n - 1).clamp(min=1)
    if scale == 'group':
        advantages = advantages / ((centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + 1e-4)
    elif scale != 'none' and valid.sum() > 1:
        advantages = advantages / ((values if scale == 'batch' else advantages)[valid].std() + 1e-4)
    return advantages.view_as(totals)


def has_spread(totals):
    """Which groups of rewards (P, G) hold two different ones, bool (P,): the others' advantages are 0."""
    invalid = ~torch.isfinite(totals)
    return totals.masked_fill(invalid, -math.inf).amax(1) > totals.masked_fill(invalid, math.inf).amin(1)


def overlong(lengths, longest, buffer):
    """DAPO's penalty for long answers (arXiv:2503.14476, eq. 13): 0 up to longest - buffer tokens, then down to -1."""
    return -((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, loss_type='grpo', clip_eps=0.2, clip_eps_high=0.2,
              kl_coef=0.0, entropies=None, entropy_coef=0.0, longest=1, tokens=None, n_answers=None, delta=math.inf,
              weights=1.0):
    """The loss of a micro-batch -> (loss, {'clip_frac': how many tokens' ratios are clipped, 'kl': the sum of k3}).

    logprobs (B, A): of the answers' tokens under the policy
    old_logprobs (B, A): under the policy before the step's first update
    ref_logprobs (B, A): under the reference, or None
    advantages (B,): of the answers
    mask (B, A): 1 on the tokens that count
    entropies (B, A): of the policy before each token, for entropy_coef
    longest: max_new_tokens, for 'dr_grpo'
    tokens: tokens that count in the full update, per micro-batch, for 'bnpo', 'dapo' and 'cispo'; None = of this one
    n_answers: answers of the micro-batch before some were skipped; None = B
    delta: upper bound of the ratio where the advantage is negative (arXiv:2505.07291), above 1 + clip_eps_high
    weights (B, A) or (B, 1): of the tokens' or answers' losses, see `rollout.importance_weights`
    """
    n_answers = n_answers or len(logprobs)
    log_ratio = (logprobs - old_logprobs) * mask
    if loss_type == 'gspo':  # one ratio per answer, the geometric mean of its tokens' ratios, as there is one reward
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    low, high = 1 - clip_eps, 1 + clip_eps_high
    if loss_type == 'cispo':
        # REINFORCE weighted by the ratio: -min(r, high) A log p, with no gradient through r. It is clipped above only,
        # and tokens that are clipped keep their gradient
        losses = -ratio.clamp(max=high).detach() * advantages * logprobs
        clipped = (ratio > high) & (advantages != 0)
    else:
        # PPO's clipped surrogate: -min(r A, clip(r, low, high) A). It bounds r on one side for each sign of A; delta
        # also bounds it above where A < 0, where a token that has become likely could grow the loss without limit
        losses = -torch.minimum(ratio.clamp(max=delta) * advantages, ratio.clamp(low, high) * advantages)
        clipped = ((ratio > high) & (advantages > 0)) | (((ratio < low) | (ratio > delta)) & (advantages < 0))
    losses = (losses * weights).expand_as(mask)
    stats = {'clip_frac': (clipped * mask).sum()}
    if ref_logprobs is not None:  # the KL is part of the loss here, of the reward in PPO
        k3 = kl_terms(logprobs * mask, ref_logprobs * mask, 'k3')  # off the mask exp could give inf, and inf * 0 nan
        losses = losses + kl_coef * k3
        stats['kl'] = (k3.detach() * mask).sum()
    if entropy_coef:
        losses = losses - entropy_coef * entropies
    losses = losses * mask
    if loss_type in ('grpo', 'gspo'):  # the mean over each answer, then over answers: tokens of long ones count less
        loss = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / n_answers
    elif loss_type == 'dr_grpo':  # a constant: every token counts the same, however long its answer is
        loss = losses.sum() / (n_answers * longest)
    else:  # 'bnpo', 'dapo', 'cispo': the tokens of the full update, so that it does not matter how it is cut
        loss = losses.sum() / (mask.sum().clamp(min=1) if tokens is None else tokens)
    return loss, stats


# ----------------------------------------------------------------------------------------------------------------------

class Groups(NamedTuple):
    """The answers of a step, those to one prompt side by side, with their rewards."""
    answers: Rollout  # P * G answers
    totals: torch.Tensor  # (P, G): their rewards, float64, nan where one failed
    terms: dict  # {name: tensor (P * G,)}: the terms of the rewards before their weights
    zero_spread: float  # fraction of the groups sampled first whose rewards are all equal
    prompts_seen: int  # prompts that the run has taken from the data
    policy_step: int  # the step before whose updates the answers were drawn

    def state(self):
        """As a dict that a checkpoint can hold."""
        return self._asdict() | {'answers': self.answers.state()}


def generate_groups(model, data, prompts_seen, step, policy_step, run, reward, force):
    """Samples num_generations answers to each of the next prompts_per_step prompts and rewards them -> Groups.

    step: the one that learns from them; policy_step: the present one, before whose updates they are drawn.
    With dynamic_sampling, groups whose rewards are all equal are replaced by groups of the prompts that follow.
    """
    parts, totals, terms = [], [], []
    missing = prompts_per_step
    for attempt in range(dynamic_sampling + 1):
        sample_seed = 1 + step * (dynamic_sampling + 1) + attempt  # evaluations have 0
        rows = data.rows(prompts_seen, missing)  # of an endless sequence, shuffled anew in each epoch
        prompts_seen += missing
        answers = generate_rollouts(model, data, rows, run, max_new_tokens, num_generations, temperature, sample_seed,
                                    force=force, quant=rollout_quant)
        answer_totals, answer_terms = reward(data, answers)
        if overlong_buffer:
            penalty = overlong(torch.from_numpy(answers.lengths), max_new_tokens, overlong_buffer)
            answer_totals = answer_totals + penalty.numpy()
        group_totals = torch.from_numpy(answer_totals).view(missing, num_generations)

        # this looks at the full reward, length terms and overlong penalty included; DAPO's filter at accuracy alone
        keep = has_spread(group_totals)
        if attempt == 0:
            zero_spread = 1 - keep.double().mean().item()
        if attempt == dynamic_sampling:  # the last attempt keeps all
            keep = torch.ones_like(keep)
        indices = np.flatnonzero(np.repeat(keep.numpy(), num_generations))
        parts.append(answers.take(indices))
        totals.append(group_totals[keep])
        terms.append({name: values[indices] for name, values in answer_terms.items()})
        missing -= int(keep.sum())
        if missing == 0:
            break
    terms = {name: torch.from_numpy(np.concatenate([part[name] for part in terms])) for name in terms[0]}
    return Groups(join_rollouts(parts), torch.cat(totals), terms, zero_spread, prompts_seen, policy_step)


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig and LoRAConfig: those are given
    config, given = runtime.configure(globals(), GPTConfig, LoRAConfig)
    runtime.check_ranges(config, RANGES)
    if overlong_buffer > max_new_tokens:
        raise UserError(f'overlong_buffer={overlong_buffer} must be <= max_new_tokens={max_new_tokens}')
    if given.get('dropout') or given.get('lora_dropout'):
        raise UserError('dropout and lora_dropout must be 0: their noise would show up in the probability ratios')
    if num_generations == 1 and (baseline != 'batch' or dynamic_sampling):
        raise UserError(f'num_generations=1 must be >= 2: baseline={baseline!r} and dynamic_sampling='
                        f"{dynamic_sampling} compare answers to one prompt (only baseline='batch' does not)")
    eps_low, eps_high = LOSSES[loss_type]
    if clip_eps and loss_type == 'cispo':
        raise UserError(f"clip_eps={clip_eps}: loss_type='cispo' has no lower end: drop --clip_eps; its upper one is "
                        '--clip_eps_high')
    if clip_eps and not clip_eps_high and eps_low != eps_high:
        raise UserError(f'clip_eps={clip_eps}: loss_type={loss_type!r} has another upper end, {eps_high:g}: give '
                        '--clip_eps_high, too')
    eps_low, eps_high = clip_eps or eps_low, clip_eps_high or clip_eps or eps_high
    if delta and loss_type == 'cispo':
        raise UserError(f"delta={delta}: loss_type='cispo' bounds the ratio above for any advantage: drop --delta")
    if 0 < delta <= 1 + eps_high:
        raise UserError(f'delta={delta} must be > {1 + eps_high:g}, where the clip of loss_type={loss_type!r} ends')
    n_answers = prompts_per_step * num_generations
    answers_per_update = batch_size * gradient_accumulation_steps
    if n_answers % answers_per_update:
        raise UserError(f'prompts_per_step * num_generations = {n_answers} answers must be a multiple of batch_size * '
                        f'gradient_accumulation_steps = {answers_per_update}: change one of them')
    updates_per_step = n_answers // answers_per_update * num_epochs
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # model and rewards
    resume_from = run.find_checkpoint(init_from, writes=not eval_only)
    start = load_to_train('grpo', init_from.removeprefix('auto:'), resume_from,
                          given | {'dropout': 0.0, 'lora_dropout': 0.0}, seed)
    model, tokenizer = start.model, start.tokenizer
    block_size = model.config.block_size
    if rollout_quant:
        with runtime.user_errors('rollout_quant'):
            make_sampler(model, run, rollout_quant)  # what cannot be ends here, before anything is written
    force = forcing(tokenizer, tools, max_think_tokens, max_tool_calls)  # inserts results of tools and </think>
    reward = Rewards(rewards, tokenizer, run, max_new_tokens, reward_model, max_bad_rewards)

    # data
    if not is_file_of_rows(dataset):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    splits = {split: load_prompt_data(run, dataset, split, tokenizer, block_size, max_new_tokens, seed, strict,
                                      val_fraction, force)
              for split in ((eval_split,) if eval_only else ('train', 'val'))}
    for data in splits.values():
        reward.check(data.rows_kept)
    if eval_only:
        net = run.wrap(model, compile)
        data = splits[eval_split]
        # the reference is the model that init_from was trained from; None where init_from is no run of this stage
        before = start.initial_weights()
        reference = {name: run.like(p, before[name]) for name, p in model.named_parameters() if name in before} or None
        _, summary, samples = evaluate_policy(net, model, reference, data, run, reward, data.fixed(eval_rows),
                                              max_new_tokens, temperature, force)
        run.print0(f'{init_from} on {len(data.fixed(eval_rows)):,} prompts of {dataset}, {eval_split}: {summary}')
        return run.print0('\n'.join(samples[:show_answers]))

    # optimizers and reference
    train_data, val_data = splits['train'], splits['val']
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(model.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum, lora_lr_ratio)
    # The reference policy is a copy of the trained parameters only, as they are before the first step;
    # run.swapped_weights exchanges it with the model's for a forward pass.
    reference = None
    if kl_coef:
        reference = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    # resume
    step = prompts_seen = 0
    queue = []  # Groups that are drawn and not learned from yet, of the next rollout_lag steps
    clock = runtime.Clock()
    if resume_from:
        checkpoint = start.checkpoint
        run.resume(checkpoint, start.origin, optimizers, config)
        step = checkpoint['iter']
        prompts_seen = checkpoint['prompts']
        clock = runtime.Clock(checkpoint['seconds'])
        reward.failed = checkpoint['failed']
        queue = [Groups(**state | {'answers': Rollout.from_state(state['answers'])})
                 for state in checkpoint.get('queue', ())]
        if any(groups.totals.shape != (prompts_per_step, num_generations) for groups in queue):
            raise UserError(f'{start.origin} holds answers for its next steps (rollout_lag), not {num_generations} to '
                            f'{prompts_per_step} prompts: resume with its prompts_per_step and num_generations')
        if reference is not None and checkpoint['reference'] is None:
            raise UserError(f'{start.origin} was trained with kl_coef=0 and holds no reference: resume with kl_coef=0')
        for name, tensor in (reference or {}).items():
            tensor.copy_(run.like(tensor, checkpoint['reference'][name]))
        checkpoint = start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * prompts_per_step / train_data.n_rows
    run.announce(
        f'{dataset}: {train_data.n_rows:,} training prompts, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'{max_iters:,} steps of {prompts_per_step} prompts, {num_generations} answers to each and '
        f'{updates_per_step} update{"s" * (updates_per_step > 1)}: {epochs:.2f} epochs of the data')
    if updates_per_step == 1:
        run.print0('a single update per step: the ratio is always 1, and clip_eps, clip_eps_high and delta never act '
                   '(more updates: lower batch_size or gradient_accumulation_steps, or raise num_epochs)')
    else:
        run.print0(f'{loss_type}: the ratio is clipped to {1 - eps_low:g} … {1 + eps_high:g}')

    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(min(block_size, SHARED_ROW)))
    warmed_up = not run.ddp
    warned = False
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # the lowest is saved as best.pt; this one, without an evaluation, never is
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate_policy(net, model, reference, val_data, run, reward,
                                                        val_data.fixed(eval_rows), max_new_tokens, temperature, force)
            run.log(metrics | {'iter': step, 'seconds': clock.read()})
            run.print0(f'step {step}, {clock.read():.1f} s of training: {summary}')
            run.sample(step, '\n'.join(samples[:show_answers]))
            score = -metrics.get('val/reward', -math.inf)  # minus the reward, because the lowest is the best
            last_eval = step
        stop = run.stop_signal()
        if evaluating or (stop and step > last_eval):
            clock.stop()
            run.save_checkpoint(start.model_state() | {'iter': step, 'prompts': prompts_seen, 'seconds': clock.read()},
                                optimizers, score, keep_checkpoints,
                                {'reference': reference, 'failed': reward.failed,
                                 'queue': [groups.state() for groups in queue]})
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # rollouts: a group of answers to each prompt, and their rewards. With rollout_lag those of a later step are
        # drawn before this step's updates. An asynchronous trainer draws them meanwhile, on other devices; here one
        # thing comes after the other, so that a run can be repeated: it shows what such answers teach, saves no time
        while len(queue) <= rollout_lag:
            rollout_start = clock.read()
            groups = generate_groups(model, train_data, prompts_seen, step + len(queue), step, run, reward, force)
            prompts_seen = groups.prompts_seen
            meter.add(**{'rollout/tok_per_sec': groups.answers.lengths.sum() / (clock.read() - rollout_start)})
            queue.append(groups)
        groups = queue.pop(0)
        answers = groups.answers
        totals = groups.totals.numpy()
        advantages = group_advantages(groups.totals, scale_rewards, baseline).flatten().numpy()

        # answers.response_mask excludes padding and forced tokens (tool results, </think>). The loss also excludes
        # answers whose reward failed (nan) and, with mask_truncated, those that were cut off
        loss_mask = answers.response_mask * np.isfinite(totals).reshape(-1, 1)
        if mask_truncated:
            loss_mask = loss_mask * answers.ended[:, None]

        # The ratio compares with the policy before the first update of the step. Its log-probabilities are computed
        # again, because the sampler differs: with its own the ratio would not start at 1, and the clip would cut what
        # no update has done; the weights of tis_cap account for that. With a single update per step the pass is
        # unnecessary: the old log-probabilities are the new ones, detached
        old_logprobs = ref_logprobs = None
        if updates_per_step > 1:
            old_logprobs = compute_all_logprobs(net, run, answers, block_size, temperature, entropies=False)[0]
        if reference is not None:
            with run.swapped_weights(model, reference):
                ref_logprobs = compute_all_logprobs(net, run, answers, block_size, temperature, entropies=False)[0]

        if not advantages.any() and not warned:
            run.print0(f'step {step}: all answers to each prompt have equal rewards: there is nothing to learn from '
                       'until some differ (zero_spread)')
            warned = True
        # logged: the answers kept after dynamic sampling. reward/mean and reward/std include the overlong penalty;
        # rollout/tok_per_sec is over the seconds of all attempts, with the computation of rewards
        gold = gold_scores(train_data, answers)
        if np.isfinite(totals).any():
            meter.add(**{'reward/mean': np.nanmean(totals), 'reward/std': np.nanstd(totals)})
            meter.add(**{f'reward/{name}': values.nanmean() for name, values in groups.terms.items()})
        if np.isfinite(gold).any():
            meter.add(**{'reward/gold': np.nanmean(gold)})
        meter.add(response_len=answers.lengths.mean(), ended=answers.ended.mean(), zero_spread=groups.zero_spread,
                  **{'rollout/staleness': step - groups.policy_step})  # in steps
        # the entropy of the distributions that tokens were sampled from. It is the sampler's: answers without an
        # advantage get no forward pass below, and a mean over the others would be of the difficult prompts alone
        meter.add(weight=answers.response_mask.sum(), entropy=answers.entropies[answers.response_mask].mean())

        # the learning rate of this step, for all its updates
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # An answer with advantage 0 or without a token in the loss cannot change the gradient: its forward pass is
        # skipped. KL and entropy act on every answer, so with either none is skipped. What is logged of the sampler
        # (rollout/gap, rollout/weight) and tok_per_sec then describe only the answers that are left
        active = (advantages != 0) & loss_mask.any(1)
        if kl_coef or entropy_coef or loss_type not in SKIPS_ZERO_ADVANTAGE:
            active[:] = True
        if not warmed_up:
            # DDP fixes the order in which it sums gradients at its first backward pass: a discarded one makes that
            # order the same for a new and a resumed run
            logprobs = compute_logprobs(net, run, answers, range(batch_size), block_size, temperature)[0]
            run.warm_up_ddp(net, logprobs.mean())
            warmed_up = True
        group_sizes = answers.group_sizes
        for epoch in range(num_epochs):
            order = np.random.default_rng([seed, step, epoch]).permutation(prompts_per_step)
            order = (order[:, None] * num_generations + np.arange(num_generations)).flatten()  # groups stay together
            for first in range(0, n_answers, answers_per_update):
                in_update = order[first:first + answers_per_update]
                used = in_update[active[in_update]]
                if len(used) < gradient_accumulation_steps:  # every micro-batch needs an answer
                    used = in_update
                # by length, for little padding; group_sizes is equal within a group, so that a stable sort keeps its
                # answers together, which share the forward pass over their prompt
                used = used[np.argsort(group_sizes[used], kind='stable')]
                micro_batches = np.array_split(used, gradient_accumulation_steps)
                # denominators are those of the full update: they count the skipped answers, too
                tokens_per_micro_batch = max(1, loss_mask[in_update].sum()) / gradient_accumulation_steps

                # forward and backward, over this process's micro-batches
                step_loss = 0.0
                for number in run.micro_batches(net, gradient_accumulation_steps):
                    part = micro_batches[number]
                    logprobs, entropies, _ = compute_logprobs(net, run, answers, part, block_size, temperature,
                                                              entropies=entropy_coef != 0)
                    width = logprobs.shape[1]  # tokens of the longest answer of this part
                    mask, sampled, advantage = to_batch(run, part, width, loss_mask, answers.logprobs, advantages)
                    old, ref = to_batch(run, part, width, old_logprobs, ref_logprobs)
                    if old is None:
                        old = logprobs.detach()
                    cap = tis_cap or math.inf
                    weights = importance_weights(old * mask, sampled * mask, cap, tis_level)
                    loss, stats = grpo_loss(
                        logprobs, old, ref, advantage, mask, loss_type, clip_eps=eps_low, clip_eps_high=eps_high,
                        delta=delta or math.inf, weights=weights if tis_cap else 1.0, kl_coef=kl_coef,
                        entropies=entropies, entropy_coef=entropy_coef, longest=max_new_tokens,
                        tokens=tokens_per_micro_batch, n_answers=batch_size)  # before answers were skipped
                    # the routers of a mixture of experts have a loss of their own, which balances their load
                    run.backward((loss + model.router_loss()) / micro_steps)
                    step_loss += loss.detach() / micro_steps

                    # means over the tokens of the step: a mean of micro-batches' means would not be, as they are sorted
                    # by length. Of a skipped answer no token is clipped
                    meter.add(answers.tokens(part), tokens_per_micro_batch,
                              **{name: total / tokens_per_micro_batch for name, total in stats.items()})
                    n_tokens = mask.sum().clamp(min=1)
                    meter.add(weight=n_tokens, **{
                        'rollout/gap': ((sampled - old).abs() * mask).sum() / n_tokens,  # between sampler and training
                        'rollout/weight': (weights * mask).sum() / n_tokens,
                        'rollout/capped': ((weights >= cap) * mask).sum() / n_tokens})

                # update; where the gradient is not finite it is skipped, decided on the device without waiting for it
                grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
                run.skip_if_not_finite(optimizers, grad_norm)
                optimizers.step()
                optimizers.zero_grad()
        step += 1

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            # loss and grad_norm are those of the step's last update, all else is a mean since the last row
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale, failed=reward.failed)

    run.finish(step, stop, parameters=model.num_params(), trainable=model.num_params(learning=True))
    run.print0(f'done: best held-out reward {-run.best:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True{f" --tools={tools}" if tools else ""}')


if __name__ == '__main__':
    runtime.cli(main)
