"""
Proximal policy optimisation: a model learns from rewards of its own answers, token by token, with a critic beside it.

    python ppo.py config/ppo_tiny.py                               word problems; the reward model is out/reward_own
    python ppo.py config/ppo_tiny.py --critic=separate             a critic of its own, which begins as the reward model
    python ppo.py config/ppo_tiny.py --rewards=correct --reward_model=                  a grader in its place
    python ppo.py config/ppo_tiny.py --kl_controller=adaptive --kl_target=2
    torchrun --standalone --nproc_per_node=2 ppo.py config/ppo_tiny.py --batch_size=64 --gradient_accumulation_steps=2

A step samples answers to prompts_per_step prompts. Each token costs kl_coef times how much likelier it is to the policy
than to the reference, the model that the run begins with, and the last one earns the reward of the answer. The critic
estimates before each token the rewards still to come; generalised advantage estimation compares. Then num_epochs
passes over the answers move the policy, as far as the clip lets it. Rewards are named in `rewards` (see rollout.py);
the true quality of answers to word problems is logged as reward/gold and is never learnt from.

Papers: PPO (arXiv:1707.06347), GAE (arXiv:1506.02438), fine-tuning from preferences (arXiv:1909.08593), learning to
summarize (arXiv:2009.01325), InstructGPT (arXiv:2203.02155), The N implementation details of RLHF with PPO
(arXiv:2403.17031), reward over-optimisation (arXiv:2210.10760).
"""
import math
from pathlib import Path

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
from torch import nn

from convert import load_model, load_to_train
from dataset import find_dataset
from model import GPT, GPTConfig, Optimizers
from rollout import (
    SHARED_ROW,
    Rewards,
    compute_all_logprobs,
    compute_logprobs,
    evaluate_policy,
    forcing,
    generate_rollouts,
    gold_scores,
    kl_terms,
    load_prompt_data,
)
from tokenizer import UserError

