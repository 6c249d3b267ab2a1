"""Word problems: every second layer of the model of config/grpo_tiny.py learns what rewards have taught the whole."""
out_dir = 'out/distill_words'
teacher = 'out/grpo'
init_from = 'teacher'
n_layer = 2
dataset = 'wordproblems_mixed'
tools = True

alpha = 1.0
batch_size = 8
max_iters = 1500
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
embed_lr = 9e-3
weight_decay = 0.0
beta2 = 0.99
grad_clip = 0.0
lr_schedule = 'wsd'
warmup_iters = 20

eval_interval = 500
eval_rows = 500
max_new_tokens = 160
