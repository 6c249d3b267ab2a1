"""A reward model on two cores: the model of config/sft_tiny.py learns which of two worked solutions is better."""
out_dir = 'out/reward'
init_from = 'out/sft'
dataset = 'wordproblems'
score_likelihood = True

batch_size = 16
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
