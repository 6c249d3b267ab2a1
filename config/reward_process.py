"""A process reward model on two cores: the model of config/sft_tiny.py learns which steps of a solution are right."""
out_dir = 'out/process'
init_from = 'out/sft'
base = 'out/sft'
dataset = 'wordproblems'
loss_type = 'process'
score_steps = 'min'
score_likelihood = True

batch_size = 32
max_iters = 500
optimizer = 'muon'
muon_lr = 0.005
learning_rate = 1e-3
beta2 = 0.99
grad_clip = 0.0
lr_schedule = 'wsd'
warmup_iters = 20

eval_interval = 250
eval_rows = 0
