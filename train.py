"""
Pretraining: a language model learns real text by predicting the next token.

    python train.py config/tiny.py                               two minutes on two cores, Shakespeare
    python train.py config/tiny.py --n_layer=6 --max_iters=3000  any knob below, or any field of GPTConfig
    python train.py config/tiny.py --init_from=resume            resumes from out_dir/ckpt.pt
    python train.py config/tiny.py --init_from=out/tiny --n_expert=8 --out_dir=out/upcycled    its MLPs become experts
    python train.py config/tiny.py --n_future=3 --out_dir=out/future    three heads for the tokens after the next
    python train.py config/reverse.py                            an encoder-decoder, on pairs of source and target
    torchrun --standalone --nproc_per_node=2 train.py config/tiny.py --gradient_accumulation_steps=2 [--fsdp=True]

Papers: Language Models are Unsupervised Multitask Learners (Radford et al. 2019), Attention Is All You Need
(arXiv:1706.03762), AdamW (arXiv:1711.05101), cosine decay (arXiv:1608.03983), warmup-stable-decay (arXiv:2404.06395),
Muon (arXiv:2502.16982), sparse upcycling (arXiv:2212.05055), multi-token prediction (arXiv:2404.19737), label smoothing
(arXiv:1512.00567).
"""
import math
from dataclasses import asdict

import runtime  # before torch: it sets an OpenMP variable that torch reads when it is imported

import torch

from dataset import PairData, TokenData, find_dataset, kind_of
from generate import check_prompts, generate
from grade import ratio_interval
from load import VERSION, build_model, check_same_model, load_state, read_checkpoint, upcycle
from model import GPT, GPTConfig
from optim import lr_factor, make_optimizers
from tokenizer import UserError

# where and what
out_dir = 'out/train'  # directory of the run: checkpoints, metrics, samples
init_from = 'scratch'  # 'scratch', a model as sample.py takes it, 'resume', 'auto:MODEL': resume if out_dir has a run
upcycle_noise = 0.0  # init_from a dense model, with n_expert: noise on the experts' copies of its MLPs, in their std
dataset = 'shakespeare'  # folder in data/ (prepared if it is not yet), or a path to a prepared folder
seed = 1337  # of initial weights, order of the data, dropout and samples
# model: every field of GPTConfig in model.py is a knob, too: --n_layer, --n_head, --n_embd, --block_size, --dropout …
# batches
batch_size = 12  # windows, or pairs, per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step, over all processes together
max_iters = 2000  # steps
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest
learning_rate = 6e-4  # peak learning rate of AdamW
embed_lr = 0.0  # peak learning rate of the token embedding; 0 = learning_rate
muon_lr = 0.02  # peak learning rate of Muon
muon_momentum = 0.95  # Nesterov momentum of Muon
weight_decay = 0.1  # applied to matrices only
future_coef = 1.0  # with n_future: weight of the mean loss of the further heads; n_future = the sum, as in the paper
label_smoothing = 0.0  # share of each target's probability that is spread over all tokens; 0.1 in the 2017 paper
beta1 = 0.9  # AdamW: decay rate of the first moment
beta2 = 0.95  # AdamW: decay rate of the second moment
grad_clip = 1.0  # maximum gradient norm; 0 = no clipping
# schedule
lr_schedule = 'cosine'  # after the warmup: 'cosine', 'linear', 'wsd' (constant, then linear) or 'constant'
warmup_iters = 100  # steps of linear warmup
lr_decay_iters = 0  # step at which the learning rate reaches min_lr; 0 = max_iters
min_lr = 0.0  # final learning rate; every group decays by the same factor
decay_frac = 0.5  # 'wsd': fraction of lr_decay_iters that the final decay takes
# evaluation and logging
eval_interval = 250  # steps between evaluations; each prints a sample and saves a checkpoint
eval_iters = 20  # batches per split and evaluation, always the same; 0 = as many as the validation split has
eval_pairs = 256  # pairs: validation sources decoded greedily for val/exact, always the same; 0 = all
log_interval = 10  # steps between lines of the log
keep_checkpoints = 2  # checkpoints to keep: ckpt.pt, and older ones as ckpt.1.pt …
max_bad_steps = 10  # stop after this many skipped updates in a row (loss or gradient not finite)
sample_start = '\n'  # prompt of the sample; of pairs it is the first validation source
sample_tokens = 100  # length of the sample at each evaluation; 0 = none
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

