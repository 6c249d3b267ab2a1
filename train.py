"""
Pretraining: a language model learns real text by predicting the next token.

    python train.py config/tiny.py                               two minutes on two cores, Shakespeare
    python train.py config/tiny.py --n_layer=6 --max_iters=3000  any knob below, or any field of GPTConfig
    python train.py config/tiny.py --init_from=resume            goes on from out_dir/ckpt.pt
    torchrun --standalone --nproc_per_node=2 train.py config/tiny.py --gradient_accumulation_steps=2

Papers: Language Models are Unsupervised Multitask Learners (Radford et al. 2019), AdamW (arXiv:1711.05101), cosine
decay (arXiv:1608.03983), warmup-stable-decay (arXiv:2404.06395), Muon (arXiv:2502.16982).
"""
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import runtime
from dataset import TokenData, find_dataset
from model import GPT, GPTConfig, check_prompts
from tokenizer import UserError

# where and what
out_dir = 'out/train'  # directory of the run: checkpoints, metrics, samples
init_from = 'scratch'  # 'scratch', 'resume', 'auto' (resume where there is a checkpoint), or a run to take weights from
dataset = 'shakespeare'  # folder in data/ (prepared if it is not yet), or a path to a prepared folder
seed = 1337  # decides initial weights, order of the data, dropout and samples
# batches
batch_size = 12  # windows per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step, over all processes together
max_iters = 2000  # steps
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 6e-4  # peak of AdamW's
embed_lr = 0.0  # peak for the token embedding; 0 = learning_rate
muon_lr = 0.02  # peak of Muon's
muon_momentum = 0.95  # Nesterov momentum of Muon
weight_decay = 0.1  # on matrices only
beta1 = 0.9  # AdamW's decay of the mean
beta2 = 0.95  # AdamW's decay of the variance
grad_clip = 1.0  # largest norm of the gradient; 0 = off
# schedule
lr_schedule = 'cosine'  # after the warmup: 'cosine', 'linear', 'wsd' (constant, then linear) or 'constant'
warmup_iters = 100  # steps of linear warmup
lr_decay_iters = 0  # the step at which the rate reaches min_lr; 0 = max_iters
min_lr = 0.0  # final learning rate, in proportion for every group
decay_frac = 0.5  # 'wsd': the last part of lr_decay_iters that decays
# looking at it
eval_interval = 250  # steps between evaluations, each with a sample and a checkpoint
eval_iters = 20  # batches per evaluation and split, the same ones every time; 0 = as many as the held-out split has
log_interval = 10  # steps between lines of progress
sample_start = '\n'  # text that the live sample continues
sample_tokens = 100  # length of the live sample; 0 = none
tensorboard_log = False  # write out_dir/tensorboard
wandb_log = False  # report to Weights & Biases
wandb_project = 'flatgpt'  # its project
wandb_run_name = 'train'  # its name for this run
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best there is
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits where the device is faster so
compile = False  # torch.compile: slow to start, then faster


