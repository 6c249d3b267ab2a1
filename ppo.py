"""
Proximal policy optimisation: a policy learns from rewards of its own answers, with a learned critic as baseline.

    python ppo.py config/ppo_tiny.py                               word problems; the reward model is out/reward_own
    python ppo.py config/ppo_tiny.py --critic=separate             a second model as critic, at first the reward model
    python ppo.py config/ppo_tiny.py --rewards=correct --reward_model=        a rule-based grader instead
    python ppo.py config/ppo_tiny.py --kl_controller=adaptive --kl_target=2
    torchrun --standalone --nproc_per_node=2 ppo.py config/ppo_tiny.py --batch_size=64 --gradient_accumulation_steps=2

A step samples answers to prompts_per_step prompts. The reward of a token is -kl_coef times its log-ratio to the
reference, the model that the run begins with; the last token also gets the score of the answer. The critic estimates
the return before each token, and generalised advantage estimation (GAE) makes advantages of rewards and estimates. Then
num_epochs passes over the answers make clipped updates. `rewards` names the terms of a score (see rollout.py). The true
quality of answers to word problems, reward/gold, is only logged: it shows when the reward model is over-optimised.

Papers: PPO (arXiv:1707.06347), GAE (arXiv:1506.02438), fine-tuning from preferences (arXiv:1909.08593), learning to
summarize (arXiv:2009.01325), InstructGPT (arXiv:2203.02155), The N implementation details of RLHF with PPO
(arXiv:2403.17031), reward over-optimisation (arXiv:2210.10760).
"""
import math

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import numpy as np
import torch
from torch import nn

import lora
from dataset import find_dataset
from load import load_model, load_to_train
from lora import LoRAConfig
from model import GPTConfig
from optim import Optimizers, lr_factor, make_optimizers
from reward_model import RewardModel
from rollout import (
    SAMPLERS,
    SHARED_ROW,
    Rewards,
    compute_all_logprobs,
    compute_logprobs,
    evaluate_policy,
    forcing,
    generate_rollouts,
    gold_scores,
    importance_weights,
    kl_terms,
    load_prompt_data,
    make_sampler,
    to_batch,
)
from rows import is_file_of_rows
from tokenizer import UserError

