"""
Pretraining: a language model learns real text by predicting the next token.

    python train.py config/tiny.py                               two minutes on two cores, Shakespeare
    python train.py config/tiny.py --n_layer=6 --max_iters=3000  any knob below, or any field of GPTConfig
    python train.py config/tiny.py --init_from=resume            goes on from out_dir/ckpt.pt
    python train.py config/reverse.py                            an encoder-decoder, on pairs of source and target
    torchrun --standalone --nproc_per_node=2 train.py config/tiny.py --gradient_accumulation_steps=2 [--fsdp=True]

Papers: Language Models are Unsupervised Multitask Learners (Radford et al. 2019), Attention Is All You Need
(arXiv:1706.03762), AdamW (arXiv:1711.05101), cosine decay (arXiv:1608.03983), warmup-stable-decay (arXiv:2404.06395),
Muon (arXiv:2502.16982).
"""
import math
from dataclasses import asdict

import runtime

import torch

from convert import load_state
from dataset import PairData, TokenData, find_dataset, kind_of
from model import GPT, GPTConfig, check_prompts
from tokenizer import UserError

# where and what
out_dir = 'out/train'  # directory of the run: checkpoints, metrics, samples
init_from = 'scratch'  # 'scratch', 'resume', 'auto' (resume where there is a run), or a model to go on from: sample.py
dataset = 'shakespeare'  # folder in data/ (prepared if it is not yet), or a path to a prepared folder
seed = 1337  # decides initial weights, order of the data, dropout and samples
# batches
batch_size = 12  # windows, or pairs, per micro-batch
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
eval_pairs = 256  # of pairs: held-out sources to answer greedily for val/exact, the same ones every time; 0 = all
log_interval = 10  # steps between lines of progress
keep_checkpoints = 2  # ckpt.pt and the versions before it: ckpt.1.pt …
max_bad_steps = 10  # give up after so many updates in a row with a loss or gradient that is not finite
sample_start = '\n'  # text that the live sample continues; of pairs it answers the first held-out source
sample_tokens = 100  # length of the live sample; 0 = none
tensorboard_log = False  # write out_dir/tensorboard
wandb_log = False  # report to Weights & Biases
wandb_project = 'flatgpt'  # its project
wandb_run_name = 'train'  # its name for this run
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best there is
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits where the device is faster so
compile = False  # torch.compile: slow to start, then faster
activation_checkpointing = False  # compute each block again in the backward pass: less memory, a third more time
fsdp = False  # under torchrun: shard parameters, gradients and moments over the processes instead of copying them


def loss_on(model, run, arrays, **options):
    """The model's loss on a batch of NumPy arrays: (idx, targets), of pairs also (source, source_mask)."""
    names = ('idx', 'targets', 'source', 'source_mask')[:len(arrays)]
    return model(**dict(zip(names, run.to_device(*arrays), strict=True)), **options)