# where and what
out_dir = 'out/ppo'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'resume'; or 'auto' (resume if out_dir has a run)
base = 'out/sft'  # init_from='auto': the model to start from if out_dir has no run yet
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder, or a .json or .jsonl file
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, new weights and samples
strict = True  # stop at a malformed row; False: skip and count it
# rewards
rewards = 'model'  # a sum, as 'correct, 0.2*format, -0.1*length, model, FILE.py:function': see rollout.py
reward_model = 'out/reward'  # a run of reward.py, for 'model'
max_bad_rewards = 20  # stop once more rewards than this have failed
eos_penalty = 1.0  # taken from the reward of an answer that did not end
reward_clip = 0.0  # rewards beyond so much, up or down, count as that; 0 = no limit
running_rewards = False  # rewards less their running mean, over their running standard deviation
whiten_rewards = False  # the tokens' rewards, KL included, over their standard deviation in the step
# answers
prompts_per_step = 256  # prompts of a step
num_generations = 1  # answers to each
max_new_tokens = 128  # maximum length of an answer, in tokens
tools = False  # run the calculator on <tool>…</tool>; its results are masked out of the loss
max_think_tokens = 0  # close <think> after this many tokens; that </think> is masked out of the loss; 0 = no limit
adapt_length = False  # the next answers may take a quarter more tokens than the longest of these, up to max_new_tokens
temperature = 1.0  # of sampling; the log-probabilities in the loss are computed at it, too
kl_budget = 0.0  # an answer stops where its log-ratio to the reference, summed, passes this, in nats; 0 = never
# KL
kl_coef = 0.05  # what a nat of KL to the reference costs; the adaptive controller begins with it
kl_estimator = 'k1'  # of a token's KL: 'k1', the log-ratio, or 'k3', which is never negative
kl_controller = 'fixed'  # 'fixed', or 'adaptive': kl_coef is steered towards kl_target
kl_target = 6.0  # 'adaptive': nats per answer
kl_horizon = 10000  # 'adaptive': answers over which an error of a fifth is made good
# advantages
gamma = 1.0  # discount per token
gae_lambda = 0.95  # how far advantages trust rewards more than the critic: 0 = one token, 1 = to the end
whiten_advantages = True  # mean 0 and variance 1 in the step
# loss
critic = 'shared'  # a head on the policy's 'shared' trunk, or a model of its own, 'separate'
critic_lr = 1e-3  # peak learning rate of that head or model
clip_eps = 0.2  # how far from 1 a ratio of probabilities counts
clip_value = 0.2  # how far from its first guess a value counts; 0 = any
vf_coef = 0.1  # weight of the critic's loss
entropy_coef = 0.0  # weight of the entropy bonus, per token
kl_stop = 0.0  # a step's updates end where the policy is so far from the one that wrote the answers; 0 = never
# batches
batch_size = 64  # answers per micro-batch
gradient_accumulation_steps = 1  # micro-batches per update, over all processes together
num_epochs = 2  # passes over the answers of a step
max_iters = 100  # steps; each samples prompts_per_step * num_generations answers and learns from them
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 1e-4  # peak learning rate of AdamW
embed_lr = 0.0  # peak learning rate of the token embedding; 0 = learning_rate
muon_lr = 0.001  # peak learning rate of Muon
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
eval_split = 'val'  # split that eval_only evaluates: 'val', 'test' or 'train'
show_answers = 3  # answers printed at each evaluation
log_interval = 1  # steps between lines of the log
keep_checkpoints = 2  # checkpoints to keep: ckpt.pt, and older ones as ckpt.1.pt …
max_bad_steps = 10  # stop after this many skipped updates in a row (loss or gradient not finite)
tensorboard_log = False  # log to out_dir/tensorboard
wandb_log = False  # log to Weights & Biases
wandb_project = 'flatgpt'  # Weights & Biases: project
wandb_run_name = 'ppo'  # Weights & Biases: name of the run
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best available
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits if the device is faster at it
compile = False  # torch.compile: slow to start, then faster
activation_checkpointing = False  # recompute each block in the backward pass: less memory, a third more time
fsdp = False  # under torchrun: shard parameters, gradients and optimizer state (FSDP2), not replicate them (DDP)

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    **dict.fromkeys(('temperature', 'kl_target', 'critic_lr'), '> 0'), 'val_fraction': '> 0 and < 1',
    **dict.fromkeys(('gamma', 'gae_lambda'), '>= 0 and <= 1'),
    **dict.fromkeys(('prompts_per_step', 'num_generations', 'max_new_tokens', 'num_epochs', 'kl_horizon'), '>= 1'),
    **dict.fromkeys(('clip_eps', 'clip_value', 'kl_coef', 'kl_budget', 'kl_stop', 'reward_clip', 'vf_coef',
                     'eos_penalty', 'entropy_coef', 'max_bad_rewards', 'max_think_tokens', 'eval_rows',
                     'show_answers'), '>= 0'),
    'critic': ('shared', 'separate'), 'kl_estimator': ('k1', 'k3'), 'kl_controller': ('fixed', 'adaptive'),
    'eval_split': ('val', 'test', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths

def gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95):
    """Generalised advantage estimation (arXiv:1506.02438) -> (advantages, returns), both (B, A), 0 where mask is.

    rewards of each token and values, what the critic expected before it: (B, A). With delta_t = r_t + gamma V_t+1 -
    V_t, an advantage is delta_t + gamma lambda (that of the next token); a return is it plus V_t. Nothing follows an
    answer's last token. Tokens that mask leaves out, such as the result of a tool, are not steps: the sums pass over
    them.
    """
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        is_step = mask[:, t].bool()
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(is_step, advantage, 0.0)
        next_advantage = torch.where(is_step, advantage, next_advantage)
        next_value = torch.where(is_step, values[:, t], next_value)
    return advantages, (advantages + values) * mask


def whiten(x, mask, shift_mean=True):
    """Numbers (B, A) with mean 0, or with shift_mean=False their own, and variance 1 over mask; 0 elsewhere."""
    n = mask.sum().clamp(min=1)
    mean = (x * mask).sum() / n
    scaled = (x - mean) / (((x - mean).square() * mask).sum() / n + 1e-8).sqrt()
    return (scaled if shift_mean else scaled + mean) * mask


def policy_loss(logprobs, old_logprobs, advantages, clip_eps=0.2):
    """max(-r a, -clip(r, 1 - eps, 1 + eps) a) per token, r = exp(logprobs - old_logprobs), all (B, A)
    (arXiv:1707.06347, eq. 7) -> (losses, where the clip holds the ratio back)."""
    ratio = (logprobs - old_logprobs).exp()
    losses = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return torch.maximum(losses, clipped), clipped > losses


def value_loss(values, old_values, returns, clip_value=0.2):
    """Half the square of the critic's error per token, (B, A), the larger of that of the value and of the value no
    further than clip_value from old_values, those of the rollout -> (losses, where that is larger).
    """
    losses = (values - returns).square() / 2
    if not clip_value:
        return losses, torch.zeros_like(losses, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-clip_value, clip_value) - returns).square() / 2
    return torch.maximum(losses, clipped), clipped > losses