# where and what
out_dir = 'out/ppo'  # directory of the run: checkpoints, metrics, samples
init_from = 'out/sft'  # model to start from, as in sample.py; 'resume'; 'auto:MODEL': resume if out_dir has a run
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
seed = 1337  # of the order of the data, new weights and samples
strict = True  # stop at a malformed row; False: skip and count it
# rewards
rewards = 'model'  # weighted sum, as 'correct, 0.2*format, -0.1*length, model, FILE.py:function': see rollout.py
reward_model = ''  # directory of a reward.py run, for the term 'model' and only then
max_bad_rewards = 20  # stop once more rewards than this have failed
eos_penalty = 1.0  # subtracted from the score of an answer that did not end by itself
reward_clip = 0.0  # scores are clipped to ±reward_clip; 0 = no clipping
running_rewards = False  # normalise scores by the mean and standard deviation of all scores so far
whiten_rewards = False  # scale token rewards, KL included, to variance 1 over the tokens of the step; the mean stays
# answers
prompts_per_step = 256  # prompts per step
num_generations = 1  # answers sampled per prompt
max_new_tokens = 128  # maximum length of an answer, in tokens
tools: bool | str = False  # True: the calculator answers <tool>…</tool>; FILE.py: functions; results are not learned
max_tool_calls = 8  # rounds of calls of functions in an answer, after which its turn ends for good
max_think_tokens = 0  # close <think> after this many tokens; that </think> is masked out of the loss; 0 = no limit
adapt_length = False  # limit the next step's answers to 1.25 times this step's longest, up to max_new_tokens
temperature = 1.0  # of sampling; log-probabilities, KL and entropy are computed at it, too
rollout_quant = ''  # the sampler's weights: 'int8' or 'fp16' (as quant in sample.py), 'bfloat16', 'float32'; '' = auto
kl_budget = 0.0  # truncate an answer once its summed log-ratio to the reference exceeds this, in nats; 0 = never
# KL
kl_coef = 0.05  # coefficient of the KL penalty in the rewards; 'adaptive': its initial value
kl_estimator = 'k1'  # per token (Schulman 2020): 'k1', the log-ratio, or 'k3', which is never negative
kl_controller = 'fixed'  # 'fixed', or 'adaptive': steer kl_coef towards kl_target (arXiv:1909.08593)
kl_target = 6.0  # 'adaptive': target KL per answer, in nats
kl_horizon = 10000  # 'adaptive': answers over which kl_coef changes by at most about 20 %
# advantages
gamma = 1.0  # discount per token
gae_lambda = 0.95  # 0 = one-step TD errors (low variance), 1 = returns minus values (low bias)
whiten_advantages = True  # normalise advantages to mean 0 and variance 1 over the tokens of the step
# loss
critic = 'shared'  # 'shared': a value head on the policy; 'separate': a second model
critic_lr = 1e-3  # peak learning rate of the value head or of the second model
clip_eps = 0.2  # the probability ratio is clipped to 1 ± clip_eps
tis_cap = 2.0  # truncated importance sampling: weight min(old policy / sampler, tis_cap) of a loss; 0 = no weights
tis_level = 'token'  # these weights are of each 'token', or of a whole answer: 'sequence'
clip_value = 0.2  # values are clipped to those of the rollout ± clip_value; 0 = no clipping
vf_coef = 0.1  # coefficient of the value loss
entropy_coef = 0.0  # coefficient of the entropy bonus, per token
kl_stop = 0.0  # end a step's updates once KL(old policy || new), in nats per token, exceeds this; 0 = never
# batches
batch_size = 64  # answers per micro-batch
gradient_accumulation_steps = 1  # micro-batches per update, over all processes together
num_epochs = 2  # PPO epochs: passes over the answers of a step
max_iters = 100  # steps; each samples prompts_per_step * num_generations answers and learns from them
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 1e-4  # peak learning rate of AdamW
embed_lr = 0.0  # peak learning rate of the token embedding; 0 = learning_rate
lora_lr_ratio = 1.0  # LoRA+: learning rate of LoRA's B over that of A; 16 is usual
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

# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | {
    **dict.fromkeys(('temperature', 'kl_target', 'critic_lr'), '> 0'), 'val_fraction': '> 0 and < 1',
    **dict.fromkeys(('gamma', 'gae_lambda'), '>= 0 and <= 1'),
    **dict.fromkeys(('prompts_per_step', 'num_generations', 'max_new_tokens', 'num_epochs', 'kl_horizon'), '>= 1'),
    **dict.fromkeys(('clip_eps', 'clip_value', 'tis_cap', 'kl_coef', 'kl_budget', 'kl_stop', 'reward_clip', 'vf_coef',
                     'eos_penalty', 'entropy_coef', 'max_bad_rewards', 'max_think_tokens', 'max_tool_calls',
                     'eval_rows', 'show_answers'), '>= 0'),
    'critic': ('shared', 'separate'), 'kl_estimator': ('k1', 'k3'), 'kl_controller': ('fixed', 'adaptive'),
    'rollout_quant': tuple(SAMPLERS), 'tis_level': ('token', 'sequence'),
    'eval_split': ('val', 'test', 'unseen', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths. Shapes: B answers (n: all of a step), A tokens of the longest answer, T tokens of a row of the model

def gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95):
    """Generalised advantage estimation (arXiv:1506.02438) -> (advantages, returns), each (B, A) and 0 where mask is 0.

    rewards (B, A): r_t of each token; values (B, A): V_t, the critic's estimate of the return before token t.
        delta_t = r_t + gamma V_(t+1) - V_t
        advantage_t = delta_t + gamma gae_lambda advantage_(t+1)
        return_t = advantage_t + V_t
    After an answer's last token V and advantage are 0. Tokens with mask 0, such as the result of a tool, are not
    actions: the recursion skips them.
    """
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        is_action = mask[:, t].bool()
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(is_action, advantage, 0.0)
        next_advantage = torch.where(is_action, advantage, next_advantage)
        next_value = torch.where(is_action, values[:, t], next_value)
    return advantages, (advantages + values) * mask


