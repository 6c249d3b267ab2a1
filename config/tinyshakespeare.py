"""A modern recipe on the text of config/nanogpt.py, three quarters of its size: its loss in a fraction of its time."""
out_dir = 'out/tinyshakespeare'
dataset = 'tinyshakespeare'
batch_size = 12
block_size = 64

n_layer = 3
n_head = 2
n_kv_head = 1
n_embd = 128
pos = 'rope'
norm = 'rmsnorm'
qk_norm = True
mlp = 'swiglu'
bias = False
tie_weights = False
init_std = 0.0
zero_init = True

max_iters = 270
optimizer = 'muon'
muon_lr = 0.03
learning_rate = 4e-3
embed_lr = 1.3e-2
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 0.0
lr_schedule = 'wsd'
warmup_iters = 20

eval_interval = 135
eval_iters = 0