def token_rewards(scores, kl, response_mask, kl_coef):
    """Scores of answers (B,), a KL term per token and the tokens that the policy sampled (B, A) -> rewards (B, A): each
    token pays kl_coef times its KL, the last that was sampled gets the score (arXiv:1909.08593)."""
    rewards = -kl_coef * kl * response_mask
    last = (response_mask * torch.arange(1, response_mask.shape[1] + 1)).argmax(1)
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def adapt_kl_coef(kl_coef, kl, target, n, horizon):
    """The controller of arXiv:1909.08593, 2.2, after n answers with a mean KL: up where it is above target, else down,
    by a share of at most a fifth of n / horizon."""
    return float(kl_coef * (1 + min(0.2, max(-0.2, kl / target - 1)) * n / horizon))  # no NumPy number: it is saved


def stops_at(log_ratios, response_mask, budget):
    """How many tokens of each answer there are up to the first whose summed log-ratio to the reference is above budget,
    that one included: log_ratios and response_mask (n, A) arrays -> int (n,), A where none is."""
    over = np.cumsum(log_ratios * response_mask, 1) > budget
    return np.where(over.any(1), over.argmax(1) + 1, over.shape[1])


class RunningScale:
    """Mean and variance of all numbers so far (Welford; Chan et al. for batches): [count, mean, sum of squares]."""

    def __init__(self, state=(0, 0.0, 0.0)):
        self.state = list(state)

    def __call__(self, x):
        """Numbers (n,), which count from now on -> the same less the mean, over the standard deviation."""
        count, mean, squares = self.state
        total, delta = count + len(x), x.mean() - mean
        self.state = [total, mean + delta * len(x) / total,
                      squares + ((x - x.mean()) ** 2).sum() + delta ** 2 * count * len(x) / total]
        self.state = [float(v) for v in self.state]
        return (x - self.state[1]) / math.sqrt(self.state[2] / total + 1e-8)