def masked_mean(x, mask):
    """The mean of x over the tokens with mask 1, (B, A) both."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, shift_mean=True):
    """x (B, A) scaled to variance 1 and, with shift_mean, shifted to mean 0 over the tokens of mask; 0 elsewhere."""
    mean = masked_mean(x, mask)
    scaled = (x - mean) / (masked_mean((x - mean).square(), mask) + 1e-8).sqrt()
    return (scaled if shift_mean else scaled + mean) * mask


def policy_loss(logprobs, old_logprobs, advantages, clip_eps=0.2):
    """The clipped surrogate loss per token, max(-r advantage, -clip(r, 1 - clip_eps, 1 + clip_eps) advantage) with r =
    exp(logprobs - old_logprobs) (arXiv:1707.06347, eq. 7) -> (losses, where the clip is active), all (B, A)."""
    ratio = (logprobs - old_logprobs).exp()
    losses = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return torch.maximum(losses, clipped), clipped > losses


def value_loss(values, old_values, returns, clip_value=0.2):
    """The clipped value loss per token, max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2, with the returns R,
    V_old of the rollout and c = clip_value, 0 = no clipping -> (losses, where the clip is active), all (B, A)."""
    losses = (values - returns).square() / 2
    if not clip_value:
        return losses, torch.zeros_like(losses, dtype=torch.bool)
    moved = values - old_values
    clipped = (old_values + moved.clamp(-clip_value, clip_value) - returns).square() / 2
    # within the clip the two differ by rounding alone
    return torch.maximum(losses, clipped), (clipped > losses) & (moved.abs() > clip_value)


def token_rewards(scores, kl, response_mask, kl_coef):
    """Rewards of tokens, (B, A) (arXiv:1909.08593, eq. 2): -kl_coef kl_t for those that the policy sampled, the last of
    them also gets the score of the answer. scores: (B,); kl, response_mask (1: sampled): (B, A)."""
    rewards = -kl_coef * kl * response_mask
    last = (response_mask * torch.arange(1, response_mask.shape[1] + 1)).argmax(1)  # the last index with mask 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def adapt_kl_coef(kl_coef, kl, target, n, horizon):
    """The adaptive controller (arXiv:1909.08593, 2.2) after n answers with a mean KL of kl, in nats -> the new kl_coef:
    kl_coef (1 + error n / horizon) with error = clip(kl / target - 1, -0.2, 0.2)."""
    error = min(0.2, max(-0.2, kl / target - 1))
    return float(kl_coef * (1 + error * n / horizon))  # no NumPy number: it is saved


def stops_at(log_ratios, response_mask, budget):
    """The length at which each answer is truncated, int (n,): up to and including the first token at which the sum of
    the log-ratios to the reference exceeds budget, or A if none does. log_ratios, response_mask: arrays (n, A)."""
    over = np.cumsum(log_ratios * response_mask, 1) > budget
    return np.where(over.any(1), over.argmax(1) + 1, over.shape[1])


class RunningMeanStd:
    """Normalises by the mean and standard deviation of all numbers so far (Chan et al.); state: [count, mean, sum of
    squared deviations from it]."""

    def __init__(self, state=(0, 0.0, 0.0)):
        self.state = list(state)

    def __call__(self, x):
        """x (n,), counted before -> (x - mean) / standard deviation."""
        count, mean, squares = self.state
        total = count + len(x)
        delta = x.mean() - mean
        mean = mean + delta * len(x) / total
        squares = squares + ((x - x.mean()) ** 2).sum() + delta ** 2 * count * len(x) / total
        self.state = [float(total), float(mean), float(squares)]  # no NumPy numbers: they are saved
        return (x - mean) / math.sqrt(squares / total + 1e-8)


class ActorCritic(nn.Module):
    """A policy and a critic in one module, so that DDP, FSDP and torch.compile wrap both.

    The critic estimates the return before each token. It is a linear value head, zero at first, on the last hidden
    state of the policy, or a reward model, which scores every prefix of the text.
    """

    def __init__(self, policy, critic=None):
        super().__init__()
        self.policy, self.critic, self.value = policy, critic, None
        if critic is None:
            self.value = nn.Linear(policy.config.n_embd, 1)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)

    def forward(self, idx, targets, positions=None, mask=None, output=None):
        """ids and targets (B, T), output: `rollout.losses_and_entropies` -> (losses, entropies, values), each (B, T):
        -log p of a target, the entropy of the distribution there and the estimated return before it. A separate critic
        ignores positions and mask, so that its rows must hold one answer each."""
        losses, entropies, hidden = self.policy(idx, targets, positions, mask, output=output)
        if self.critic is not None:
            is_answer = (targets != -100).roll(1, 1)  # targets[:, t] is the token idx[:, t + 1]
            return losses, entropies, self.critic(idx, answer=is_answer, output='values')
        with torch.autocast(idx.device.type, enabled=False):
            return losses, entropies, self.value(hidden.float())[..., 0]

    def router_loss(self):
        """As `GPT.router_loss`, of both."""
        return self.policy.router_loss() + (self.critic.gpt.router_loss() if self.critic is not None else 0)

    def critic_state(self):
        """The tensors of the critic by name: all but the policy's."""
        return {name.replace('critic.gpt.', 'critic.'): tensor for name, tensor in self.state_dict().items()
                if not name.startswith('policy.')}