@torch.no_grad()
def evaluate(model, data, windows, run, token_bytes):
    """Loss on evenly spaced windows, or pairs, of a split, the same every time -> (nats per token, bits per byte)."""
    starts = data.fixed(windows)
    mine, share = starts[run.rank::run.world_size], -(-len(starts) // run.world_size)
    nats = tokens = n_bytes = 0
    rows = max(batch_size, 4096 // data.block_size)
    model.eval()
    for i in range(0, share, rows):
        counts = i < len(mine)  # shards are gathered by all processes together, so each makes as many passes
        arrays = data.read(mine[i:i + rows] if counts else starts[:1])
        with run.autocast(data.block_size):
            loss = loss_on(model, run, arrays, reduction='sum').item()
        if counts:
            y = arrays[1][arrays[1] != -100]
            nats, tokens, n_bytes = nats + loss, tokens + y.size, n_bytes + int(token_bytes[y].sum())
    model.train()
    nats, tokens, n_bytes = run.sum(nats, tokens, n_bytes)
    return nats / tokens, nats / math.log(2) / max(1, n_bytes)


def router_metrics(stats, due):
    """What `GPT.routed` summed up (n_sparse, E + 1), and how many tokens were due at an expert -> metrics.

    router/max_load: the fullest expert's load over the mean, of the worst layer; router/load: each expert's share, a
    row per layer; router/entropy: nats of a token's distribution over experts; router/dropped: tokens nobody computed.
    """
    load = stats[:, :-1]
    total = load.sum(1, keepdim=True)
    rows = [[round(x, 4) for x in row] for row in (load / total).tolist()]
    return {'router/max_load': (load / total).max().item() * load.shape[1], 'router/load': rows,
            'router/entropy': (stats[:, -1:] / total).mean().item(), 'router/dropped': due - int(load.sum())}


def exact_match(model, data, count, run):
    """The share of evenly spaced held-out pairs whose greedy answer is the target, to its last token and no further."""
    chosen, eot, right = data.fixed(count), data.tokenizer.eot, 0
    mine, rows = chosen[run.rank::run.world_size], max(batch_size, 4096 // data.block_size)
    with run.gathered(model):
        for i in range(0, len(mine), rows):
            sources, targets = zip(*map(data.pair, mine[i:i + rows]), strict=True)
            answers = model.generate([[eot]] * len(sources), max(map(len, targets)) + 1, temperature=0, stop_ids=(eot,),
                                     sources=sources, vocab_limit=data.tokenizer.n_vocab)
            right += sum(answer == [*target, eot] for answer, target in zip(answers, targets, strict=True))
    return run.sum(right)[0] / len(chosen)


def main():
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_loop(config)
    for key in ('lora_rank', 'quant'):
        if given.get(key):
            raise UserError(f'{key}={given[key]!r} freezes the model, and pretraining trains all of it: drop --{key}')
    run = runtime.Run(config)
    if compile and given.get('n_expert') and run.dtype == 'float32':
        raise UserError('compile=True with n_expert needs dtype=bfloat16: grouped products compile in 16 bits only')
    state, origin, resumed = run.begin(load_state)
    if given.get('score_head') or state and state['model_args'].get('score_head'):
        what = 'score_head' if given.get('score_head') else f'{origin}, a reward model'
        raise UserError(f'{what}: scores are learnt from preferences, with reward.py')

    # data and model
    model_args = (state['model_args'] if state else {}) | given
    with runtime.user_errors():
        model_config = GPTConfig(**model_args)  # a mistake is found before anything is fetched
    block_size, n_encoder_layer = model_config.block_size, model_config.n_encoder_layer
    run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    folder, pairs = find_dataset(dataset), n_encoder_layer > 0
    kind = kind_of(folder)
    if kind == 'chats':
        raise UserError(f'{folder} holds chats, which are for sft.py: train.py learns from running text or from pairs')
    if pairs != (kind == 'pairs'):
        raise UserError(f'n_encoder_layer={n_encoder_layer} ' + (
            f'needs pairs of source and target, and {folder} holds running text: --dataset=reverse has some' if pairs
            else f'leaves nothing to read the sources of {folder}, which holds pairs: set it to 1 or more'))
    train_data, val_data = ((PairData if pairs else TokenData)(folder, split, block_size, seed)
                            for split in ('train', 'val'))
    tokenizer = train_data.tokenizer
    model_args.setdefault('vocab_size', tokenizer.n_vocab)
    if model_args['vocab_size'] < tokenizer.n_vocab:
        raise UserError(f'vocab_size={model_args["vocab_size"]} is smaller than the {tokenizer.n_vocab} tokens of '
                        f'{folder}')
    start_text, start_ids, sources = sample_start, tokenizer.encode(sample_start) or [tokenizer.eot], None
    if pairs:
        start_ids, sources = [tokenizer.eot], [val_data.pair(0)[0]]
        start_text = f'{tokenizer.decode(sources[0])} -> '
    with runtime.user_errors():
        model_args = asdict(GPTConfig(**model_args))
        # the live sample's, and that the model is causal at all
        check_prompts([start_ids], GPTConfig(**model_args), sources)
    if state:
        for key, value in state['model_args'].items():
            if model_args.get(key) != value and key != 'dropout':
                raise UserError(f'{origin} was trained with {key}={value}, not {model_args.get(key)}: drop --{key}, or '
                                'start a new run with --init_from=scratch')
        if not tokenizer.same_as(state['tokenizer']):
            raise UserError(f'{origin} was trained with another vocabulary ({state["tokenizer"].get("name")}) than '
                            f'{folder} is prepared with ({tokenizer.name})')
    with runtime.user_errors(origin):
        model = GPT.from_state(state, **model_args) if state else GPT(GPTConfig(**model_args))
    net = run.wrap(model)
    with runtime.user_errors():
        optimizers = model.configure_optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), embed_lr,
                                                muon_lr, muon_momentum)
    step, tokens_seen, rows_seen, clock = 0, 0, 0, runtime.Clock()
    if resumed:
        run.restore(state, origin, optimizers)
        step, tokens_seen, clock = state['iter'], state['tokens'], runtime.Clock(state['seconds'])
        rows_seen = state.get('rows', tokens_seen // block_size)
    origin = f'{origin}, step {state["iter"]:,}' if state else 'scratch'
    state = None

    # of pairs the targets count, in the mean
    rows_per_step, tokens_read = gradient_accumulation_steps * batch_size, 0
    tokens_per_step = round(rows_per_step * train_data.row_tokens)
    token_bytes = tokenizer.token_bytes()
    flops = model.flops_per_token(round(train_data.row_tokens))

    def measure():
        """Losses of today's weights on the fixed windows of both splits."""
        windows = eval_iters * batch_size or len(val_data.fixed(0))
        train_loss, _ = evaluate(net, train_data, windows, run, token_bytes)
        val_loss, bpb = evaluate(net, val_data, windows, run, token_bytes)
        metrics = {'iter': step, 'train/eval_loss': train_loss, 'val/loss': val_loss,
                   'val/ppl': math.exp(min(val_loss, 99)), 'val/bpb': bpb, 'seconds': clock.read()}
        return metrics | ({'val/exact': exact_match(model, val_data, eval_pairs, run)} if pairs else {})

    clock.pause()
    metrics = None if resumed else measure()  # before anything is written: what is wrong with the data shows here
    run.open(step if resumed else None)
    run.catch_signals()
    epochs = max_iters * tokens_per_step / train_data.n_tokens
    run.say(f'{folder}: {train_data.n_tokens:,} tokens to train on, {val_data.n_tokens:,} held out ({tokenizer.name})\n'
            f'{model.num_params():,} parameters from {origin} on {run.world_size} x {run.device}, {run.dtype}; '
            f'{max_iters:,} steps of {tokens_per_step:,} tokens: {epochs:.2f} epochs')

    def look(metrics):
        """Logs what was measured after `step` steps, shows a sample and saves the state."""
        run.log(metrics)
        run.say('step {iter}: train loss {train/eval_loss:.4f}, val loss {val/loss:.4f}, perplexity {val/ppl:.2f}, '
                '{val/bpb:.4f} bits per byte, {seconds:.1f} s of training'.format_map(metrics)
                + (f', {metrics["val/exact"]:.1%} exact' if pairs else ''))
        if sample_tokens:
            with run.gathered(model):
                if run.main:
                    ids = model.generate([start_ids], sample_tokens, temperature=0.8, stop_ids=(tokenizer.eot,),
                                         seed=seed, vocab_limit=tokenizer.n_vocab, sources=sources)[0]
                    run.sample(step, start_text + tokenizer.decode([t for t in ids if t != tokenizer.eot]))
        save(metrics['val/loss'])

    def save(val_loss=math.inf):
        run.checkpoint({'model': model.state_dict(), 'model_args': model_args, 'tokenizer': tokenizer.to_dict(),
                        'iter': step, 'tokens': tokens_seen, 'rows': rows_seen, 'seconds': clock.read()},
                       optimizers, val_loss)

    def micro_loss(number):
        """Of the step's micro-batches, of all processes, that of this number: its mean loss.

        Where micro-batches differ in tokens (pairs), it is weighted so that the mean over the step is that over tokens.
        """
        nonlocal tokens_read
        first = rows_seen + number * batch_size  # counts all rows of the run, whatever its batches were
        arrays = train_data.batch(first, batch_size)
        tokens_read += arrays[0].size
        of_step = train_data.n_targets(rows_seen, rows_per_step) / gradient_accumulation_steps
        run.seed(first)
        with run.autocast(block_size):
            return loss_on(net, run, arrays) * (train_data.n_targets(first, batch_size) / of_step)

    if not resumed:
        look(metrics)
    run.settle(net, lambda: micro_loss(run.rank))
    model.router_stats, routed, tokens_read = None, None, 0
    clock.resume()
    logged_step, logged_seconds, looked, stop = step, clock.read(), step, 0
    while step < max_iters and not (stop := run.stopping()):
        total, grad_norm = run.step(net, model, optimizers, micro_loss, step)
        if model.sparse:
            stats = run.total(model.routed())
            model.balance(stats[:, :-1])
            routed = stats.double() if routed is None else routed + stats
        step += 1
        tokens_seen, rows_seen = tokens_seen + tokens_per_step, rows_seen + rows_per_step
        if step % max_bad_steps == 0:
            run.check_updates(step)

        if step % log_interval == 0 or step == max_iters:
            run.check_updates(step)
            loss, fed = run.sum(total.item(), tokens_read)  # here the host waits for the device
            seconds = clock.read()
            rate = (step - logged_step) * tokens_per_step / (seconds - logged_seconds)
            metrics = {'iter': step, 'train/loss': loss / run.world_size, 'lr': run.lr, 'grad_norm': grad_norm.item(),
                       'tok_per_sec': rate, 'seconds': seconds, 'flops': rate * flops}
            if routed is not None:
                metrics |= router_metrics(routed, int(fed) * model.config.n_expert_active * len(model.sparse))
            run.report(metrics, (max_iters - step) * tokens_per_step / rate)
            logged_step, logged_seconds, routed, tokens_read = step, seconds, None, 0
        if step % eval_interval == 0 or step == max_iters:
            clock.pause()
            look(measure())
            clock.resume()
            looked, logged_step, logged_seconds = step, step, clock.read()

    if stop and looked != step:
        clock.pause()
        save()
    run.finish(step, stop, parameters=model.num_params(), tokens=tokens_seen)
    run.say(f'done: best validation loss {run.best:.4f}; read what it writes: python sample.py --init_from={out_dir}'
            + ' --source=TEXT' * pairs)


if __name__ == '__main__':
    runtime.cli(main)