class ActorCritic(nn.Module):
    """A policy and a critic, which estimates before each token the return that follows.

    The critic is a linear function of the policy's own last hidden state, zero at first, or a reward model's score of
    the text so far.
    """

    def __init__(self, policy, critic=None):
        super().__init__()
        self.policy, self.critic, self.value = policy, critic, None
        if critic is None:
            self.value = nn.Linear(policy.config.n_embd, 1)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)

    def forward(self, idx, targets, positions=None, mask=None, reduction='details', temperature=1.0):
        """ids and targets (B, T) -> losses, entropies and values, (B, T) each: see `GPT.forward`. A critic of its own
        reads one answer to a row."""
        losses, entropies, hidden = self.policy(idx, targets, positions, mask, reduction, temperature=temperature)
        if self.critic is not None:
            return losses, entropies, self.critic(idx, answer=(targets != -100).roll(1, 1), reduction='values')
        with torch.autocast(idx.device.type, enabled=False):
            return losses, entropies, self.value(hidden.float())[..., 0]

    def critic_state(self):
        """The tensors of what is not the policy."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith('policy.')}


def make_critic(policy):
    """A critic of its own: the reward model, or without one the policy itself with a new head."""
    if reward_model:
        model, _ = load_model(reward_model, scores=True, dropout=0.0, lora_dropout=0.0)
    else:
        with runtime.user_errors():
            merged = policy.merged()
            model = GPT.from_state({'model': merged.state_dict(), 'model_args': vars(merged.config)}, score_head='last')
        nn.init.zeros_(model.score.weight)
    if not model.config.causal:
        raise UserError(f"critic='separate': {reward_model} has causal=False and cannot value an answer that is not "
                        'finished: take a causal reward model')
    if model.config.block_size < policy.config.block_size:
        raise UserError(f"critic='separate': {reward_model} reads block_size={model.config.block_size} tokens, the "
                        f'policy {policy.config.block_size}')
    return model


def check_knobs(n_answers, answers_per_update, given):
    """UserError for knobs that do not go together."""
    if given.get('dropout') or given.get('lora_dropout'):
        raise UserError('dropout and lora_dropout are off here: a ratio of probabilities is to be that of the weights')
    if n_answers % answers_per_update:
        raise UserError(f'prompts_per_step * num_generations = {n_answers} answers are not a multiple of batch_size * '
                        f'gradient_accumulation_steps = {answers_per_update}: change one of them')
    if kl_controller == 'adaptive' and not kl_coef:
        raise UserError("kl_controller='adaptive' multiplies kl_coef, which is 0: give one above 0 to begin with")
    if kl_controller == 'adaptive' and n_answers >= 5 * kl_horizon:
        raise UserError(f'kl_horizon={kl_horizon}: at {n_answers} answers a step kl_coef could fall to 0 at once: give '
                        f'at least {n_answers // 5 + 1}')


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig, a model's shape: those are given
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_ranges(config, RANGES)
    n_answers = prompts_per_step * num_generations
    answers_per_update = batch_size * gradient_accumulation_steps
    check_knobs(n_answers, answers_per_update, given)
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # policy, critic and rewards
    resume_from = run.find_checkpoint(init_from)
    start = load_to_train('ppo', base if init_from == 'auto' else init_from, resume_from,
                          given | {'dropout': 0.0, 'lora_dropout': 0.0}, seed)
    policy, tokenizer = start.model, start.tokenizer
    block_size = policy.config.block_size
    force = forcing(tokenizer, tools, max_think_tokens)
    reward = Rewards(rewards, tokenizer, run, max_new_tokens, reward_model, max_bad_rewards)
    if Path(dataset).suffix not in ('.json', '.jsonl'):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    model = ActorCritic(policy, make_critic(policy) if critic == 'separate' else None)
    share_prompts = critic == 'shared'  # a critic of its own reads one answer to a row
    if eval_only:
        net = run.wrap(model, compile)
        data = load_prompt_data(run, dataset, eval_split, tokenizer, block_size, max_new_tokens, seed, strict,
                                val_fraction)
        reward.check(data.rows_kept)
        before = start.initial_weights()
        reference = {name: run.like(p, before[name]) for name, p in policy.named_parameters() if name in before} or None
        _, summary, samples = evaluate_policy(net, policy, reference, data, run, reward, data.fixed(eval_rows),
                                            max_new_tokens, temperature, force)
        run.print0(f'{init_from} on {len(data.fixed(eval_rows)):,} prompts of {dataset}, {eval_split}: {summary}')
        return run.print0('\n'.join(samples[:show_answers]))

    # data
    train_data, val_data = (load_prompt_data(run, dataset, split, tokenizer, block_size, max_new_tokens, seed, strict,
                                             val_fraction) for split in ('train', 'val'))
    for data in (train_data, val_data):
        reward.check(data.rows_kept)
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = policy.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                 muon_lr, muon_momentum)
    critic_parameters = [p for name, p in model.named_parameters() if not name.startswith('policy.')]
    critic_optimizer = torch.optim.AdamW(critic_parameters, critic_lr, (beta1, beta2), weight_decay=0.0,
                                         fused=run.device_type in ('cuda', 'cpu'))
    critic_optimizer.param_groups[0]['peak_lr'] = critic_lr
    optimizers = Optimizers([*optimizers, critic_optimizer])
    # the reference: the policy as it is before its first step. Only what is trained is kept twice
    reference = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}

    # resume
    step, clock, scale = 0, runtime.Clock(), RunningScale()
    kl_coef_now, longest = kl_coef, max_new_tokens  # which the controller and adapt_length change
    if resume_from:
        own = start.checkpoint
        then = {name: tensor.shape for name, tensor in own['critic'].items()}
        if then != {name: tensor.shape for name, tensor in model.critic_state().items()}:
            raise UserError(f'{start.origin} was trained with another critic than critic={critic!r}: resume with that')
        run.resume(own, start.origin, optimizers, config)
        step, clock, reward.failed = own['iter'], runtime.Clock(own['seconds']), own['failed']
        kl_coef_now, longest, scale = own['kl_coef'], own['longest'], RunningScale(own['scale'])
        with torch.no_grad():
            for name, tensor in model.critic_state().items():
                tensor.copy_(run.like(tensor, own['critic'][name]))
            for name, tensor in reference.items():
                tensor.copy_(run.like(tensor, own['reference'][name]))
        own = start.checkpoint = None  # frees its memory
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * prompts_per_step / train_data.n_rows
    run.print0(
        f'{dataset}: {train_data.n_rows:,} prompts to learn from, {val_data.n_rows:,} held out ({tokenizer.name})\n'
        f'{start.summary()}; on {run.world_size} x {run.device}, {run.dtype}\n'
        f'critic: {sum(p.numel() for p in critic_parameters):,} parameters, {critic}\n'
        f'{max_iters:,} steps of {n_answers} answers and {n_answers // answers_per_update * num_epochs} updates: '
        f'{epochs:.2f} epochs')

    meter = runtime.Meter(run, clock, max_iters, policy.flops_per_token(min(block_size, SHARED_ROW)))
    warmed_up = not run.ddp
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate_policy(net, policy, reference, val_data, run, reward,
                                                      val_data.fixed(eval_rows), max_new_tokens, temperature, force)
            run.log(metrics | {'iter': step, 'seconds': clock.read()})
            run.print0(f'step {step}, {clock.read():.1f} s of training: {summary}')
            run.sample(step, '\n'.join(samples[:show_answers]))
            score = -metrics.get('val/reward', -math.inf)
            last_eval = step
        stop = run.stop_signal()
        if evaluating or (stop and step > last_eval):
            clock.stop()
            run.save_checkpoint(start.model_state() | {'iter': step, 'seconds': clock.read()}, optimizers, score,
                                keep_checkpoints,
                                {'reference': reference, 'critic': model.critic_state(), 'failed': reward.failed,
                                 'kl_coef': kl_coef_now, 'longest': longest, 'scale': scale.state})
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # rollouts, and what policy, critic and reference make of their tokens. The training forward computes the
        # log-probabilities again, because the sampler rounds in another way and a ratio would see that
        began = clock.read()
        rows = train_data.rows(step * prompts_per_step, prompts_per_step)
        answers = generate_rollouts(policy, train_data, rows, run, longest, num_generations, temperature, 1 + step,
                                    force=force)
        seconds = clock.read() - began
        old_logprobs, _, old_values = compute_all_logprobs(net, run, answers, block_size, temperature, share_prompts)
        with run.swapped_weights(policy, reference):
            ref_logprobs = compute_all_logprobs(net, run, answers, block_size, temperature, share_prompts)[0]
        meter.add(**{'rollout/gap': np.abs(old_logprobs - answers.logprobs)[answers.response_mask].mean(),
                     'rollout/tok_per_sec': answers.lengths.sum() / seconds})
        if kl_budget:
            stops = stops_at(old_logprobs - ref_logprobs, answers.response_mask, kl_budget)
            stops = np.minimum(stops, answers.lengths)
            meter.add(stopped=(stops < answers.lengths).mean())
            answers = answers.cut(stops, train_data)
            old_logprobs, old_values, ref_logprobs = (x[:, :answers.response_mask.shape[1]] * answers.response_mask
                                                      for x in (old_logprobs, old_values, ref_logprobs))
        limit = longest
        if adapt_length:
            longest = min(max_new_tokens, int(1.25 * answers.lengths.max()) + 1)

        # rewards of answers
        totals, parts = reward(train_data, answers)
        scored = np.isfinite(totals)
        response_mask = answers.response_mask * scored[:, None]  # an answer without a reward carries no loss
        scores = np.where(scored, totals, 0.0) - eos_penalty * ~answers.ended
        if running_rewards and scored.any():
            scores[scored] = scale(scores[scored])
        if reward_clip:
            scores = scores.clip(-reward_clip, reward_clip)

        # rewards of tokens. The KL is part of the reward here, not of the loss: so the critic learns to expect it, and
        # a token answers for the distance of all that follow it
        mask = torch.from_numpy(response_mask.astype(float))
        values = torch.from_numpy(old_values)
        kl = torch.from_numpy(kl_terms(old_logprobs, ref_logprobs, kl_estimator))
        rewards_of_tokens = token_rewards(torch.from_numpy(scores * scored), kl, mask, kl_coef_now)
        if whiten_rewards:
            rewards_of_tokens = whiten(rewards_of_tokens, mask, shift_mean=False)
        advantages, returns = gae(rewards_of_tokens, values, mask, gamma, gae_lambda)
        if scored.any():
            variance, error = (x[mask.bool()].var(correction=0) for x in (returns, returns - values))
            meter.add(**{'reward/mean': totals[scored].mean(), 'reward/std': totals[scored].std(),
                         'reward/with_kl': rewards_of_tokens.sum(1).numpy()[scored].mean(),
                         **{f'reward/{name}': x[scored].mean() for name, x in parts.items()},
                         'value/explained': 1 - (error / (variance + 1e-8)).item()})
        if whiten_advantages:
            advantages = whiten(advantages, mask)
        advantages, returns = advantages.numpy(), returns.numpy()
        mean_kl = (old_logprobs - ref_logprobs).sum(1).mean()
        gold = gold_scores(train_data, answers)
        if np.isfinite(gold).any():
            meter.add(**{'reward/gold': np.nanmean(gold)})
        meter.add(kl=mean_kl, kl_coef=kl_coef_now, response_len=answers.lengths.mean(), ended=answers.ended.mean(),
                  max_new_tokens=limit)
        if kl_controller == 'adaptive':
            kl_coef_now = adapt_kl_coef(kl_coef_now, mean_kl, kl_target, n_answers, kl_horizon)

        # the learning rate of this step, for all its updates
        lr_scale = runtime.lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters,
                                     min_lr / learning_rate, decay_frac)
        for group in optimizers.param_groups:  # AdamW's, the embedding's and Muon's groups have peaks of their own
            group['lr'] = group['peak_lr'] * lr_scale

        updates, sizes, too_far = 0, answers.group_sizes, False
        for epoch in range(num_epochs):
            order = np.random.default_rng([seed, step, epoch]).permutation(prompts_per_step)
            order = (order[:, None] * num_generations + np.arange(num_generations)).flatten()  # groups stay together
            for first in range(0, n_answers, answers_per_update):
                chosen = order[first:first + answers_per_update]
                chosen = chosen[np.argsort(sizes[chosen], kind='stable')]  # by length: little padding
                if not response_mask[chosen].any():
                    continue
                if not warmed_up:
                    part = chosen[run.rank * batch_size:(run.rank + 1) * batch_size]
                    logprobs, _, new_values = compute_logprobs(net, run, answers, part, block_size, temperature,
                                                               share_prompts)
                    run.warm_up_ddp(net, logprobs.mean() + new_values.mean())
                    warmed_up = True

                # forward and backward, over this process's micro-batches
                step_loss = approx_kl = 0.0
                tokens_per_micro_batch = response_mask[chosen].sum() / gradient_accumulation_steps
                for number in run.micro_batches(net, gradient_accumulation_steps):
                    part = chosen[number * batch_size:(number + 1) * batch_size]
                    logprobs, entropies, new_values = compute_logprobs(net, run, answers, part, block_size, temperature,
                                                                       share_prompts)
                    width = logprobs.shape[1]  # tokens of the longest answer of this part
                    mask, old, advantage, old_value, target = run.to_device(*(
                        np.ascontiguousarray(x[part, :width], np.float32)
                        for x in (response_mask, old_logprobs, advantages, old_values, returns)))
                    losses, clipped = policy_loss(logprobs, old, advantage, clip_eps)
                    errors, value_clipped = value_loss(new_values, old_value, target, clip_value)
                    total = losses + vf_coef * errors
                    if entropy_coef:
                        total = total - entropy_coef * entropies
                    # the mean over the tokens of the whole update, so that short micro-batches do not weigh more
                    loss = (total * mask).sum() / tokens_per_micro_batch
                    loss = loss / micro_steps
                    run.backward(loss)
                    step_loss += loss.detach()

                    n_tokens = mask.sum().clamp(min=1)
                    log_ratio = (logprobs.detach() - old) * mask
                    kl = kl_terms(torch.zeros_like(log_ratio), log_ratio).sum() / n_tokens  # of old policy and new
                    approx_kl = approx_kl + kl / micro_steps
                    meter.add(answers.tokens(part), approx_kl=kl, clip_frac=(clipped * mask).sum() / n_tokens,
                              entropy=(entropies.detach() * mask).sum() / n_tokens,
                              ratio=(log_ratio.exp() * mask).sum() / n_tokens,
                              **{'policy/loss': (losses.detach() * mask).sum() / n_tokens,
                                 'value/loss': (errors.detach() * mask).sum() / n_tokens,
                                 'value/clip_frac': (value_clipped * mask).sum() / n_tokens})

                # update; where the gradient is not finite it is skipped, decided on the device without waiting for it
                grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
                optimizers.step(found_inf=run.found_inf(grad_norm))
                optimizers.zero_grad()
                updates += 1
                too_far = kl_stop and run.sum(float(approx_kl))[0] / run.world_size > kl_stop
                if too_far:
                    break
            if too_far:
                break
        if not updates:
            raise UserError(f'step {step}: no answer had a reward: fix the rewards or the rows')
        meter.add(updates=updates)
        step += 1

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale, failed=reward.failed)

    run.finish(step, stop, parameters=policy.num_params(), trainable=policy.num_params(learning=True))
    run.print0(f'done: best held-out reward {-run.best:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True{" --tools=True" * tools}')


if __name__ == '__main__':
    runtime.cli(main)
