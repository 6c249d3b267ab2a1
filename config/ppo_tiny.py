"""PPO on two cores: the model of config/sft_tiny.py learns word problems from the reward model in out/reward."""
out_dir = 'out/ppo'
init_from = 'out/sft'
base = 'out/sft'
dataset = 'wordproblems'
rewards = 'model'
reward_model = 'out/reward'

prompts_per_step = 512
batch_size = 128
gradient_accumulation_steps = 1
num_epochs = 1
max_iters = 60
optimizer = 'muon'
muon_lr = 0.001
learning_rate = 1e-4
critic_lr = 1e-3
kl_coef = 0.05
grad_clip = 0.0

eval_interval = 20
eval_rows = 500
max_new_tokens = 96
