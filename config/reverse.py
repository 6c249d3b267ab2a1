"""The Transformer of "Attention Is All You Need" (arXiv:1706.03762), small: it reverses words after two minutes."""
out_dir = 'out/reverse'
dataset = 'reverse'
batch_size = 64
block_size = 32

n_encoder_layer = 2
n_layer = 2
n_head = 4
n_embd = 128
norm_place = 'post'
pos = 'sinusoidal'

max_iters = 1500
learning_rate = 1e-3
warmup_iters = 200
weight_decay = 0.0
beta2 = 0.98
grad_clip = 1.0

eval_interval = 500
eval_iters = 0
eval_pairs = 0
sample_tokens = 20