def lr_factor(step, schedule, warmup, decay, floor, decay_frac=0.5):
    """The learning rate at a step as a share of its peak; warmup and decay in steps; floor = end / peak."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == 'constant':
        return 1.0
    begin = decay * (1 - decay_frac) if schedule == 'wsd' else warmup
    t = min(1.0, max(0.0, (step - begin) / max(1, decay - begin)))  # 0 at the beginning of the decay, 1 at its end
    return floor + (1 - floor) * ((1 + math.cos(math.pi * t)) / 2 if schedule == 'cosine' else 1 - t)


@torch.no_grad()
def evaluate(model, data, windows, run, token_bytes):
    """Loss on evenly spaced windows of a split, the same every time -> (nats per token, bits per byte)."""
    starts = data.fixed(windows)[run.rank::run.world_size]
    nats = tokens = n_bytes = 0
    rows = max(batch_size, 4096 // data.block_size)
    model.eval()
    for i in range(0, len(starts), rows):
        x, y = data.read(starts[i:i + rows])
        tokens, n_bytes = tokens + y.size, n_bytes + int(token_bytes[y].sum())
        with run.autocast(data.block_size):
            nats += model(*run.to_device(x, y), reduction='sum').item()
    model.train()
    nats, tokens, n_bytes = run.sum(nats, tokens, n_bytes)
    return nats / tokens, nats / math.log(2) / max(1, n_bytes)


def main():
    config, given = runtime.configure(globals(), GPTConfig)
    if lr_schedule not in ('cosine', 'linear', 'wsd', 'constant'):
        raise UserError(f"lr_schedule={lr_schedule!r} is not one of 'cosine', 'linear', 'wsd', 'constant'")
    if min(batch_size, gradient_accumulation_steps, max_iters, eval_interval, log_interval) < 1:
        raise UserError('batch_size, gradient_accumulation_steps, max_iters, eval_interval and log_interval start at 1')
    if learning_rate <= 0 or min(embed_lr, muon_lr, min_lr, eval_iters, warmup_iters, lr_decay_iters, grad_clip) < 0:
        raise UserError('learning_rate must be positive, and no rate, number of steps or limit negative')
    if seed < 0:
        raise UserError(f'seed={seed} must not be negative')
    run = runtime.Run(config)
    if gradient_accumulation_steps % run.world_size:
        raise UserError(f'gradient_accumulation_steps={gradient_accumulation_steps} counts the micro-batches of all '
                        f'processes together: make it a multiple of {run.world_size}')
    micro_steps = gradient_accumulation_steps // run.world_size

    # an earlier checkpoint, if this run begins with one
    state, origin, resumed = None, Path(out_dir) / 'ckpt.pt', False
    if init_from == 'resume' or init_from == 'auto' and origin.exists():
        state, resumed = runtime.load_checkpoint(origin), True
    elif init_from not in ('scratch', 'auto'):
        origin = init_from
        state = runtime.load_checkpoint(origin)

    # data and model
    run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    folder = find_dataset(dataset)
    model_args = (state['model_args'] if state else {}) | given
    block_size = model_args.get('block_size', GPTConfig.block_size)
    train_data, val_data = (TokenData(folder, split, block_size, seed) for split in ('train', 'val'))
    tokenizer = train_data.tokenizer
    model_args.setdefault('vocab_size', tokenizer.n_vocab)
    start_ids = tokenizer.encode(sample_start) or [tokenizer.eot]
    with runtime.user_errors():
        model_args = asdict(GPTConfig(**model_args))
        check_prompts([start_ids], GPTConfig(**model_args))  # the live sample's, and that the model is causal at all
    if model_args['vocab_size'] < tokenizer.n_vocab:
        raise UserError(f'vocab_size={model_args["vocab_size"]} is smaller than the {tokenizer.n_vocab} tokens of '
                        f'{folder}')
    if state:
        for key, value in state['model_args'].items():
            if model_args.get(key) != value and key != 'dropout':
                raise UserError(f'{origin} was trained with {key}={value}, not {model_args.get(key)}: drop --{key}, or '
                                'start a new run with --init_from=scratch')
        if state['tokenizer'] != tokenizer.to_dict():
            raise UserError(f'{origin} was trained with another vocabulary ({state["tokenizer"].get("name")}) than '
                            f'{folder} is prepared with ({tokenizer.name})')
    with runtime.user_errors(origin):
        model = GPT.from_state(state, **model_args) if state else GPT(GPTConfig(**model_args))
    model.to(run.device)
    with runtime.user_errors():
        optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                muon_lr, muon_momentum)
    step, best, tokens_seen, clock = 0, math.inf, 0, runtime.Clock()
    if resumed:
        before = state.get('config', {})
        if before.get('optimizer') != optimizer or 'optimizers' not in state:
            raise UserError(f'{origin} holds no moments of optimizer={optimizer!r} but {before.get("optimizer")!r}: '
                            f'resume with that, or take its weights only: --init_from={out_dir} and a new --out_dir')
        changed = [f'{k} {before[k]} -> {v}' for k, v in config.items() if before.get(k, v) != v and k != 'init_from']
        optimizers.load_moments(state['optimizers'])
        if state['scaler'] and run.scaler.is_enabled():
            run.scaler.load_state_dict(state['scaler'])
        step, best, tokens_seen, clock = state['iter'], state['best'], state['tokens'], runtime.Clock(state['seconds'])
        run.began -= state['total_seconds']
        if changed:
            run.say(f'changed since the checkpoint: {", ".join(changed)}')
    origin = f'{origin}, step {state["iter"]:,}' if state else 'scratch'
    state = None
    compiled = torch.compile(model) if compile else model
    forward = compiled
    if run.world_size > 1:
        forward = DistributedDataParallel(compiled, device_ids=[run.device] if run.device_type == 'cuda' else None,
                                          broadcast_buffers=False)

    tokens_per_step = gradient_accumulation_steps * batch_size * block_size
    token_bytes = tokenizer.token_bytes()
    peak, flops = run.peak_flops(), model.flops_per_token(block_size)

    def measure():
        """Losses of today's weights on the fixed windows of both splits."""
        windows = eval_iters * batch_size or len(val_data.fixed(0))
        train_loss, _ = evaluate(compiled, train_data, windows, run, token_bytes)
        val_loss, bpb = evaluate(compiled, val_data, windows, run, token_bytes)
        return {'iter': step, 'train/eval_loss': train_loss, 'val/loss': val_loss,
                'val/ppl': math.exp(min(val_loss, 99)), 'val/bpb': bpb, 'seconds': clock.read()}

    clock.pause()
    metrics = None if resumed else measure()  # before anything is written: what is wrong with the data shows here
    run.open(fresh=not resumed)
    run.rewind(step)
    run.catch_signals()
    epochs = max_iters * tokens_per_step / train_data.n_tokens
    run.say(f'{folder}: {train_data.n_tokens:,} tokens to train on, {val_data.n_tokens:,} held out ({tokenizer.name})\n'
            f'{model.num_params():,} parameters from {origin} on {run.world_size} x {run.device}, {run.dtype}; '
            f'{max_iters:,} steps of {tokens_per_step:,} tokens: {epochs:.2f} epochs')

    def look(metrics):
        """Logs what was measured after `step` steps, shows a sample and saves the state."""
        nonlocal best
        run.log(metrics)
        run.say('step {iter}: train loss {train/eval_loss:.4f}, val loss {val/loss:.4f}, perplexity {val/ppl:.2f}, '
                '{val/bpb:.4f} bits per byte, {seconds:.1f} s of training'.format_map(metrics))
        if sample_tokens and run.main:
            ids = model.generate([start_ids], sample_tokens, temperature=0.8, stop_ids=(tokenizer.eot,), seed=seed,
                                 vocab_limit=tokenizer.n_vocab)[0]
            run.sample(step, sample_start + tokenizer.decode([t for t in ids if t != tokenizer.eot]))
        better, best = metrics['val/loss'] < best, min(metrics['val/loss'], best)
        state = {'model': model.state_dict(), 'model_args': model_args, 'tokenizer': tokenizer.to_dict(),
                 'optimizers': optimizers.state_dict(), 'scaler': run.scaler.state_dict(), 'iter': step, 'best': best,
                 'tokens': tokens_seen, 'seconds': clock.read(), 'total_seconds': run.total_seconds(), 'config': config}
        if better:  # first: a run that is killed between the two writes best.pt again
            run.save('best.pt', {k: v for k, v in state.items() if k != 'optimizers'})
        run.save('ckpt.pt', state)

    if not resumed:
        look(metrics)
    clock.resume()
    logged_step, logged_seconds, looked, stop = step, clock.read(), step, 0
    while step < max_iters and not (stop := run.stopping()):
        factor = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                           decay_frac)
        for group in optimizers.param_groups:
            group['lr'] = group['peak_lr'] * factor

        loss = 0.0
        for micro_step in range(micro_steps):
            index = step * gradient_accumulation_steps + run.rank * micro_steps + micro_step
            x, y = run.to_device(*train_data.batch(index * batch_size, batch_size))
            run.seed(index)
            last = micro_step == micro_steps - 1  # gradients travel between processes once a step
            with nullcontext() if last or run.world_size == 1 else forward.no_sync():
                with run.autocast(block_size):
                    micro_loss = forward(x, y) / micro_steps
                run.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        run.scaler.unscale_(optimizers)
        if grad_clip:
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        run.scaler.step(optimizers)
        run.scaler.update()
        optimizers.zero_grad()
        step += 1
        tokens_seen += tokens_per_step

        if step % log_interval == 0 or step == max_iters:
            loss, = run.sum(loss.item())  # the only wait for the device
            seconds = clock.read()
            rate = (step - logged_step) * tokens_per_step / (seconds - logged_seconds)
            metrics = {'iter': step, 'train/loss': loss / run.world_size, 'lr': learning_rate * factor,
                       'tok_per_sec': rate, 'seconds': seconds}
            if grad_clip:
                metrics['grad_norm'] = grad_norm.item()
            if peak:
                metrics['mfu'] = rate * flops / peak / run.world_size
            run.log(metrics)
            past, left = runtime.elapsed(seconds), runtime.elapsed((max_iters - step) * tokens_per_step / rate)
            run.progress(f'step {step}/{max_iters} | {past} elapsed, {left} left | '
                         f'loss {metrics["train/loss"]:.4f} | lr {metrics["lr"]:.1e} | {rate:,.0f} tok/s'
                         + (f' | mfu {metrics["mfu"]:.1%}' if peak else ''))
            logged_step, logged_seconds = step, seconds
        if step % eval_interval == 0 or step == max_iters:
            clock.pause()
            look(measure())
            clock.resume()
            looked, logged_step, logged_seconds = step, step, clock.read()

    if stop and looked != step:
        clock.pause()
        look(measure())
    run.finish(parameters=model.num_params(), tokens=tokens_seen)
    if stop:
        again = ' '.join([*(a for a in sys.argv if not a.startswith('--init_from=')), '--init_from=resume'])
        run.say(f'stopped at step {step} of {max_iters}; go on with: python {again}')
        raise SystemExit(128 + stop)
    run.say(f'done: best validation loss {best:.4f}; read what it writes: python sample.py --init_from={out_dir}')


if __name__ == '__main__':
    runtime.cli(main)
