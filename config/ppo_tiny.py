"""PPO on two cores: the model of config/sft_mixed.py learns word problems from the reward model of its own mistakes."""
out_dir = 'out/ppo'
init_from = 'out/sft_mixed'
dataset = 'wordproblems'
rewards = 'model'
reward_model = 'out/reward_own'
tools = True

prompts_per_step = 256
batch_size = 128
num_epochs = 1
max_iters = 60
kl_coef = 0.05
optimizer = 'muon'
muon_lr = 0.001
learning_rate = 1e-3
embed_lr = 1e-4
critic_lr = 1e-3
grad_clip = 0.0
lr_schedule = 'linear'

eval_interval = 20
eval_rows = 500
max_new_tokens = 160
