"""Shakespeare in two to three minutes on two cores: Qwen3's shape, small, and a modern recipe on the complete works."""
out_dir = 'out/tiny'
dataset = 'shakespeare'
batch_size = 8
block_size = 256

n_layer = 4
n_head = 2
n_embd = 128
pos = 'rope'
norm = 'rmsnorm'
qk_norm = True
mlp = 'swiglu'
bias = False
tie_weights = False
init_std = 0.0
zero_init = True

max_iters = 900
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
embed_lr = 9e-3
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 0.0
lr_schedule = 'wsd'
warmup_iters = 20

eval_interval = 180
eval_iters = 20
