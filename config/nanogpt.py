"""nanoGPT's recipe for a CPU: a GPT-2 of 0.8 M parameters on tinyshakespeare's characters, 2,000 steps of AdamW."""
out_dir = 'out/nanogpt'
dataset = 'tinyshakespeare'
batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
bias = False
dropout = 0.0

max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
lr_decay_iters = 2000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0
dtype = 'float32'

eval_interval = 250
eval_iters = 0