CPU_FLOPS = 1e11  # of a core, at best: for a word about how long training takes
# allowed values of the knobs, checked in main; runtime.RANGES has those of the knobs that stages share
RANGES = runtime.RANGES | dict.fromkeys(('eval_iters', 'eval_pairs', 'sample_tokens', 'upcycle_noise', 'future_coef'),
                                      '>= 0') | {'label_smoothing': '>= 0 and < 1'}


def tensors_of(run, arrays):
    """NumPy arrays (idx, targets), for pairs also (source, source_mask) -> keyword arguments of the model."""
    names = ('idx', 'targets', 'source', 'source_mask')[:len(arrays)]
    return dict(zip(names, run.to_device(*arrays), strict=True))


@torch.no_grad()
def evaluate(model, data, n_windows, run, token_bytes, batch_size=12):
    """Loss on evenly spaced windows (or pairs) of a split, always the same -> (nats per token, bits per byte, metrics:
    the 95 % intervals of both, over batches)."""
    starts = data.fixed(n_windows)
    local = starts[run.rank::run.world_size]
    n_local = math.ceil(len(starts) / run.world_size)  # the same in every process, as FSDP needs: all forward together
    rows = max(batch_size, 4096 // data.block_size)  # without gradients there is room for 4,096 tokens
    nats = tokens = n_bytes = 0
    parts = {}  # the same three of each batch
    model.eval()
    for batch in run.counted(-(-n_local // rows), 'evaluating'):
        i = batch * rows
        counts = i < len(local)
        arrays = data.read(local[i:i + rows] if counts else starts[:1])
        with run.autocast(data.block_size):
            loss = model(**tensors_of(run, arrays), reduction='sum').item()
        if counts:
            y = arrays[1][arrays[1] != -100]
            parts[run.rank, i] = loss, y.size, int(token_bytes[y].sum())
            nats += loss
            tokens += y.size
            n_bytes += parts[run.rank, i][2]
    model.train()
    nats, tokens, n_bytes = run.sum(nats, tokens, n_bytes)
    losses, sizes, sizes_in_bytes = zip(*run.collect(parts).values(), strict=True)
    low, high = ratio_interval(losses, sizes)
    bpb_low, bpb_high = (nats / math.log(2) for nats in ratio_interval(losses, sizes_in_bytes))
    ranges = {'val/loss_low': low, 'val/loss_high': high, 'val/bpb_low': bpb_low, 'val/bpb_high': bpb_high}
    return nats / tokens, nats / math.log(2) / max(1, n_bytes), ranges


def router_metrics(stats):
    """Metrics of routing from the sums of `GPT.routed`, tokens of each expert and entropies (n_sparse, E + 1).

    router/max_load: the highest load of an expert over the mean load, maximum over layers; router/load: the fraction
    of each expert, one row per layer; router/entropy: of a token's distribution over experts, in nats.
    """
    load = stats[:, :-1]
    total = load.sum(1, keepdim=True)
    rows = [[round(x, 4) for x in row] for row in (load / total).tolist()]
    return {'router/max_load': (load / total).max().item() * load.shape[1], 'router/load': rows,
            'router/entropy': (stats[:, -1:] / total).mean().item()}


def exact_match(model, data, count, run, batch_size=12):
    """Fraction of evenly spaced validation pairs whose greedy decoding equals the target, including its end."""
    chosen, eot = data.fixed(count), data.tokenizer.eot
    local = chosen[run.rank::run.world_size]
    rows = max(batch_size, 4096 // data.block_size)
    n_correct = 0
    with run.unsharded(model):
        for i in range(0, len(local), rows):
            sources, targets = zip(*map(data.pair, local[i:i + rows]), strict=True)
            answers = generate(model, [[eot]] * len(sources), max(map(len, targets)) + 1, temperature=0,
                               stop_ids=(eot,), sources=sources, vocab_limit=data.tokenizer.n_vocab)
            n_correct += sum(answer == [*target, eot] for answer, target in zip(answers, targets, strict=True))
    return run.sum(n_correct)[0] / len(chosen)


def load_data(run, dataset, block_size, n_encoder_layer, seed):
    """Finds a dataset, prepared if it is not yet -> (folder, training split, validation split)."""
    folder = run.on_main(lambda: find_dataset(dataset))  # one process prepares it, the others wait
    kind, pairs = kind_of(folder), n_encoder_layer > 0
    if kind == 'chats':
        raise UserError(f'{folder} holds chats, which are for sft.py: train.py learns from running text or from pairs')
    if pairs and kind != 'pairs':
        raise UserError(f'n_encoder_layer={n_encoder_layer} needs pairs of source and target, and {folder} holds '
                        'running text: --dataset=reverse has some')
    if kind == 'pairs' and not pairs:
        raise UserError(f'n_encoder_layer={n_encoder_layer} leaves nothing to read the sources of {folder}, which '
                        'holds pairs: set it to 1 or more')
    Data = PairData if pairs else TokenData
    return folder, *(Data(folder, split, block_size, seed) for split in ('train', 'val'))


def main():
    # config files and --key=value set the knobs above, and the fields of GPTConfig, a model's shape: those are given
    config, given = runtime.configure(globals(), GPTConfig)
    runtime.check_ranges(config, RANGES)
    run = runtime.Run(out_dir, device, dtype, seed, fsdp)
    run.check_accumulation(gradient_accumulation_steps)

    # checkpoint to start from
    resume_from = run.find_checkpoint(init_from)
    source = init_from.removeprefix('auto:')
    checkpoint, origin = None, resume_from or source
    if resume_from:
        checkpoint = read_checkpoint(resume_from, mmap=fsdp)
    elif source != 'scratch':
        checkpoint = load_state(source)
    if checkpoint and 'lora_args' in checkpoint:
        raise UserError(f'{origin} has adapters beside frozen weights, and pretraining trains all weights of a model: '
                        'train it on with sft.py')
    if checkpoint and 'score_args' in checkpoint:
        raise UserError(f'{origin} is a reward model: scores are learnt from preferences, with reward.py')

    # data
    model_args = (checkpoint['model_args'] if checkpoint else {}) | given
    with runtime.user_errors():
        model_config = GPTConfig(**model_args)  # an impossible model is reported before anything is downloaded
    if compile and model_config.n_expert and run.dtype == 'float32':
        raise UserError('compile=True with n_expert needs dtype=bfloat16: grouped products compile in 16 bits only')
    block_size = model_config.block_size
    folder, train_data, val_data = load_data(run, dataset, block_size, model_config.n_encoder_layer, seed)
    tokenizer = train_data.tokenizer
    token_bytes = tokenizer.token_bytes()

    # model
    model_args.setdefault('vocab_size', tokenizer.n_vocab)
    if model_args['vocab_size'] < tokenizer.n_vocab:
        raise UserError(f'vocab_size={model_args["vocab_size"]} is smaller than the {tokenizer.n_vocab} tokens of '
                        f'{folder}')
    pairs = model_config.n_encoder_layer > 0
    start_ids = [tokenizer.eot] if pairs else tokenizer.encode(sample_start) or [tokenizer.eot]
    sources = [val_data.pair(0)[0]] if pairs else None
    with runtime.user_errors():
        model_config = GPTConfig(**model_args)
        check_prompts([start_ids], model_config, sources)  # the sample's; and the model is causal
    dense = checkpoint is not None and not checkpoint['model_args'].get('n_expert')
    upcycling = dense and model_config.n_expert > 0 and not resume_from
    if upcycle_noise and not upcycling and not resume_from:
        raise UserError(f'upcycle_noise={upcycle_noise} is for experts that are made from a dense model: give that as '
                        '--init_from, and --n_expert')
    if upcycling:
        with runtime.user_errors(origin):
            checkpoint = upcycle(checkpoint, model_config, upcycle_noise)
    if checkpoint:
        check_same_model(model_config, checkpoint['model_args'], origin)
        if not tokenizer.same_as(checkpoint['tokenizer']):
            raise UserError(f'{origin} was trained with another vocabulary ({checkpoint["tokenizer"].get("name")}) '
                            f'than {folder} is prepared with ({tokenizer.name})')
    with runtime.user_errors(origin):
        model = build_model(checkpoint, asdict(model_config)) if checkpoint else GPT(model_config)
    net = run.wrap(model, compile, activation_checkpointing)  # model in DDP, FSDP or torch.compile: call this one
    with runtime.user_errors():
        optimizers = make_optimizers(model.named_parameters(), optimizer, learning_rate, weight_decay, (beta1, beta2),
                                     embed_lr, muon_lr, muon_momentum)

    # resume
    step, tokens_seen, rows_seen, clock = 0, 0, 0, runtime.Clock()
    if resume_from:
        run.resume(checkpoint, origin, optimizers, config)
        step, tokens_seen, clock = checkpoint['iter'], checkpoint['tokens'], runtime.Clock(checkpoint['seconds'])
        rows_seen = checkpoint.get('rows', tokens_seen // block_size)  # checkpoints before there were pairs have none
    last_eval = step if resume_from else -1  # a resumed run does not repeat the evaluation of its checkpoint
    origin = f'{origin}, step {checkpoint["iter"]:,}{", upcycled" * upcycling}' if checkpoint else 'scratch'
    checkpoint = None  # frees its memory

    micro_steps = gradient_accumulation_steps // run.world_size  # micro-batches of this process
    rows_per_step = gradient_accumulation_steps * batch_size
    tokens_per_step = round(rows_per_step * train_data.row_tokens)  # pairs: mean number of target tokens
    run.open(config, step if resume_from else None, tensorboard_log, wandb_log, wandb_project, wandb_run_name)
    run.catch_signals()
    epochs = max_iters * tokens_per_step / train_data.n_tokens
    run.announce(
        f'{folder}: {train_data.n_tokens:,} training tokens, {val_data.n_tokens:,} held out ({tokenizer.name})\n'
        f'{model.num_params():,} parameters from {origin} on {run.world_size} x {run.device}, {run.dtype}; '
        f'{max_iters:,} steps of {tokens_per_step:,} tokens: {epochs:.2f} epochs'
        + '; what is read so often is learned by heart: watch the validation loss' * (epochs > 10))
    flops = max_iters * tokens_per_step * model.flops_per_token(round(train_data.row_tokens))
    hours = flops / (torch.get_num_threads() * run.world_size * CPU_FLOPS) / 3600
    if run.device_type == 'cpu' and hours > 1:
        run.print0(f'this takes {hours:,.0f} hours at least on these cores; config/tiny.py is made for two of them')

    # DDP fixes the order in which it sums gradients in its first backward pass. One whose gradients are dropped makes
    # that order the same in a resumed run as in one that was never stopped
    if run.ddp:
        run.seed_dropout(rows_seen + run.rank * batch_size)
        with run.autocast(block_size):
            first_batch = tensors_of(run, train_data.batch(rows_seen + run.rank * batch_size, batch_size))
            run.warm_up_ddp(net, net(**first_batch) + model.future_loss)
    meter = runtime.Meter(run, clock, max_iters, model.flops_per_token(round(train_data.row_tokens)))
    router_stats = None
    clock.start()
    meter.reset(step)
    while True:
        evaluating = step > last_eval and (step % eval_interval == 0 or step == max_iters)
        score = math.inf  # lower is better; without an evaluation it is never the best
        if evaluating:
            clock.stop()
            n_windows = eval_iters * batch_size or len(val_data.fixed(0))  # 0: as many of both as validation has
            train_loss, *_ = evaluate(net, train_data, n_windows, run, token_bytes, batch_size)
            score, bits_per_byte, ranges = evaluate(net, val_data, n_windows, run, token_bytes, batch_size)
            metrics = {'iter': step, 'train/eval_loss': train_loss, 'val/loss': score,
                       'val/ppl': math.exp(min(score, 99)), 'val/bpb': bits_per_byte, **ranges, 'seconds': clock.read()}
            summary = (f'step {step}: train loss {train_loss:.4f}, val loss {score:.4f}, perplexity '
                       f'{metrics["val/ppl"]:.2f}, {bits_per_byte:.4f} bits per byte, {clock.read():.1f} s of training')
            if pairs:
                metrics['val/exact'] = exact_match(model, val_data, eval_pairs, run, batch_size)
                summary += f', {metrics["val/exact"]:.1%} exact'
            run.log(metrics)
            run.print0(summary)
            if sample_tokens:
                with run.unsharded(model):
                    new_ids = generate(model, [start_ids], sample_tokens, temperature=0.8, stop_ids=(tokenizer.eot,),
                                       seed=seed, vocab_limit=tokenizer.n_vocab, sources=sources)[0]
                start_text = f'{tokenizer.decode(sources[0])} -> ' if pairs else sample_start
                run.sample(step, start_text + tokenizer.decode([t for t in new_ids if t != tokenizer.eot], start=False))
            last_eval = step
        stop = run.stop_signal()
        if evaluating or (stop and step > last_eval):
            clock.stop()
            checkpoint = {'version': VERSION, 'model': model.state_dict(), 'model_args': asdict(model_config),
                          'tokenizer': tokenizer.to_dict(), 'iter': step, 'tokens': tokens_seen, 'rows': rows_seen,
                          'seconds': clock.read()}
            run.save_checkpoint(checkpoint, optimizers, score, keep_checkpoints)
            clock.start()
            meter.reset(step)
        if stop or step >= max_iters:
            break

        # the learning rate of this step
        lr_scale = lr_factor(step, lr_schedule, warmup_iters, lr_decay_iters or max_iters, min_lr / learning_rate,
                             decay_frac)
        for group in optimizers.param_groups:  # the embedding and Muon have peaks of their own
            group['lr'] = group.setdefault('initial_lr', group['lr']) * lr_scale

        # forward and backward, over this process's micro-batches; number counts those of all processes
        step_loss = 0.0
        n_targets = train_data.n_targets(rows_seen, rows_per_step)
        for number in run.micro_batches(net, gradient_accumulation_steps):
            first = rows_seen + number * batch_size  # a function of the step: a resumed run takes the next rows
            arrays = train_data.batch(first, batch_size)
            run.seed_dropout(first)  # a function of the seed and the place in the data, not of what ran before
            with run.autocast(block_size):  # the length selects the attention kernel on a CPU
                loss = net(**tensors_of(run, arrays), label_smoothing=label_smoothing)
            # weighted by this micro-batch's part of the step's targets (1 if all have as many), so that the step's loss
            # is the mean over all of them; divided by micro_steps, because DDP and FSDP average over processes
            weight = train_data.n_targets(first, batch_size) / (n_targets / gradient_accumulation_steps)
            step_loss += loss.detach() * weight / micro_steps
            if model.future:  # not in the logged loss either
                meter.add(weight=weight, **{'train/future_loss': model.future_loss.detach()})
                loss = loss + future_coef * model.future_loss
            loss = loss + model.router_loss()  # a mixture of experts: what balances their load; not in the logged loss
            run.backward(loss * weight / micro_steps)
            meter.add(tokens=int((arrays[1] != -100).sum()))

        # clip and update; a gradient that is not finite skips the update, which the device decides: the host need not
        # wait (float16: clip_grad_norm unscales the gradients)
        grad_norm = run.clip_grad_norm(model, optimizers, grad_clip)
        run.skip_if_not_finite(optimizers, grad_norm)
        optimizers.step()
        optimizers.zero_grad()
        if model.sparse:  # experts with too little load get a higher bias, without an auxiliary loss (arXiv:2408.15664)
            stats = run.all_reduce(model.routed())
            model.balance(stats[:, :-1])
            router_stats = stats.double() if router_stats is None else router_stats + stats
        step += 1
        tokens_seen += tokens_per_step
        rows_seen += rows_per_step

        if step % max_bad_steps == 0 or step % log_interval == 0:  # not at every step: the host waits for the device
            run.check_skipped(step, max_bad_steps)
        if step % log_interval == 0 or step == max_iters:
            routing = {} if router_stats is None else router_metrics(router_stats)
            router_stats = None
            meter.log(step, step_loss, grad_norm, learning_rate * lr_scale, **routing)

    run.finish(step, stop, parameters=model.num_params(), tokens=tokens_seen)
    run.print0(f'done: best validation loss {run.best:.4f}; sample from it: python sample.py --init_from={out_dir}'
               + (' --source=TEXT' if pairs else ''))


if __name__ == '__main__':
    runtime.cli(main)
