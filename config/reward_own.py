"""A reward model of the mistakes that the model of config/sft_mixed.py makes itself: see data/pairs/prepare.py."""
out_dir = 'out/reward_own'
init_from = 'out/sft_mixed'
dataset = 'own_pairs'
score_likelihood = True

batch_size = 16
max_iters = 300
optimizer = 'muon'
muon_lr = 0.0005
learning_rate = 1e-4
beta2 = 0.99
grad_clip = 0.0
lr_schedule = 'linear'
warmup_iters = 20

eval_interval = 100
eval_rows = 0