def make_critic(policy):
    """The separate critic: it begins as the reward model, or without one as the policy with a score head of zeros."""
    if reward_model:
        model, _ = load_model(reward_model, scores=True, dropout=0.0)
    else:
        model = RewardModel(lora.merge(policy).requires_grad_(True))  # a copy of the policy, LoRA folded in
        nn.init.zeros_(model.score.weight)
    if not model.config.causal:
        raise UserError(f"critic='separate': {reward_model} has causal=False and cannot value unfinished answers: "
                        'take a causal reward model')
    if model.config.block_size < policy.config.block_size:
        raise UserError(f"critic='separate': block_size={model.config.block_size} of {reward_model} must be >= "
                        f'{policy.config.block_size}, that of the policy')
    return model.train()


def minibatches(n_prompts, per_prompt, size, epochs, seed):
    """The answers of each update, indices (size,): epochs passes in random order. Those to one prompt stay adjacent,
    because they share a row of the forward pass."""
    for epoch in range(epochs):
        prompts = np.random.default_rng([*seed, epoch]).permutation(n_prompts)
        answers = prompts[:, None] * per_prompt + np.arange(per_prompt)
        yield from answers.reshape(-1, size)


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig and LoRAConfig: those are given
    config, given = runtime.configure(globals(), GPTConfig, LoRAConfig)
    runtime.check_ranges(config, RANGES)
    if given.get('dropout') or given.get('lora_dropout'):
        raise UserError('dropout and lora_dropout must be 0: with dropout the ratio of new to old policy is noisy')
    n_answers = prompts_per_step * num_generations
    answers_per_update = batch_size * gradient_accumulation_steps
    if n_answers % answers_per_update:
        raise UserError(f'prompts_per_step * num_generations = {n_answers} answers must be a multiple of batch_size * '
                        f'gradient_accumulation_steps = {answers_per_update}: change one of them')
    updates_per_step = n_answers // answers_per_update * num_epochs
    if kl_controller == 'adaptive' and not kl_coef:
        raise UserError("kl_controller='adaptive' scales kl_coef, so kl_coef must be > 0")
    if kl_controller == 'adaptive' and n_answers >= 5 * kl_horizon:
        raise UserError(f'kl_horizon={kl_horizon} must be >= {n_answers // 5 + 1}: with {n_answers} answers per step '
                        'kl_coef could fall to 0 in a single one')
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # policy, critic and rewards: start also has where the policy is from and, if the run is resumed, its checkpoint
    resume_from = run.find_checkpoint(init_from, writes=not eval_only)
    start = load_to_train('ppo', init_from.removeprefix('auto:'), resume_from,
                          given | {'dropout': 0.0, 'lora_dropout': 0.0}, seed)
    policy, tokenizer = start.model, start.tokenizer
    block_size = policy.config.block_size
    if rollout_quant:
        with runtime.user_errors('rollout_quant'):
            make_sampler(policy, run, rollout_quant)  # what cannot be ends here, before anything is written
    force = forcing(tokenizer, tools, max_think_tokens, max_tool_calls)  # inserts results of tools and </think>
    reward_fn = Rewards(rewards, tokenizer, run, max_new_tokens, reward_model, max_bad_rewards)
    model = ActorCritic(policy, make_critic(policy) if critic == 'separate' else None)
    share_prompts = critic == 'shared'  # several answers after one prompt in a row: no input for a separate critic

    # data
    if not is_file_of_rows(dataset):
        run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    splits = {split: load_prompt_data(run, dataset, split, tokenizer, block_size, max_new_tokens, seed, strict,
                                      val_fraction, force)
              for split in ((eval_split,) if eval_only else ('train', 'val'))}
    for data in splits.values():
        reward_fn.check(data.rows_kept)
    if eval_only:
        net = run.wrap(model, compile)
        data = splits[eval_split]
        indices = data.fixed(eval_rows)
        # the reference: the weights that the ppo.py run of this model began with; None if it is from another stage
        weights = start.initial_weights()
        reference = {name: run.like(p, weights[name]) for name, p in policy.named_parameters() if name in weights}
        _, summary, samples = evaluate_policy(net, policy, reference or None, data, run, reward_fn, indices,
                                              max_new_tokens, temperature, force)
        run.print0(f'{init_from} on {len(indices):,} prompts of {dataset}, {eval_split}: {summary}')
        return run.print0('\n'.join(samples[:show_answers]))

    # optimizers and reference
    train_data, val_data = splits['train'], splits['val']
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(policy.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum, lora_lr_ratio)
    critic_parameters = [p for name, p in model.named_parameters() if not name.startswith('policy.')]
    critic_optimizer = torch.optim.AdamW(critic_parameters, critic_lr, (beta1, beta2), weight_decay=0.0,
                                         fused=run.device_type in ('cuda', 'cpu'))
    optimizers = Optimizers([*optimizers, critic_optimizer])
    # the reference: a copy of the policy's trainable weights before the first step; frozen ones are shared
    reference = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}

    # resume
    step, clock, score_stats = 0, runtime.Clock(), RunningMeanStd()
    kl_coef_now, length_limit = kl_coef, max_new_tokens  # changed by kl_controller='adaptive' and by adapt_length
    if resume_from:
        checkpoint = start.checkpoint
        saved_shapes = {name: tensor.shape for name, tensor in checkpoint['critic'].items()}
        if saved_shapes != {name: tensor.shape for name, tensor in model.critic_state().items()}:
            raise UserError(f'{start.origin} was trained with another critic than critic={critic!r}: resume with that')
        run.resume(checkpoint, start.origin, optimizers, config)
        step, clock, reward_fn.failed = checkpoint['iter'], runtime.Clock(checkpoint['seconds']), checkpoint['failed']
        kl_coef_now, length_limit = checkpoint['kl_coef'], checkpoint['longest']
        score_stats = RunningMeanStd(checkpoint['scale'])
        with torch.no_grad():
            for name, tensor in model.critic_state().items():
                tensor.copy_(run.like(tensor, checkpoint['critic'][name]))
            for name, tensor in reference.items():
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
        f'critic: {sum(p.numel() for p in critic_parameters):,} parameters, {critic}\n'
        f'{max_iters:,} steps of {n_answers} answers and {updates_per_step} updates: {epochs:.2f} epochs')
    if updates_per_step == 1:
        run.print0('a single update per step: the ratio is always 1, and clip_eps, clip_value and kl_stop never act '
                   '(more updates: lower batch_size or gradient_accumulation_steps, or raise num_epochs)')

    row_length = min(block_size, SHARED_ROW)  # answers to one prompt share rows of up to SHARED_ROW tokens
    meter = runtime.Meter(run, clock, max_iters, policy.flops_per_token(row_length))
    warmed_up = not run.ddp
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            metrics, summary, samples = evaluate_policy(net, policy, reference, val_data, run, reward_fn,
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
                                {'reference': reference, 'critic': model.critic_state(), 'failed': reward_fn.failed,
                                 'kl_coef': kl_coef_now, 'longest': length_limit, 'scale': score_stats.state})
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # rollouts. Log-probabilities are recomputed by the training forward pass, though the sampler returned some: its
        # kernels round differently, and the ratios of the first update would not be 1
        began = clock.read()
        rows = train_data.rows(step * prompts_per_step, prompts_per_step)  # of an endless sequence of shuffled epochs
        answers = generate_rollouts(policy, train_data, rows, run, length_limit, num_generations, temperature,
                                    1 + step, force=force, quant=rollout_quant)  # sample_seed: evaluations have 0
        seconds = clock.read() - began
        old_logprobs, old_values = compute_all_logprobs(net, run, answers, block_size, temperature, share_prompts,
                                                        entropies=False)
        # the reference is the same network with other weights: they are swapped in for this pass, and back
        with run.swapped_weights(policy, reference):
            ref_logprobs = compute_all_logprobs(net, run, answers, block_size, temperature, share_prompts,
                                                entropies=False)[0]
        meter.add(**{'rollout/gap': np.abs(old_logprobs - answers.logprobs)[answers.response_mask].mean(),
                     'rollout/tok_per_sec': answers.lengths.sum() / seconds})

        # an answer that has gone too far from the reference is truncated, and scored as one that did not end
        if kl_budget:
            ends = np.minimum(stops_at(old_logprobs - ref_logprobs, answers.response_mask, kl_budget), answers.lengths)
            meter.add(stopped=(ends < answers.lengths).mean())
            answers = answers.cut(ends, train_data)
            old_logprobs, old_values, ref_logprobs = (x[:, :answers.response_mask.shape[1]] * answers.response_mask
                                                      for x in (old_logprobs, old_values, ref_logprobs))

        # scores of answers. totals (n,): the weighted sums, nan where a reward failed; terms: unweighted, {name: (n,)}
        totals, terms = reward_fn(train_data, answers)
        scored = np.isfinite(totals)
        if not scored.any():
            raise UserError(f'step {step}: every reward failed: fix the reward function or the rows')
        loss_mask = answers.response_mask * scored[:, None]  # answers without a reward are masked out of the loss
        scores = np.where(scored, totals, 0.0) - eos_penalty * ~answers.ended
        if running_rewards:
            scores[scored] = score_stats(scores[scored])
        if reward_clip:
            scores = scores.clip(-reward_clip, reward_clip)

        # rewards of tokens. As in InstructGPT the KL is part of the reward, not a term of the loss: so returns contain
        # it, the critic predicts it, and the advantage of a token accounts for the KL of the tokens after it
        token_mask = torch.from_numpy(loss_mask.astype(float))
        values = torch.from_numpy(old_values)
        kl = torch.from_numpy(kl_terms(old_logprobs, ref_logprobs, kl_estimator))
        rewards_of_tokens = token_rewards(torch.from_numpy(scores * scored), kl, token_mask, kl_coef_now)
        if whiten_rewards:
            rewards_of_tokens = whiten(rewards_of_tokens, token_mask, shift_mean=False)
        advantages, returns = gae(rewards_of_tokens, values, token_mask, gamma, gae_lambda)
        return_var, error_var = (x[token_mask.bool()].var(correction=0) for x in (returns, returns - values))
        meter.add(**{'reward/mean': totals[scored].mean(), 'reward/std': totals[scored].std(),
                     'reward/with_kl': rewards_of_tokens.sum(1).numpy()[scored].mean(),
                     **{f'reward/{name}': x[scored].mean() for name, x in terms.items()},
                     'value/explained': 1 - (error_var / (return_var + 1e-8)).item()})
        if whiten_advantages:
            advantages = whiten(advantages, token_mask)
        advantages, returns = advantages.numpy(), returns.numpy()

        gold = gold_scores(train_data, answers)
        if np.isfinite(gold).any():
            meter.add(**{'reward/gold': np.nanmean(gold)})
        mean_kl = (old_logprobs - ref_logprobs).sum(1).mean()  # k1, nats per answer, whatever the penalty uses
        meter.add(kl=mean_kl, kl_coef=kl_coef_now, response_len=answers.lengths.mean(), ended=answers.ended.mean(),
                  max_new_tokens=length_limit)
        if kl_controller == 'adaptive':
            kl_coef_now = adapt_kl_coef(kl_coef_now, mean_kl, kl_target, n_answers, kl_horizon)
        if adapt_length:
            length_limit = min(max_new_tokens, int(1.25 * answers.lengths.max()) + 1)

        # the learning rate of this step, for all its updates
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # DDP fixes the order in which it sums gradients in its first backward pass. One whose gradients are dropped
        # makes that order the same in a resumed run as in one that was never stopped
        if not warmed_up:
            part = np.arange(batch_size) + run.rank * batch_size
            logprobs, _, new_values = compute_logprobs(net, run, answers, part, block_size, temperature, share_prompts)
            run.warm_up_ddp(net, logprobs.mean() + new_values.mean())
            warmed_up = True

        updates, sizes = 0, answers.group_sizes  # sizes (n,): tokens of a prompt and the longest answer to it
        for batch in minibatches(prompts_per_step, num_generations, answers_per_update, num_epochs, [seed, step]):
            batch = batch[np.argsort(sizes[batch], kind='stable')]  # by length: little padding
            if not loss_mask[batch].any():  # no answer of this update has a reward
                continue

            # forward and backward, over this process's micro-batches; number counts those of all processes
            update_loss = update_kl = 0.0
            tokens_per_micro_batch = loss_mask[batch].sum() / gradient_accumulation_steps
            for number in run.micro_batches(net, gradient_accumulation_steps):
                part = batch[number * batch_size:(number + 1) * batch_size]
                logprobs, entropies, new_values = compute_logprobs(net, run, answers, part, block_size, temperature,
                                                                   share_prompts)
                width = logprobs.shape[1]  # tokens of the longest answer of this part
                mask, sampled, advantage, target = to_batch(run, part, width, loss_mask, answers.logprobs, advantages,
                                                            returns)
                old_logprob, old_value = to_batch(run, part, width, old_logprobs, old_values)
                losses, clipped = policy_loss(logprobs, old_logprob, advantage, clip_eps)
                # what is between the sampler and the policy before this step's updates: rounding, or rollout_quant
                weights = importance_weights(old_logprob * mask, sampled * mask, tis_cap or math.inf, tis_level)
                losses = losses * weights if tis_cap else losses
                errors, value_clipped = value_loss(new_values, old_value, target, clip_value)
                total = losses + vf_coef * errors
                if entropy_coef:
                    total = total - entropy_coef * entropies
                # the mean over all tokens of the update: micro-batches are sorted by length, so that a mean of their
                # means would weight tokens of short answers more; / micro_steps, as DDP and FSDP average over processes
                loss = (total * mask).sum() / tokens_per_micro_batch
                # the routers of a mixture of experts have a loss of their own, which balances their load
                run.backward((loss + model.router_loss()) / micro_steps)
                update_loss += loss.detach() / micro_steps

                log_ratio = (logprobs.detach() - old_logprob) * mask
                stats = {'approx_kl': log_ratio.exp() - 1 - log_ratio,  # KL(old || new) by k3: r - 1 - log r
                         'ratio': log_ratio.exp(), 'clip_frac': clipped, 'entropy': entropies, 'policy/loss': losses,
                         'value/loss': errors, 'value/clip_frac': value_clipped, 'rollout/weight': weights}
                # means over the tokens of the update, as the loss is
                stats = {name: (x.detach() * mask).sum() / tokens_per_micro_batch for name, x in stats.items()}
                update_kl += stats['approx_kl'] / micro_steps
                meter.add(answers.tokens(part), tokens_per_micro_batch, **stats)

            # clip and update; a gradient that is not finite skips the update, which the device decides without a wait
            grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
            run.skip_if_not_finite(optimizers, grad_norm)
            optimizers.step()
            optimizers.zero_grad()
            updates += 1
            # early stopping: the KL was measured in the forward passes of this update, before its step
            if kl_stop and run.sum(float(update_kl))[0] / run.world_size > kl_stop:
                break
        meter.add(updates=updates)
        step += 1

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:  # with the loss and the gradient norm of the last update
            meter.log(step, update_loss, grad_norm, learning_rate * lr_scale, failed=reward_fn.failed)

    run.finish(step, stop, parameters=policy.num_params(), trainable=policy.num_params(learning=True))
    run.print0(f'done: best held-out reward {-run.best:.4f}; talk to it: '
               f'python sample.py --init_from={out_dir} --chat=True{f" --tools={tools}" if tools else ""}')


if __name__ == '__main__':
    runtime.cli(main)
