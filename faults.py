"""
Tests of the tests: does the suite notice when something is wrong? Each fault below is one small mistake that a person
could make, in one place of the source; a suite that passes all the same has a hole there.

    python faults.py                             every fault against the tests that should catch it: about ten minutes
    python faults.py rope_pair gae_lambda        these faults only
    python faults.py rope_pair --all-tests       against the whole suite: does anything at all notice?

For each fault the tree is copied to a temporary folder, one piece of text there is replaced, and pytest runs the tests
that are named beside it. 'caught': a test failed. 'NOT CAUGHT': all passed, or none was selected. 'DOES NOT APPLY': the
text is not in the file exactly once: the source has moved on, fix the table. 'BROKEN': the fault is no honest one, it
does not even run (a syntax error, an unknown name), or pytest itself did not. The same tests must pass without a fault,
which is checked in one run over all of them. Exit status 1 unless all faults are caught.

A new promise deserves a fault here beside its test. Nothing collects this file: it is no part of the suite.
"""
import contextlib
import difflib
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent
LEFT_BEHIND = shutil.ignore_patterns('.git', '.venv', 'out', 'wandb', '*.bin', '*.pt', '*.jsonl')
PATIENCE = 600  # seconds that a trial may take
# what takes most of the time that a run of pytest here needs to begin; nothing of this project's own
IMPORTED_ONCE = ('torch._dynamo', 'torch.distributed.fsdp', 'torch.nn.attention.flex_attention', 'transformers',
                 'tokenizers', 'gguf', 'safetensors.torch', 'tiktoken', 'requests')
# a failure for one of these reasons says that the fault is misspelled, not that a test has noticed it
SLIPS = re.compile(r'^E +((?:Syntax|Name|UnboundLocal|Import|ModuleNotFound)Error.*)', re.M)


class Fault(NamedTuple):
    """old -> new, once, in a file; tests: the pytest -k expression of those that should notice."""
    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    # model.py
    Fault('sinusoids_drowned_by_tokens', 'model.py', "std = config.n_embd ** -0.5  #", 'std = 1.0  #',
          'test_1_1_positions_begin'),
    Fault('sinusoidal_order', 'model.py', 'torch.stack((a.sin(), a.cos()), dim=-1)',
          'torch.stack((a.cos(), a.sin()), dim=-1)', 'test_1_1'),
    Fault('rope_pair', 'model.py', 'x.roll(x.shape[-1] // 2, -1)', 'x.roll(1, -1)', 'test_3_2'),
    Fault('rope_sign', 'model.py', 'torch.cat((-sin, sin), -1)', 'torch.cat((sin, -sin), -1)',
          'test_3_2 or test_1_4 and transformers and llama'),
    Fault('yarn_sharpness', 'model.py', 'sharpen = 0.1 * math.log(config.rope_factor) + 1', 'sharpen = 1.0',
          'test_1_4 and transformers and yarn'),
    Fault('window_off_by_one', 'model.py', 'keys[..., None, :] < config.window)',
          'keys[..., None, :] <= config.window)', 'test_3_5 and hand'),
    Fault('sink_off_by_one', 'model.py', '(keys < config.n_sink)[..., None, :]',
          '(keys < config.n_sink - 1)[..., None, :]', 'test_3_5 and hand'),
    Fault('mask_sees_next', 'model.py',
          'mask = mask & torch.ones(T, T, dtype=torch.bool, device=device).tril()',
          'mask = mask & torch.ones(T, T, dtype=torch.bool, device=device).tril(1)',
          'test_6_2 and packed_conversations or test_1_2 and future'),
    Fault('encoder_is_causal', 'model.py', 'config.causal and not encoder,', 'config.causal,',
          'test_1_5 and real_sources'),
    Fault('encoder_mask_ignored', 'model.py', 'None if source_mask is None else source_mask[:, None, None]',
          'None', 'test_1_5 and real_sources'),
    Fault('blocks_see_ahead', 'model.py', 'torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()',
          'torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device)', 'test_3_6 and in_blocks'),
    Fault('blocks_start_late', 'model.py', 'rows, end = slice(i, i + step), i + step if causal else S',
          'rows, end = slice(i, i + step), i + step - 1 if causal else S', 'test_3_6 and in_blocks'),
    Fault('blocks_hide_nothing', 'model.py', 'masked_fill_(~mask, torch.finfo(q.dtype).min)', 'masked_fill_(~mask, 0)',
          'test_3_6 and in_blocks'),
    Fault('dropout_in_evaluation', 'model.py',
          'y = attend(q, k, v, mask, self.causal, self.scale, self.dropout if self.training else 0.0)',
          'y = attend(q, k, v, mask, self.causal, self.scale, self.dropout)', 'test_2_5 and dropout'),
    Fault('k_norm_forgotten', 'model.py', 'norms = zip((self.q_norm, self.k_norm), heads',
          'norms = zip((self.q_norm, self.q_norm), heads',
          'test_3_1 and of_their_own or test_1_4 and transformers and qwen3'),
    Fault('norm_offset_ignored', 'model.py', 'return 1 + self.weight if self.offset else self.weight',
          'return self.weight', 'test_3_1 and norms_by_hand'),
    Fault('offset_norms_begin_at_one', 'model.py', 'and not config.norm_offset else 0.0)', 'else 0.0)',
          'test_1_4 and initialisation'),
    Fault('output_norm_twice', 'model.py', 'y = norm(y) if norm_out is None else norm_out(y)',
          'y = norm(y)', 'test_1_4 and by_hand'),
    Fault('residual_unscaled', 'model.py', 'y if self.residual_scale == 1 else y * self.residual_scale', 'y',
          'test_1_4 and by_hand'),
    Fault('gate_of_exact_gelu', 'model.py', "F.gelu(gate, approximate='tanh')) * up", 'F.gelu(gate)) * up',
          'test_3_3 and by_hand'),
    Fault('embedding_scale_not_rounded', 'model.py',
          'x * torch.full((), config.embed_scale, dtype=x.dtype, device=x.device)', 'x * config.embed_scale',
          'test_1_4 and scales'),
    Fault('logits_unscaled', 'model.py', 'found = found if config.logit_scale == 1 else [end',
          'found = found if True else [end', 'test_1_4 and scales'),
    Fault('local_layers_as_global', 'model.py', '(context.local_rope if self.local else context.rope)',
          'context.rope', 'test_3_2 and of_their_own'),
    Fault('local_wavelengths_stretched', 'model.py', "rope_theta=config.rope_theta_local, rope_scaling='none')",
          'rope_theta=config.rope_theta_local)', 'test_3_2 and of_their_own'),
    Fault('all_layers_rotate', 'model.py', 'context.rope) if self.rotates else None', 'context.rope)',
          'test_3_2 and without_rotation'),
    Fault('rolling_keys_of_global_wavelengths', 'model.py', 'self.rope(cache.key_positions, True)',
          'self.rope(cache.key_positions)', 'test_3_5 and caches'),
    Fault('rolling_keys_rotate_anywhere', 'model.py', 'if rolling and rope is not None:', 'if rolling:',
          'test_3_5 and caches'),
    Fault('far_sinks_of_global_wavelengths', 'model.py', 'self.rope(layout.far_positions, True)',
          'self.rope(layout.far_positions)', 'test_3_5 and caches'),
    Fault('gqa_head_order_16_bits', 'model.py', 'q, gqa = q.reshape(shape[0], k.shape[1], -1, shape[3]), False',
          'q, gqa = q.reshape(shape[0], -1, k.shape[1], shape[3]).transpose(1, 2), False',
          'test_3_6 and 16_bits'),
    Fault('post_norm_order', 'model.py',
          "return norm(x) if self.place == 'post' else x", "return x + norm(y) if self.place == 'post' else x",
          'test_1_4 and torch'),
    Fault('pooled_with_padding', 'model.py', '.sum(1) / mask.sum(1, keepdim=True)', '.sum(1) / mask.shape[1]',
          'test_1_5 and pooled'),
    Fault('router_renorm_ignored', 'model.py', 'if self.renorm:', 'if not self.renorm:', 'test_5_1'),
    Fault('router_bias_in_the_weights', 'model.py', 'weights = scores.gather(1, chosen)',
          'weights = (scores + self.choice_bias if self.bias_rate else scores).gather(1, chosen)',
          'test_5_1 and sigmoid'),
    Fault('router_unscaled', 'model.py', 'weights = weights * self.scale', 'weights = weights * 1',
          'test_5_1 and sigmoid'),
    Fault('upcycled_noise_is_absolute', 'load.py', 'noise * matrix.std() * torch.randn_like(new)',
          'noise * torch.randn_like(new)', 'test_5_1 and upcycling'),
    Fault('balance_loss_scale', 'model.py', 'balance = probs.shape[1] * (self.load', 'balance = (self.load',
          'test_5_2 and router_losses'),
    Fault('choice_bias_sign', 'model.py', '(counts.mean() - counts).sign()', '(counts - counts.mean()).sign()',
          'test_5_2 and choice_bias'),
    Fault('softcap_slope', 'model.py', 'slope = 1 - (logits / cap).square() if cap',
          'slope = torch.ones_like(logits) if cap', 'test_2_3 and chunked'),
    Fault('padding_in_loss', 'model.py',
          'chosen = flat[padded].index_fill(0, torch.arange(len(kept), len(padded)), -100)',
          'chosen = flat[padded]', 'test_2_3 and that_count'),
    Fault('temperature_slope', 'model.py', 'return d / within(temperature) if temperature != 1 else d', 'return d',
          'test_8_1 and details'),
    Fault('entropy_slope', 'model.py', 'd = d.mul_(-(g[1][rows] * valid)[:, None])',
          'd = d.mul_((g[1][rows] * valid)[:, None])', 'test_8_1 and details'),
    Fault('router_loss_dropped', 'model.py', 'return sum(moe.aux for moe in self.sparse)',
          'return sum(0 * moe.aux for moe in self.sparse)', 'test_5_2 and router_losses or test_10_2 and routers'),
    Fault('padding_is_balanced', 'model.py', '        if self.sparse and self.training and real is None and targets',
          '        if False and targets', 'test_5_2 and padding'),
    Fault('single_expert_renormalised', 'model.py', 'self.router_renorm and self.n_expert_active > 1',
          'self.router_renorm', 'test_5_2 and one_expert'),
    Fault('dpo_forgets_the_routers', 'dpo.py', 'loss + model.router_loss()', 'loss', 'test_5_2 and every_stage'),
    Fault('decay_on_biases', 'optim.py', "'weight_decay': weight_decay if is_matrix else 0.0",
          "'weight_decay': weight_decay", 'test_4_2 and adamw'),
    Fault('embed_lr_ignored', 'optim.py', "'embedding': embed_lr or learning_rate", "'embedding': learning_rate",
          'test_4_2 and (adamw or muon)'),
    Fault('muon_momentum', 'optim.py', "torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])",
          "torch._foreach_lerp_(momenta, grads, group['momentum'])", 'test_4_2 and muon'),
    Fault('muon_takes_bad_gradients', 'optim.py', 'keep = 1 if self.found_inf is None else 1 - self.found_inf',
          'keep = 1', 'test_2_4 and not_finite'),
    Fault('top_k_off_by_one', 'generate.py', 'logits.topk(min(top_k, logits.shape[-1]))',
          'logits.topk(min(top_k + 1, logits.shape[-1]))', 'test_2_5 and (hand or filters)'),
    Fault('top_p_off_by_one', 'generate.py', 'outside = probs.cumsum(-1) - probs >= top_p',
          'outside = probs.cumsum(-1) >= top_p', 'test_2_5 and (hand or filters)'),
    Fault('min_p_absolute', 'generate.py', 'probs < min_p * probs.amax(-1, keepdim=True)', 'probs < min_p',
          'test_2_5 and (hand or filters)'),
    Fault('repetition_penalty_sign', 'generate.py',
          'row[seen] / repetition_penalty, row[seen] * repetition_penalty)',
          'row[seen] / repetition_penalty, row[seen] / repetition_penalty)', 'test_2_5 and (hand or filters)'),
    Fault('u_of_1_draws_the_last', 'generate.py', 'u.clamp(max=1 - 2 ** -24)', 'u', 'test_2_5 and never_drawn'),
    Fault('nan_becomes_text', 'generate.py', 'if any(map(math.isnan, logprobs)):', 'if False:', 'test_2_5 and no_text'),
    Fault('vocab_limit_ignored', 'generate.py', 'logits = logits[:, :vocab_limit] if vocab_limit else logits',
          'pass', 'test_8_1 and recorded'),
    Fault('temperature_overflows', 'model.py',
          '(logits - logits.detach().amax(-1, keepdim=True)) / within(temperature)', 'logits / temperature',
          'test_2_5 and extreme or test_8_1 and extreme'),
    Fault('penalty_overflows', 'generate.py', 'changed.clamp(-largest, largest)', 'changed', 'test_2_5 and extreme'),
    Fault('logprobs_without_temperature', 'generate.py', 'F.log_softmax(tempered(logits, temperature or 1.0), dim=-1)',
          'F.log_softmax(logits, dim=-1)', 'test_8_1 and recorded'),
    Fault('seeds_shared_by_rows', 'generate.py', 'generator=torch.Generator().manual_seed(s)) for s in seed]',
          'generator=torch.Generator().manual_seed(seed[0])) for s in seed]', 'test_8_1 and sample_depends'),
    Fault('first_stop_id_only', 'generate.py',
          'stop_ids, device = set(stop_ids),', 'stop_ids, device = set(tuple(stop_ids)[:1]),',
          'test_2_5 and several_ids'),
    Fault('cache_mask_off_by_one', 'generate.py', '(keys <= self.positions[..., None])',
          '(keys < self.positions[..., None])', 'test_3_4 and cached_logits'),
    Fault('newcomers_take_others_cache', 'generate.py', 'self.lengths = self.lengths + other.lengths',
          'self.lengths = self.lengths + self.lengths[:1] * len(other.lengths)', 'test_3_4 and rows_join'),
    Fault('cache_not_selected', 'generate.py', '[[x[rows] for x in stored] for stored in self.layers]',
          '[[x[:len(rows)] for x in stored] for stored in self.layers]', 'test_2_5 and row_does_not_depend'),
    Fault('cross_cache_of_layer_1', 'model.py', 'cache.source.get(self)',
          'next(iter(cache.source.values()), None)', 'test_3_4 and cached_encoder_decoder'),
    Fault('ring_window', 'generate.py', '(seen & windowed(queries, keys, config))',
          '(seen & windowed(queries - 1, keys, config))', 'test_3_5 and caches_of_a_window'),
    Fault('int8_scale', 'generate.py', 'weight.float().abs().amax(1) / 127', 'weight.float().abs().amax() / 127',
          'test_3_4 and int8'),
    Fault('lora_scale', 'lora.py', '(math.sqrt(rank) if config.lora_rs else rank)',
          '(rank if config.lora_rs else math.sqrt(rank))', 'test_6_7 and formula'),
    Fault('lora_dropout_always', 'lora.py', 'F.dropout(x, self.dropout, self.training)',
          'F.dropout(x, self.dropout, True)', 'test_6_7 and dropout'),
    Fault('lora_merged_unscaled', 'lora.py', 'self.lora_a.flatten(0, 1).float(), alpha=self.scale)',
          'self.lora_a.flatten(0, 1).float())', 'test_6_7 and merged'),
    Fault('dora_length_of_the_base', 'lora.py', 'lengths = self.direction().norm(dim=1)',
          'lengths = self.frozen().norm(dim=1)', 'test_6_7 and dora_and_its_gradients'),
    Fault('dora_length_has_a_gradient', 'lora.py', 'with torch.no_grad(), torch.autocast(self.lora_a.device.type,',
          'with torch.autocast(self.lora_a.device.type,', 'test_6_7 and dora_and_its_gradients'),
    Fault('dora_scales_the_bias', 'lora.py', 'bias = self.bias if self.lora_magnitude is None else None',
          'bias = self.bias', 'test_6_7 and dora_and_its_gradients'),
    Fault('lora_plus_on_a', 'optim.py', "faster = ('lora_b',", "faster = ('lora_a',", 'test_4_2 and lora_plus'),
    Fault('frozen_base_learns', 'lora.py', 'model.requires_grad_(False)', 'model.requires_grad_(True)',
          'test_6_7 and frozen_base'),
    Fault('nf4_level', 'lora.py', '0.07958029955625534', '0.08958029955625534',
          'test_6_8 and (levels or nearest)'),
    Fault('nf4_nibbles', 'lora.py', 'return high << 4 | low, scales', 'return low << 4 | high, scales',
          'test_6_8 and nearest'),
    Fault('score_one_early', 'model.py', 'last = (mask * torch.arange(x.shape[1], device=x.device)).argmax(1)',
          'last = (mask * torch.arange(x.shape[1], device=x.device)).argmax(1) - 1', 'test_7_3'),
    Fault('likelihood_sign', 'reward_model.py', 'scores - self.score_gain.float() * losses.sum(1)',
          'scores + self.score_gain.float() * losses.sum(1)', 'test_7_3 and likelihood'),
    Fault('steps_count_all_before_them', 'reward_model.py', '(losses - before(losses * ends) if how else losses)',
          'losses', 'test_7_3 and worth'),
    Fault('values_look_ahead', 'reward_model.py', 'F.pad(losses.cumsum(1), (1, 0))[:, :-1]', 'losses.cumsum(1)',
          'test_8_1 and (values or knows_nothing)'),
    # further heads
    Fault('future_targets_of_the_next', 'model.py', 'later[1:].flatten(0, 1)', 'later[:-1].flatten(0, 1)',
          'test_2_7 and (hand or models_that_end)'),
    Fault('future_heads_on_the_last_block', 'model.py', '(block(x, context) for block in (last, ',
          '((x := block(x, context)) for block in (last, ', 'test_2_7 and models_that_end'),
    Fault('future_heads_in_evaluation', 'model.py', 'if self.training and targets is not None and output is None',
          'if targets is not None and output is None', 'test_2_7 and models_that_end'),
    Fault('future_coef_ignored', 'train.py', 'loss + future_coef * model.future_loss', 'loss + model.future_loss',
          'test_2_7 and trained_kept'),
    Fault('future_heads_by_adamw_alone', 'optim.py', '(blocks|encoder|future)', '(blocks|encoder)',
          'test_4_2 and muon_turns'),
    Fault('future_heads_left_in_a_base', 'load.py',
          "base_of(init_from, state) if state['model_args'].get('n_future') else None",
          'None', 'test_2_7 and later_stages'),
    Fault('future_heads_exported_unsaid', 'convert.py', '    say_what_is_left_out(config)\n', '',
          'test_2_7 and later_stages'),
    # speculative.py
    Fault('proposals_accepted_by_half', 'speculative.py', '(u_accept < ratio)', '(u_accept < ratio / 2)',
          'test_3_7 and hand'),
    Fault('proposals_accepted_by_p', 'speculative.py', '/ q.gather(2, at)[..., 0]', '',
          'test_3_7 and (hand or distribution)'),
    Fault('rejected_drawn_from_p', 'speculative.py', 'left = (p - q).clamp(min=0)', 'left = p',
          'test_3_7 and distribution'),
    Fault('rejected_drawn_from_the_difference', 'speculative.py', '(p - q).clamp(min=0)', '(p - q).abs()',
          'test_3_7 and distribution'),
    Fault('all_rejected_after_all', 'speculative.py', '* (accepted < n_drafts)[:, None]', '',
          'test_3_7 and hand'),
    Fault('nothing_left_to_draw', 'speculative.py', 'torch.where(total > 0, left / total, p)', 'left / total',
          'test_3_7 and hand'),
    Fault('a_later_proposal_outlives_a_rejected', 'speculative.py', 'stays.int().cumprod(1).sum(1)',
          'stays.int().sum(1)', 'test_3_7 and (greedy or distribution)'),
    Fault('acceptance_knows_the_proposal', 'speculative.py', 'u[:, :-1, 1], u[..., 2])', 'u[:, :-1, 0], u[..., 2])',
          'test_3_7 and distribution'),
    Fault('rejected_drawn_with_its_acceptance', 'speculative.py', 'u[:, :-1, 1], u[..., 2])',
          'u[:, :-1, 1], u[..., 1])', 'test_3_7 and distribution'),
    Fault('proposals_are_not_filtered', 'speculative.py', 'q.append(probabilities(logits, texts, options))',
          "q.append(probabilities(logits, texts, options | {'temperature': 1.0}))",
          'test_3_7 and own_draft'),
    Fault('rejected_tokens_stay_known', 'speculative.py', 'length - self.starts[b]))', 'length + 1 - self.starts[b]))',
          'test_3_7 and greedy'),
    Fault('heads_of_a_rejected_token', 'speculative.py', '[torch.arange(len(rows)), kept][keep]',
          '[torch.arange(len(rows)), [max(kept)] * len(rows)][keep]', 'test_3_7 and greedy'),
    Fault('penalty_of_earlier_texts', 'speculative.py', 'seen = [text[:length + j]', 'seen = [text[:length]',
          'test_3_7 and greedy'),
    Fault('a_draft_of_any_tokenizer', 'load.py', 'if not own.same_as(tokenizer.to_dict()):', 'if False:',
          'test_3_7 and sample_and_bench'),
    Fault('a_window_forgets_what_it_takes_back', 'speculative.py', '(rolling, f', '(False, f',
          'test_3_7 and impossible'),
    Fault('forced_tokens_wait', 'speculative.py', 'not row.done and not row.forced:', 'not row.done:',
          'test_3_7 and greedy'),
    # runtime.py
    Fault('exit_status', 'runtime.py', 'status = 2\n            _report', 'status = 1\n            _report',
          'test_0_1 and bad_knobs'),
    Fault('warmup_from_zero', 'optim.py', 'return (step + 1) / (warmup + 1)', 'return step / (warmup + 1)',
          'test_4_2 and schedules'),
    Fault('decay_off_by_one', 'optim.py', '(step - begin) / max(1, decay - begin)',
          '(step + 1 - begin) / max(1, decay - begin)', 'test_4_2 and schedules'),
    Fault('accumulation_not_divided', 'train.py',
          'run.backward(loss * weight / micro_steps)',
          'run.backward(loss * weight)', 'test_4_2 and accumulation'),
    Fault('bad_gradient_not_skipped', 'runtime.py',
          'found_inf = 1 - torch.isfinite(grad_norm).float()',
          'found_inf = torch.zeros_like(grad_norm)', 'test_2_4 and not_finite'),
    Fault('grad_clip_ignored', 'runtime.py',
          'torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)',
          'pass', 'test_2_4 and clipped'),
    Fault('clip_norm_of_a_shard', 'runtime.py',
          'norm = torch.nn.utils.get_total_norm([p.grad for p in params])\n'
          '        if self.fsdp:\n'
          '            norm = norm.full_tensor()',
          'norm = torch.nn.utils.get_total_norm([p.grad.to_local() if self.fsdp else p.grad for p in params])',
          'test_4_4 and share_the_batch and fsdp and not muon'),
    Fault('ddp_first_micro_batch', 'runtime.py',
          'net.require_backward_grad_sync = i == count - 1',
          'net.require_backward_grad_sync = i == 0', 'test_4_4 and share_the_batch and adamw and not fsdp'),
    Fault('dropout_same_every_step', 'runtime.py',
          'SeedSequence([self.seed, index])',
          'SeedSequence([self.seed])', 'test_2_4 and drawn_anew'),
    Fault('save_not_atomic', 'runtime.py', '        os.replace(temporary, path)\n    except BaseException',
          '        path.write_bytes(temporary.read_bytes())\n'
          '        temporary.unlink()\n'
          '    except BaseException', 'test_4_3 and every_instant'),
    Fault('save_not_flushed', 'runtime.py', '            os.fsync(file.fileno())\n', '',
          'test_4_3 and on_the_disk'),
    Fault('checksum_not_read', 'runtime.py', 'damaged = archive.testzip()', "damaged = ''",
          'test_4_3 and damaged_checkpoint'),
    Fault('moments_not_restored', 'runtime.py', "optimizer.load_state_dict({'state': old['state'],",
          "optimizer.load_state_dict({'state': {},",
          'test_4_3 and resume_is_exact and adamw'),
    Fault('best_not_restored', 'runtime.py', "self.best = state['best']", 'pass', 'test_4_3 and best_score'),
    Fault('best_by_wrong_sign', 'runtime.py', 'if score < self.best and', 'if not score < self.best and',
          'test_8_3 and highest_reward and grpo'),
    Fault('bad_weights_saved', 'runtime.py',
          "bad = not_finite({k: v for k, v in state.items() if k in ('model', 'optimizers')})", "bad = ''",
          'test_4_3 and not_finite'),
    Fault('metrics_not_rewound', 'runtime.py', "if json.loads(row)['iter'] <= step:",
          "if json.loads(row)['iter'] <= step + 4:", 'test_4_3 and logged_after'),
    # dataset.py
    Fault('separator_across_pieces', 'data/text/prepare.py', 'len(text) - max(1, len(separator))', 'len(text) - 1',
          'test_0_2 and wherever'),
    Fault('blanks_before_a_separator', 'data/text/prepare.py', 'piece.rstrip(BLANK) if ends else piece', 'piece',
          'test_0_2 and wherever'),
    Fault('old_macs_lines_in_rows', 'data/text/prepare.py', ".replace('\\r', '\\n')", '', 'test_0_2 and every_format'),
    Fault('byte_order_mark_in_rows', 'data/text/prepare.py', "'\\n').replace('\\ufeff', '')\n\n\ndef running",
          "'\\n')\n\n\ndef running", 'test_0_2 and every_format'),
    Fault('suffix_in_capitals', 'files.py', 'os.path.splitext(Path(path).name.lower())',
          'os.path.splitext(Path(path).name)', 'test_0_2 and (every_format or left_out)'),
    Fault('letters_not_counted', 'data/text/prepare.py', 'letters.update(specials.findall(piece))', 'pass',
          'test_0_2 and separators_make'),
    Fault('name_that_is_taken', 'dataset.py', "stem += '_text' *", "stem += '' *", 'test_0_2 and not_prepared'),
    Fault('misspelled_plot', 'bench.py', "in (['plot'], ['curves'])", 'in ()', 'test_0_4 and bench_mistakes'),
    Fault('unknown_command_is_a_question', 'sample.py', "if re.fullmatch('/[A-Za-z]+', command):", 'if False:',
          'test_2_5 and can_be_saved'),
    Fault('option_is_a_directory', 'convert.py', "elif arg.startswith('-'):", 'elif False:',
          'test_0_1 and unknown_word'),
    Fault('wsd_jumps_after_a_long_warmup', 'optim.py', 'max(warmup, decay * (1 - decay_frac))',
          'decay * (1 - decay_frac)', 'test_4_2 and torch_and'),
    Fault('schedule_rises', 'runtime.py', 'if 0 < peak < floor:', 'if False:', 'test_4_2 and jump_is'),
    Fault('targets_not_shifted', 'dataset.py', 'rows[:, 1:].astype(np.int64)', 'rows[:, :-1].astype(np.int64)',
          'test_2_2 and hand'),
    Fault('answer_without_end', 'dataset.py', '            targets[i, len(target)] = eot\n', '',
          'test_1_5 and padded'),
    Fault('prompt_in_the_loss', 'dataset.py', 'bool) | train_on_prompt', 'bool) | True',
          'test_6_2 and learned'),
    Fault('train_on_prompt_ignored', 'dataset.py', 'bool) | train_on_prompt', 'bool)', 'test_6_2 and learned'),
    Fault('cut_off_by_one', 'dataset.py', "slice(-block_size - 1, None) if too_long == 'left'",
          "slice(-block_size, None) if too_long == 'left'", 'test_6_2 and too_long'),
    Fault('packed_rows_see_each_other', 'dataset.py', 'segments[b, begin:end] = number',
          'segments[b, begin:end] = 1', 'test_6_2 and packed'),
    Fault('prompt_in_both_splits', 'dataset.py', "(h < first) == (split == 'val')",
          "(h < first if split == 'val' else True)", 'test_6_1 and single_file'),
    Fault('chosen_and_rejected', 'dataset.py', "answers, load = ('chosen', 'rejected')",
          "answers, load = ('rejected', 'chosen')", 'test_7_1'),
    Fault('blanks_are_scored', 'rollout.py', 'answered(model_tokenizer, messages, answer, length, strip=True)',
          'answered(model_tokenizer, messages, answer, length)', 'test_7_4 and blanks'),
    Fault('earlier_answers_count', 'dataset.py', '[*unlearned(prompt), *answer]', '[*prompt, *answer]',
          'test_7_1 and earlier'),
    Fault('any_number_is_right', 'grade.py', 'and last_number(text) == due',
          'and last_number(text) is not None', 'test_6_4 and graded'),
    Fault('minus_lost', 'grade.py', 'return (-above if found[1] else above) / below',
          'return above / below', 'test_6_4 and last_number'),
    Fault('power_of_ten_lost', 'grade.py', "UNSIGNED = rf'{SCIENTIFIC}|{DECIMAL}", "UNSIGNED = rf'{DECIMAL}",
          'test_6_4 and (last_number or gold)'),
    Fault('half_of_gold_is_read', 'grade.py', 'found = GOLD.fullmatch(', 'found = GOLD.match(', 'test_6_4 and gold'),
    Fault('gold_is_not_checked', 'rows.py', "    if 'answer' in found:\n        check", "    if False:\n        check",
          'test_6_1 and no_chat'),
    Fault('sign_lost_in_words', 'grade.py', ', *MARKS.findall(text)]', ']', 'test_6_4 and grader_exact'),
    Fault('words_are_products', 'math_answers.py', "whole = len(found) == 2 and not NO_FORMULA.search("
          "COMMAND.sub('#', found[1]))", 'whole = len(found) == 2', 'test_6_4 and math'),
    Fault('small_numbers_are_zero', 'grade.py', 'spelled_out(text), decimals_of(gold_number(gold)))',
          'spelled_out(text), 6)', 'test_6_4 and mathematics'),
    Fault('every_formula_votes_alone', 'grade.py', 'for vote in (*earlier, text) if', 'for vote in (text,) if',
          'test_10_3 and votes'),
    Fault('thoughts_are_graded', 'grade.py', 'return GRADERS[grader](visible(text), str(gold))',
          'return GRADERS[grader](text, str(gold))', 'test_6_4 and (graded or thoughts)'),
    Fault('wilson_interval', 'grade.py', 'mean + z * z / (2 * n), z *', 'mean + z * z / n, z *',
          'test_6_4 and intervals'),
    Fault('normal_interval', 'grade.py', 'max(1, n - 1) / n)', 'n / n)', 'test_6_4 and intervals'),
    Fault('pass_at_k_biased', 'grade.py', 'return 1 - math.comb(n - c, k) / math.comb(n, k)',
          'return 1 - (1 - c / n) ** k', 'test_6_4 and pass_at_k'),
    Fault('vote_of_last_drawn', 'grade.py', 'return (votes.index(winner), counts[winner])',
          'return (len(votes) - 1 - votes[::-1].index(winner), counts[winner])', 'test_10_3 and majority'),
    # tokenizer.py
    Fault('bpe_merge_order', 'tokenizer.py', 'heap = [(-n, pair) for pair, n in count.items()]',
          'heap = [(-n, pair[::-1]) for pair, n in count.items()]', 'test_4_1 and merges'),
    Fault('short_special_first', 'tokenizer.py', 'sorted(names, key=len, reverse=True)',
          'sorted(names, key=len)', 'test_4_1 and longest'),
    Fault('specials_in_plain_text', 'tokenizer.py', 'if not allow_special:', 'if allow_special:',
          'test_4_1 and special'),
    Fault('half_a_character', 'tokenizer.py',
          'data = self.tokenizer.decode_bytes([token])', 'data = self.tokenizer.decode([token]).encode()',
          'test_2_1 and streaming'),
    Fault('hf_specials_in_plain_text', 'tokenizer.py', 'library.encode_special_tokens = True',
          'library.encode_special_tokens = False', 'test_10_5 and sequences_of_splits'),
    Fault('specials_among_words', 'tokenizer.py', 'if self.forbidden.isdisjoint(ids):', 'if True:',
          'test_10_5 and never_becomes'),
    Fault('blank_at_the_start_stays', 'tokenizer.py', 'self.start = start and tokenizer.strips',
          'self.start = False', 'test_10_5 and sentencepiece_is'),
    Fault('blank_where_text_goes_on', 'tokenizer.py', "for before in () if start or not self.prefix else '\\n.a':",
          'for before in ():', 'test_10_5 and sentencepiece'),
    Fault('blank_where_a_piece_goes_on', 'preparation.py', 'starts, ends, ids = [*ends[-1:], *more[:-1]]',
          'starts, ends, ids = [True] * len(more)', 'test_10_5 and in_pieces'),
    Fault('blank_where_a_batch_goes_on', 'preparation.py', '[*ends[-1:], *more[:-1]]', '[True, *more[:-1]]',
          'test_10_5 and in_pieces'),
    Fault('sentencepiece_merge_order', 'tokenizer.py', 'key=lambda ab: (-scores[', 'key=lambda ab: (scores[',
          'test_10_5 and gguf_of_sentencepiece'),
    Fault('end_of_turn_not_learned', 'chat.py', 'spans.append((len(before), end.end()))',
          'spans.append((len(before), end.start()))', 'test_6_1'),
    Fault('tool_results_learned', 'chat.py', 'bool(span and span[0] <= begin) and not result',
          'bool(span and span[0] <= begin)',
          'test_10_4 and text_of_its_own'),
    Fault('exported_chat_never_stops', 'convert.py', 'list(tokenizer.turn_ids) if', 'list(tokenizer.stop_ids) if',
          'test_6_6 and without_chats'),
    Fault('template_kept_for_ids', 'tokenizer.py', "same = {'name': '', 'chat_template': ''}", "same = {'name': ''}",
          'test_6_1 and of_our_own'),
    # chat.py
    Fault('quoted_markers_count', 'chat.py', 'markers.sub(lambda found: found[0][0] + GUARD + found[0][1:], value)',
          'value', 'test_6_1 and own_tokens'),
    Fault('assistant_thoughts_guarded', 'chat.py', 'self.special if said else self.markers', 'self.markers',
          'test_6_1 and own_tokens'),
    Fault('weight_zero_learned', 'chat.py', "if message['role'] != 'assistant' or message.get('weight') == 0:",
          "if message['role'] != 'assistant':", 'test_6_2 and not_to_be_learned'),
    Fault('weight_zero_of_generation', 'chat.py', 'number % 2 and UNLEARNED not in piece', 'number % 2',
          'test_6_1 and prefixes'),
    Fault('answers_need_not_nest', 'chat.py', 'if not until.startswith(before) or not text.startswith(until):',
          'if False:', 'test_6_1 and real_chat_templates'),
    Fault('generation_without_an_end', 'chat.py', "messages[-1].get('weight') != 0 and not self.ends",
          'False and self.ends', 'test_6_1 and never_ends'),
    Fault('results_in_thoughts_learned', 'chat.py', "for key in ('content', 'thinking', 'reasoning_content') if",
          "for key in ('content',) if", 'test_6_1 and never_ends'),
    Fault('a_word_is_a_variable', 'chat.py', 'if key not in self.variables or', 'if not self.knows(key) or',
          'test_6_1 and never_ends'),
    Fault('thoughts_dropped', 'chat.py', "if thoughts and not self.knows('reasoning_content') and",
          'if False and', 'test_6_1 and of_our_own'),
    Fault('tools_of_a_row_dropped', 'chat.py', "messages[0].get('variables', {}) if messages else {}",
          '{}', 'test_6_1 and (real_chat or cannot_say)'),
    Fault('the_day_moves', 'chat.py', 'datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()',
          'datetime.datetime.now()', 'test_6_1 and the_day'),
    # files.py, and folders with such files
    Fault('table_has_all_keys', 'files.py', ' for key, value in row.items() if value is not None}',
          ' for key, value in row.items()}', 'test_6_1_a_null'),
    Fault('any_column_passes', 'files.py', '    if not any(fits(kind)', '    if False and not any(fits(kind)',
          'test_6_1_a_column'),
    Fault('checksums_unread', 'files.py', 'page_checksum_verification=True', 'page_checksum_verification=False',
          'test_6_1_a_damaged_file'),
    Fault('rows_counted_per_batch', 'files.py', 'number += batch.num_rows', 'number = 1',
          'test_6_1_a_malformed_row_of'),
    Fault('missing_shard_passes', 'dataset.py', 'if first[2] and [int(match[2])', 'if False and [int(match[2])',
          'test_6_1_folders_as'),
    Fault('rows_twice_pass', 'dataset.py', 'if other.group(1, 3, 4) != first.group(1, 3, 4):', 'if False:',
          'test_6_1_folders_as'),
    # what other systems lack
    Fault('folders_opened_everywhere', 'runtime.py', "    if hasattr(os, 'O_DIRECTORY'):", '    if True:',
          'test_0_5_a_run_saves'),
    Fault('moved_with_an_open_lock', 'runtime.py', '                        if WINDOWS:\n',
          '                        if False:\n', 'test_0_5_a_run_saves'),
    Fault('lock_of_the_file_alone', 'runtime.py', '    if earlier and not earlier.closed:\n', '    if False:\n',
          'test_0_5_a_lock'),
    Fault('lock_held_by_another_passes', 'runtime.py', '        raise BlockingIOError\n', '        pass\n',
          'test_0_5_a_lock'),
    Fault('exported_onto_an_empty_folder', 'convert.py', '            directory.rmdir()  #', '            pass  #',
          'test_0_5_an_exported'),
    # rows.py
    Fault('one_weight_of_two', 'rows.py', 'return found if all(weights) else',
          'return found if any(weights or [1]) else', 'test_6_1 and odd_rows'),
    Fault('observation_is_the_user', 'rows.py', "'ipython'), 'tool')}", "'ipython'), 'user')}", 'test_6_1 and wider'),
    Fault('bad_answers_learned', 'rows.py', 'if value is False or', 'if False and', 'test_6_1 and that_decide'),
    Fault('decisive_keys_pass', 'rows.py', "_refuse(REFUSED, {key: self.values[key] for key in left}, '')", 'pass',
          'test_6_1 and that_decide'),
    Fault('prompt_stands_twice', 'rows.py', 'if a[:n] == b[:n] and a[n - len(prompt):n] == asked:', 'if False:',
          'test_7_1 and counts_once'),
    Fault('blanks_make_another_prompt', 'rows.py', "m['content'].strip()} for m in messages]",
          "m['content']} for m in messages]", 'test_7_1 and counts_once'),
    # tokens that are added to a base
    Fault('peft_rows_without_the_mean', 'convert.py', '= _mean_row(state[', '= 0 * _mean_row(state[',
          'test_6_6 and leave_as_peft'),
    Fault('tied_heads_differ', 'load.py', "if config.tie_weights and {'tok_emb.weight'",
          "if not config and {'tok_emb.weight'", 'test_6_7 and head_of_its_own'),
    Fault('new_rows_not_the_mean', 'load.py', 'old.float().mean(0)', 'old.float().sum(0)', 'test_6_6 and new_rows'),
    Fault('new_rows_not_in_the_head', 'lora.py', 'frozen[self.first:] + rows', 'frozen[self.first:] + 0 * rows',
          'test_6_6 and rows_that_are_added'),
    Fault('history_learned', 'dataset.py', "unlearned(row['messages'][:-1]) + row['messages'][-1:] if",
          "row['messages'] if", 'test_6_2 and not_to_be_learned'),
    Fault('split_rows_keep_the_gold', 'dataset.py', 'part = row if i == len(messages) - 1 else {',
          'part = row if True else {', 'test_6_1 and real_chat_templates'),
    Fault('templated_rows_pass', 'dataset.py', 'if len(found) > 1 or any(', 'if len(found) > 9 or any(',
          'test_6_1 and templated_already'),
    Fault('calculator_precedence', 'tokenizer.py', 'value * _factor(tokens, depth) if',
          'value * _sum(tokens, depth) if', 'test_10_4 and calculates'),
    Fault('calculator_minus', 'tokenizer.py', 'else value - _product(tokens, depth))',
          'else value - _sum(tokens, depth))', 'test_10_4 and calculates'),
    # convert.py
    Fault('conv1d_not_transposed', 'convert.py', "tensor.T if family == 'gpt2'", "tensor.T if family == 'gpt3'",
          'test_10_5 and same_here and gpt2'),
    Fault('gguf_pairs_not_permuted', 'gguf_format.py', "args.get('n_kv_head') or args['n_head']} if arch == 'llama'",
          "args.get('n_kv_head') or args['n_head']} if arch == 'lama'", 'test_10_5 and gguf and same_here'),
    Fault('gguf_pairs_written_as_here', 'gguf_format.py', "'attn_k': config.n_kv_head} if arch == 'llama'",
          "'attn_k': config.n_kv_head} if arch == 'lama'", 'test_10_5 and written_is_read'),
    Fault('gemma_norms_as_they_are', 'convert.py', "more = config.norm_offset - (family == 'gemma3_text')", 'more = 0',
          'test_10_5 and models_trained and whole or test_10_5 and that_was_written and gemma3'),
    Fault('gemma_scale_of_the_head', 'convert.py', "0.0 if scalar == args['head_dim'] else scalar ** -0.5", '0.0',
          'test_10_5 and compute_the_same_here and gemma3'),
    Fault('gemma_caps_ignored', 'convert.py', "0.0 if config.get(cap) is None else config.number(cap, 0.0)", '0.0',
          'test_10_5 and compute_the_same_here and gemma3'),
    Fault('gemma_caps_of_attention', 'convert.py', "'attn_logit_softcapping': None, ", '',
          'test_10_5 and a_config_json and gemma3'),
    Fault('local_base_of_global', 'convert.py',
          "base if 'rope_scaling' in args or base != args['rope_theta'] else 0.0", '0.0',
          'test_10_5 and compute_the_same_here and (gemma3 or olmo3)'),
    Fault('six_layers_anyway', 'convert.py', "config.number('sliding_window_pattern', 6)", '6',
          'test_10_5 and gemma_3_is_read'),
    Fault('layers_that_do_not_rotate', 'convert.py', "''.join('NR'[r]", "''.join('RN'[r]",
          'test_10_5 and compute_the_same_here and smollm3'),
    Fault('granite_multiplies', 'convert.py', "args['logit_scale'] = 1 / args['logit_scale']", 'pass',
          'test_10_5 and compute_the_same_here and granite'),
    Fault('gate_is_up', 'convert.py', "('gate', slice(n)), ('up', slice(n, None))",
          "('up', slice(n)), ('gate', slice(n, None))", 'test_10_5 and compute_the_same_here and phi3'),
    Fault('phi3_stretched', 'convert.py', "if family == 'phi3' and args.get('rope_scaling'):", 'if False:',
          'test_10_5 and a_config_json and phi3'),
    Fault('phi3_as_llama_for_peft', 'convert.py', "read_json(there).get('model_type') == 'phi3'", 'False',
          'test_6_7 and phi_3'),
    Fault('mixed_files_are_rounded', 'convert.py', 'functools.reduce(torch.promote_types, {',
          'functools.reduce(lambda a, b: min(a, b, key=lambda t: t.itemsize), {', 'test_10_5 and shards'),
    Fault('gguf_gemma_of_one_base', 'gguf_format.py', "'rope_theta_local': 10000.0}", "'rope_theta_local': 0.0}",
          'test_10_5 and gguf_files_compute and gemma3'),
    Fault('gguf_gemma_all_local', 'gguf_format.py', "'window_pattern': 'LLLLLG'", "'window_pattern': 'L'",
          'test_10_5 and gguf_files_compute and gemma3'),
    Fault('gguf_gemma_27b', 'gguf_format.py', "if args['n_layer'] == 62:", 'if False:', 'test_10_5 and 27_billion'),
    Fault('gguf_gemma_wider_window', 'gguf_format.py', "= config.window\n", "= config.window + 1\n",
          'test_10_5 and that_was_written and gemma3'),
    Fault('terms_unnamed', 'load.py', 'if package.terms:', 'if False:', 'test_10_5 and joined_and'),
    Fault('parts_of_anybody', 'load.py', 'check_sha256(wheel, sha256)', 'pass', 'test_10_5 and joined_and'),
    Fault('merges_by_their_halves', 'tokenizer.py', '(-scores[of[ab]], of[ab], vocab[ab[0]], vocab[ab[1]])',
          '(-scores[of[ab]], vocab[ab[0]], vocab[ab[1]])', 'test_10_5 and one_score'),
    Fault('gguf_templates_without_bos', 'tokenizer.py', "if vocab[token] == get('bos_token_id')", 'if False',
          'test_10_5 and gguf_of_sentencepiece'),
    Fault('gemma_answers_as_assistant', 'chat.py', "'model' if message['role'] == 'assistant' else ", '',
          'test_6_1_real and gemma3'),
    Fault('layers_that_rotate_are_kept', 'distill.py', ', c.rotates(j))', ')', 'test_10_2 and evenly'),
    Fault('gguf_without_a_window', 'convert.py', 'elif any(local) and (gguf and config.window < config.block_size or',
          'elif any(local) and (', 'test_10_5 and compute_otherwise'),
    Fault('gguf_merges_of_words', 'tokenizer.py', 'if starts not in found:', 'if False:',
          'test_10_5 and llama_cpp_has_not'),
    Fault('gguf_scores_as_they_come', 'tokenizer.py', 'if {*pairs} != _halves(vocab) or', 'if False and',
          'test_10_5 and llama_cpp_has_not'),
    Fault('gguf_too_large_for_16_bits', 'gguf_format.py', 'weights.abs().max() >= 65520', 'False',
          'test_10_5 and whole_or_not'),
    Fault('card_of_another_base', 'card.py', "['sha256'] == begun['sha256']:", "['sha256']:",
          'test_10_5 and a_card_says'),
    Fault('one_lack_named', 'convert.py', '{getattr(config, name)!r}\' for name in remedies)',
          '{getattr(config, name)!r}\' for name in [*remedies][:1])', 'test_10_5 and all_that_cannot'),
    Fault('llama3_of_a_gguf', 'gguf_format.py',
          'scaling = llama3_scaling(read_tensor(sources, freqs).numpy(), args, original)',
          'scaling = {}', 'test_10_5 and stretched'),
    Fault('gguf_unknown_keys', 'gguf_format.py', 'value and key not in read | GGUF_IDLE | only.keys()', 'False',
          'test_10_5 and a_gguf_that_we'),
    Fault('gguf_scale_without_type', 'gguf_format.py', "config.get('rope.scaling.type', 'linear')",
          "config.get('rope.scaling.type', 'none')", 'test_10_5 and stretched'),
    Fault('nan_is_read', 'convert.py', 'if not view.sum(dtype=torch.float32).isfinite():', 'if False:',
          'test_10_5 and damaged_directory'),
    Fault('one_prefix_is_stripped', 'convert.py', 'while match := WRAPPERS.search(short):',
          'if match := WRAPPERS.search(short):', 'test_10_5 and prefixes'),
    Fault('one_of_two_is_taken', 'convert.py', 'if short in plain:', 'if False:', 'test_10_5 and ambiguous'),
    Fault('tied_under_the_head', 'convert.py', "elif args['tie_weights'] and 'lm_head.weight' in sources:",
          'elif False:', 'test_10_5 and prefixes'),
    Fault('dense_beside_experts', 'convert.py', "if config.n_expert and any('.mlp.' in name for name in names):",
          'if False:', 'test_6_7 and beside_experts'),
    Fault('layer_0_alone', 'convert.py', '(value or type(value) is int) and key not', 'value and key not',
          'test_6_7 and refused_by_its_key'),
    Fault('lora_on_some_layers', 'convert.py', 'for name in sorted(part_of.keys() - found):', 'for name in ():',
          'test_6_7 and refused_by_its_key'),
    Fault('lora_on_embeddings', 'convert.py', 'if strange := sorted(found - part_of.keys()):',
          'if strange := ():', 'test_6_7 and refused_by_its_key'),
    Fault('qkv_order', 'convert.py', "for c, view in zip('qkv', tensor.split(rows), strict=True)]",
          "for c, view in zip('qvk', tensor.split(rows), strict=True)]",
          'test_10_5 and same_here and llama and not gguf'),
    Fault('another_base_is_taken', 'load.py', "['sha256'] != base['sha256']:", "['sha256'] == '':",
          'test_6_7 and base_that_is_gone'),
    # train.py
    Fault('evaluation_with_dropout', 'train.py', '    model.eval()\n    for batch in run.counted(',
          '    for batch in run.counted(', 'test_2_4 and dropout'),
    Fault('training_without_dropout', 'train.py', '    model.train()\n    nats, tokens', '    nats, tokens',
          'test_2_4 and dropout_is_on'),
    Fault('validation_on_train_split', 'train.py',
          'score, bits_per_byte, ranges = evaluate(net, val_data,',
          'score, bits_per_byte, ranges = evaluate(net, train_data,', 'test_2_6 and held_out'),
    Fault('resume_replays_batches', 'train.py', "rows_seen = checkpoint.get('rows', tokens_seen // block_size)",
          'rows_seen = 0', 'test_4_3 and resume_is_exact and adamw'),
    Fault('pairs_weigh_alike', 'train.py',
          'weight = train_data.n_targets(first, batch_size) / (n_targets / gradient_accumulation_steps)',
          'weight = 1.0', 'test_1_5 and weigh'),
    Fault('exact_match_of_beginnings', 'train.py', 'sum(answer == [*target, eot] for',
          'sum(answer[:len(target)] == target for', 'test_1_5 and exact_match'),
    # sft.py
    Fault('waits_ignored', 'sft.py', 'max_think_tokens, max_tool_calls, num_waits, wait)',
          'max_think_tokens, max_tool_calls)', 'test_10_4 and draw_answers'),
    Fault('rows_weigh_alike', 'sft.py',
          'weight = train_data.n_targets(first, batch_size) / (n_targets / gradient_accumulation_steps)',
          'weight = 1.0', 'test_6_6 and weighs_alike'),
    Fault('sft_evaluation_with_dropout', 'sft.py',
          '    model.eval()\n    nats, counts = run.distributed_map',
          '    nats, counts = run.distributed_map', 'test_6_6 and dropout'),
    Fault('eval_split_ignored', 'sft.py',
          'data = load_chat_data(run, dataset, eval_split,',
          "data = load_chat_data(run, dataset, 'val',", 'test_6_6 and split_asked'),
    Fault('curriculum_forgotten', 'sft.py',
          'train_data.set_curriculum(difficulty.numpy(), int(paced_items * rows_per_item), curriculum_start)',
          'pass', 'test_6_6 and curriculum_changes'),
    # reward.py
    Fault('bradley_terry_sign', 'reward.py', 'F.logsigmoid(chosen - rejected - margins)',
          'F.logsigmoid(rejected - chosen - margins)', 'test_7_2'),
    Fault('margins_sign', 'reward.py', 'F.logsigmoid(chosen - rejected - margins)',
          'F.logsigmoid(chosen - rejected + margins)', 'test_7_2'),
    Fault('center_of_differences', 'reward.py', '(chosen + rejected).square()', '(chosen - rejected).square()',
          'test_7_2'),
    Fault('flipped_labels_are_true', 'reward.py', 'true_hits = [1 - hit if wrong else hit',
          'true_hits = [hit if wrong else hit', 'test_7_4 and learns'),
    Fault('score_bias_sign', 'reward.py', "bias = -metrics['reward/mean'] / std",
          "bias = metrics['reward/mean'] / std", 'test_7_4 and learns'),
    Fault('dropout_of_the_base', 'reward.py', "given if resume_from else {'dropout': 0.0} | given", 'given',
          'test_7_4 and dropout_of_the_base'),
    Fault('steps_without_labels_count', 'reward.py', "reduction='none') * labelled", "reduction='none')", 'test_7_2'),
    Fault('scores_with_dropout', 'reward.py', '    net.eval()\n    found =', '    found =',
          'test_7_4 and dropout'),
    # dpo.py
    Fault('beta_ignored', 'dpo.py', 'x = beta * h -', 'x = h -', 'test_10_1 and formulas'),
    Fault('label_smoothing_swapped', 'dpo.py',
          '-(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)',
          '-label_smoothing * F.logsigmoid(x) - (1 - label_smoothing) * F.logsigmoid(-x)',
          'test_10_1 and formulas'),
    Fault('ipo_target', 'dpo.py', '(h - 1 / (2 * beta)).square()', '(h - 1 / beta).square()',
          'test_10_1 and formulas'),
    Fault('reward_margin_sign', 'dpo.py', 'hits = ((torch.sign(margins) + 1) / 2).tolist()',
          'hits = ((torch.sign(-margins) + 1) / 2).tolist()', 'test_10_1 and preferred'),
    Fault('dpo_reference_with_dropout', 'dpo.py',
          '    net.eval()\n    logps = run.distributed_map',
          '    logps = run.distributed_map', 'test_10_1 and dropout'),
    Fault('answer_shifted', 'dpo.py', 'np.where(is_answer[:, 1:], idx[:, 1:], -100)',
          'np.where(is_answer[:, 1:], idx[:, :-1], -100)', 'test_10_1 and those_of_the_model'),
    Fault('sft_term_sign', 'dpo.py', 'losses + sft_coef * cross_entropy', 'losses - sft_coef * cross_entropy',
          'test_10_1 and cross_entropy'),
    Fault('kto_baseline_of_own_answers', 'dpo.py', 'examples[-1:] + examples[:-1]', 'examples',
          'test_10_1 and the_baseline_of_kto'),
    Fault('kto_baseline_negative', 'dpo.py', 'return max(0.0, float(', 'return max(-1e9, float(',
          'test_10_1 and the_baseline_of_kto'),
    Fault('kto_labels_swapped', 'dpo.py', 'labels * desirable_weight + (1 - labels) * undesirable_weight',
          'labels * undesirable_weight + (1 - labels) * desirable_weight', 'test_10_1 and kto_is'),
    Fault('worst_answer_is_the_best', 'dpo.py', 'low.argmin(1)', 'low.argmax(1)', 'test_10_1 and best_and_the_worst'),
    Fault('dpo_dropout_of_the_base', 'dpo.py', "{'dropout': 0.0, 'lora_dropout': 0.0} | given", 'given',
          'test_10_1 and dropout_of_the_base'),
    Fault('dpo_learns_results_of_tools', 'dpo.py', 'mask[:len(ids)]', 'np.ones(len(ids), bool)',
          'test_10_1 and results_of_calls'),
    # ppo.py
    Fault('gae_off_by_one', 'ppo.py',
          'gamma * next_value - values[:, t]',
          'gamma * values[:, t] - values[:, t]', 'test_8_2'),
    Fault('gae_lambda', 'ppo.py',
          '+ gamma * gae_lambda * next_advantage',
          '+ gae_lambda * next_advantage', 'test_8_2'),
    Fault('gae_over_forced_tokens', 'ppo.py',
          'next_advantage = torch.where(is_action, advantage, next_advantage)',
          'next_advantage = advantage', 'test_8_2'),
    Fault('returns_without_values', 'ppo.py',
          'return advantages, (advantages + values) * mask',
          'return advantages, advantages * mask', 'test_8_2'),
    Fault('whitened_with_padding', 'ppo.py', '(x * mask).sum() / mask.sum().clamp(min=1)',
          '(x * mask).sum() / mask.numel()', 'test_8_2'),
    Fault('ratio_clipped_above_only', 'ppo.py', '-ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages',
          '-ratio.clamp(max=1 + clip_eps) * advantages', 'test_8_2'),
    Fault('value_clip_around_returns', 'ppo.py', 'clipped = (old_values + moved.clamp(',
          'clipped = (returns + moved.clamp(', 'test_8_2'),
    Fault('kl_is_paid_out', 'ppo.py',
          'rewards = -kl_coef * kl * response_mask',
          'rewards = kl_coef * kl * response_mask', 'test_8_2'),
    Fault('kl_controller_sign', 'ppo.py', 'max(-0.2, kl / target - 1)', 'max(-0.2, 1 - kl / target)',
          'test_8_2'),
    Fault('eos_penalty_sign', 'ppo.py', '- eos_penalty * ~answers.ended', '+ eos_penalty * ~answers.ended',
          'test_8_3 and knobs_of_ppo'),
    Fault('vf_coef_ignored', 'ppo.py',
          'total = losses + vf_coef * errors',
          'total = losses + errors', 'test_8_3 and knobs_of_ppo'),
    Fault('mean_of_micro_batches', 'ppo.py', '(x.detach() * mask).sum() / tokens_per_micro_batch for',
          'masked_mean(x.detach(), mask) for', 'test_9_2 and over_tokens and ppo'),
    Fault('ppo_weights_ignored', 'ppo.py', 'losses = losses * weights if tis_cap else losses', 'losses = losses',
          'test_9_2 and importance and ppo'),
    Fault('ppo_entropy_sign', 'ppo.py',
          'total = total - entropy_coef * entropies',
          'total = total + entropy_coef * entropies', 'test_8_3 and knobs_of_ppo'),
    Fault('new_loss_reads_too_few', 'grpo.py', 'loss_type not in SKIPS_ZERO_ADVANTAGE:', "loss_type == '':",
          'test_8_3 and new_loss_of_grpo'),
    Fault('helper_reads_a_knob', 'runtime.py', '        self.config, self._step = config, step or 0\n',
          "        self.config, self._step = config, step or 0\n        config['wandb_log']\n",
          'test_8_3 and hacked and train'),
    Fault('ranges_are_for_all', 'runtime.py', '        if name not in config:\n            continue\n', '',
          'test_8_3 and hacked and sft'),
    Fault('best_by_reward_sign', 'ppo.py',
          "score = -metrics.get('val/reward', -math.inf)",
          "score = metrics.get('val/reward', -math.inf)", 'test_8_3 and highest_reward and ppo'),
    # grpo.py
    Fault('advantages_of_all', 'grpo.py', 'keepdim=True) / (n - 1).clamp(min=1)', 'keepdim=True) / n.clamp(min=1)',
          'test_9_1 and hand'),
    Fault('leave_one_out_of_n', 'grpo.py', 'centred * n / (n - 1).clamp(min=1)', 'centred', 'test_9_1 and rloo'),
    Fault('batch_of_groups', 'grpo.py', "if baseline == 'batch' else totals", 'if False else totals',
          'test_9_1 and rloo'),
    Fault('delta_ignored', 'grpo.py', 'ratio.clamp(max=delta) * advantages', 'ratio * advantages',
          'test_9_1 and delta'),
    Fault('weights_ignored', 'grpo.py', '(losses * weights).expand_as(mask)', 'losses.expand_as(mask)',
          'test_9_2 and importance and grpo'),
    Fault('clip_of_ppo_for_all', 'grpo.py', 'eps_low, eps_high = LOSSES[loss_type]', 'eps_low, eps_high = 0.2, 0.2',
          'test_9_2 and each_loss'),
    Fault('drawn_after_the_updates', 'grpo.py', 'while len(queue) <= rollout_lag:', 'while len(queue) < 1:',
          'test_9_2 and lag'),
    Fault('queue_not_saved', 'grpo.py', "[groups.state() for groups in queue]", '[]', 'test_8_3 and resumes and lag'),
    Fault('advantages_not_centred', 'grpo.py',
          'centred = (values - means) * valid', 'centred = values * valid', 'test_9_1 and hand'),
    Fault('equal_rewards_round', 'grpo.py', ' * valid * has_spread(groups)[:, None]', ' * valid', 'test_9_1 and hand'),
    Fault('k3_off_the_mask', 'grpo.py', 'kl_terms(logprobs * mask, ref_logprobs * mask,',
          'kl_terms(logprobs, ref_logprobs,', 'test_9_1 and formulas'),
    Fault('clip_eps_high_ignored', 'grpo.py', 'low, high = 1 - clip_eps, 1 + clip_eps_high',
          'low, high = 1 - clip_eps, 1 + clip_eps', 'test_9_1 and formulas'),
    Fault('grpo_kl_sign', 'grpo.py', 'losses = losses + kl_coef * k3', 'losses = losses - kl_coef * k3',
          'test_9_1 and formulas'),
    Fault('grpo_entropy_sign', 'grpo.py', 'losses = losses - entropy_coef * entropies',
          'losses = losses + entropy_coef * entropies', 'test_9_1 and formulas'),
    Fault('padding_in_answers_mean', 'grpo.py', '(losses.sum(1) / mask.sum(1).clamp(min=1)).sum()',
          'losses.mean(1).sum()', 'test_9_1 and formulas'),
    Fault('mask_truncated_ignored', 'grpo.py', '    if mask_truncated:\n', '    if False:\n',
          'test_8_3 and masked'),
    # serve.py
    Fault('probabilities_of_what_is_taken_back', 'serve.py', 'del row.logprobs[len(row.held):]', 'row.logprobs[:0]',
          'test_10_6_what_is_taken'),
    Fault('ends_with_the_first_of_several', 'serve.py', 'if row.done and not row.logprobs or row.text.stopped:',
          'if row.done or row.text.stopped:', 'test_10_6_what_is_taken'),
    # progress.py
    Fault('progress_at_once', 'progress.py', 'if now - self.last >= PAUSES[self.stream.isatty()]:', 'if True:',
          'test_0_1_a_progress'),
    Fault('progress_of_each_process', 'progress.py', "if os.environ.get('RANK', '0') == '0':", 'if True:',
          'test_0_1_a_progress'),
    Fault('progress_amid_the_text', 'convert.py', "'tensors', stream=sys.stderr)", "'tensors')",
          'test_0_1_what_is_read'),
    Fault('progress_left_standing', 'progress.py', "print(on_line(''), end='\\r', file=self.stream, flush=True)",
          'pass', 'test_0_1_a_progress'),
    # rollout.py
    Fault('weights_upside_down', 'rollout.py', 'log_ratio = logprobs - sampled', 'log_ratio = sampled - logprobs',
          'test_9_1 and importance'),
    Fault('k3_sign', 'rollout.py', 'else np.exp(log_r)) - 1 - log_r', 'else np.exp(log_r)) - 1 + log_r',
          'test_8_2 and estimates'),
    Fault('k1_sign', 'rollout.py', "    if kind == 'k1':\n        return -log_r",
          "    if kind == 'k1':\n        return log_r", 'test_8_2 and estimates'),
    Fault('read_at_temperature_1', 'rollout.py', 'losses_and_entropies, temperature=temperature, entropies',
          'losses_and_entropies, entropies', 'test_8_1 and recorded'),
    Fault('answers_one_further', 'rollout.py', 'positions[b, span] = np.arange(len(ids)) + len(prompt) - 1',
          'positions[b, span] = np.arange(len(ids)) + len(prompt)', 'test_8_1 and share_their_prompt'),
    Fault('answers_see_each_other', 'rollout.py',
          'seen = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)',
          'seen = segments[:, None, :] >= 0', 'test_8_1 and share_their_prompt'),
    Fault('forced_tokens_learned', 'rollout.py',
          'targets[b, span] = np.where(part.response_mask[i, :len(ids)], ids, -100)',
          'targets[b, span] = ids', 'test_8_1 and forced'),
    Fault('weights_of_rewards', 'rollout.py',
          'return table @ np.array([weight for weight, _, _ in self.terms])', 'return table.sum(1)',
          'test_8_1 and rewards_are'),
    Fault('cut_one_further', 'rollout.py',
          'inside = np.arange(self.response_mask.shape[1]) < lengths[:, None]',
          'inside = np.arange(self.response_mask.shape[1]) <= lengths[:, None]', 'test_8_1 and cut'),
    Fault('thought_one_longer', 'rollout.py', 'end = len(ids) - self.max_think_tokens',
          'end = len(ids) - self.max_think_tokens - 1', 'test_10_3 and budget'),
    Fault('wait_beyond_the_budget', 'rollout.py', ' or self.max_think_tokens and self._closing(ids[:-count]):', ':',
          'test_10_3 and straddle'),
    Fault('waits_without_end', 'generate.py', 'if self.replaced == forced.times:', 'if False:',
          'test_10_3 and goes_on'),
    Fault('cache_keeps_what_is_taken_back', 'generate.py', 'self.cache.lengths[i] -= back', 'pass',
          'test_10_3 and goes_on'),
    Fault('given_out_too_early', 'generate.py', 'known = len(row.held) - held',
          'known = len(row.held)', 'test_10_3 and goes_on'),
    Fault('thought_with_its_answer', 'best_of_n.py', "start + len(rest.partition(b'</think>')[0])", 'start + len(rest)',
          'test_10_3 and thinking_is_worth'),
    Fault('vote_less_chooser', 'best_of_n.py', "by_prompt(seeds, -1) - by_prompt(mine['vote'], -1)",
          "by_prompt(mine['vote'], -1) - by_prompt(seeds, -1)", 'test_8_3 and choosers'),
    # tools.py
    Fault('calls_without_limit', 'rollout.py', 'if len(turns) < self.max_tool_calls else []', 'if True else []',
          'test_10_4 and different_rounds'),
    Fault('result_ends_the_answer', 'generate.py', 'self.done = token in stop_ids and not self.forced or',
          'self.done = token in stop_ids or', 'test_10_4 and different_rounds'),
    Fault('listed_tools_ignored', 'tools.py', 'known = names_of(listed) if listed else list(self.functions)',
          'known = list(self.functions)', 'test_10_4 and lists_its_tools'),
    Fault('call_kept_in_prompt', 'tools.py', "asked[-1]['role'] in ('assistant', 'tool')",
          "asked[-1]['role'] == 'tool'", 'test_10_4 and lists_its_tools'),
    Fault('true_is_a_number', 'tools.py', "isinstance(value, bool) <= (kind == 'boolean')", 'True',
          'test_10_4 and whatever'),
    # distill.py
    Fault('kl_direction', 'distill.py', 'return (p * (log_p - log_q)).sum(-1), q - p',
          'return (q * (log_q - log_p)).sum(-1), q - p', 'test_10_2 and divergences'),
    Fault('temperature_not_squared', 'distill.py', 'self.alpha * self.t ** 2 * divergences',
          'self.alpha * self.t * divergences', 'test_10_2 and dense'),
    Fault('rest_bucket', 'distill.py', 'logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)',
          'logprobs.logsumexp(-1, keepdim=True)', 'test_10_2 and bucket'),
    Fault('first_layers', 'distill.py', '[i * config.n_layer // n_layer for i in range(n_layer)]',
          '[i for i in range(n_layer)]', 'test_10_2 and evenly_spaced'),
    Fault('teacher_with_dropout', 'distill.py', 'model.requires_grad_(False).eval()',
          'model.requires_grad_(False)', 'test_10_2 and dropout'),
    Fault('wrong_answers_kept', 'distill.py',
          "if is_correct(row, answer_of(row))", 'if answer_of(row)',
          'test_10_2 and only_right'),
    # sample.py
    Fault('system_message_dropped', 'sample.py', 'del seen[first:ends[1]]', 'del seen[:ends[1]]',
          'test_2_5 and system'),
    Fault('chat_runs_on', 'sample.py', 'return tokenizer.turn_ids if chat else tokenizer.stop_ids',
          'return tokenizer.stop_ids', 'test_2_5 and ends_with_its_turn'),
    Fault('probabilities_shifted', 'sample.py', 'logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])',
          'logprobs[1:].gather(1, torch.tensor(ids[1:])[:, None])', 'test_2_6 and probability'),
    Fault('worst_of_several', 'sample.py', 'first = int(scores.argmax())', 'first = int(scores.argmin())',
          'test_10_3 and best_of'),
    Fault('context_forgotten', 'sample.py', 'context = ids + out[0]', 'context = ids',
          'test_2_5 and keeps_the_context'),
    Fault('bos_forgotten', 'sample.py', 'ids = [tokenizer.bos, *ids]', 'pass', 'test_2_5 and begins_with'),
    # bench.py
    Fault('overlap_counts_twice', 'bench.py', 'total += max(0.0, finish - max(begin, end))',
          'total += finish - begin', 'test_0_4 and overlap'),
    # plot.py
    Fault('sweep_pooled', 'plot.py', "if why or len(alike) == 1 else", 'if len(alike) == 1 else',
          'test_0_4_several'),
    Fault('t_interval', 'plot.py', 'statistics.stdev(values) / len(values) ** 0.5 * quantile',
          'statistics.stdev(values) / len(values) * quantile', 'test_3_6 and students'),
    # load.py
    Fault('damaged_weights_taken', 'load.py', "and about['sum'] == _sum_of(tensors)", '',
          'test_10_5_dequantised'),
    # pipeline.py
    Fault('stale_stages_kept', 'pipeline.py', 'hashlib.sha256(path.read_bytes()).hexdigest()', "''",
          'test_0_4 and not_done'),
    Fault('finished_run_starts_over', 'pipeline.py', "f'{command} --init_from=auto'", "f'{command}'",
          'test_0_4 and not_done'),
    Fault('other_run_goes_on', 'pipeline.py', 'aside = None if same else move_aside(run)', 'aside = None',
          'test_0_4 and not_done'),
    # report.py
    Fault('report_before_is_after', 'report.py', "('before', found[0])", "('before', found[-1])",
          'test_0_4_every_stage and sft'),
    Fault('report_counts_evaluations', 'report.py', "plot.points(rows, 'seconds', 'tok_per_sec')",
          "[(row['seconds'], row.get('tok_per_sec', 0)) for row in rows if 'val/loss' in row]",
          'test_0_4_every_stage and sft'),
    Fault('starts_of_earlier_runs', 'runtime.py', "'summary.json', 'starts.jsonl', 'report.md',",
          "'summary.json', 'report.md',", 'test_0_4_a_report'),
    Fault('ratio_of_means', 'grade.py', '(x - ratio * count) ** 2', '(x - ratio * total / n) ** 2',
          'test_0_4_intervals_of'),
    # scaling.py
    Fault('prediction_after_the_run', 'bench.py', '    law, _ = scaling.fit(n, d, losses)\n',
          '    climbed(its_flags)\n    law, _ = scaling.fit(n, d, losses)\n', 'test_0_4_a_prediction'),
    Fault('prediction_is_rewritten', 'bench.py', '    if begun:\n', '    if not made:\n', 'test_0_4_a_prediction'),
    Fault('exponents_swapped', 'scaling.py', 'return self.b / (self.a + self.b)', 'return self.a / (self.a + self.b)',
          'test_0_4_a_scaling'),
    Fault('residuals_forgotten', 'scaling.py', 'law.loss(n, d) * np.exp(row)', 'law.loss(n, d) * np.exp(0 * row)',
          'test_0_4_no_law'),
    # evaluate.py, and its statistics
    Fault('evaluate_prefix_too_long', 'evaluate.py', 'min(len(ids) - n - 1 for ids, n in texts)))',
          'min(len(ids) - n - 1 for ids, n in texts[:1])))', 'test_10_7 and transformers'),
    Fault('evaluate_ending_off_by_one', 'evaluate.py', 'row[len(tail) - n:len(tail)]', 'row[-n:]',
          'test_10_7 and transformers'),
    Fault('evaluate_padding_leaves_context', 'evaluate.py', ' or known + shared + rest > block_size + 1', '',
          'test_10_7 and bits_per_byte'),
    Fault('evaluate_blank_before_ending', 'evaluate.py', 'cut = len(context.rstrip()) if ending else len(context)',
          'cut = len(context)', 'test_10_7 and pairs_are_cut'),
    Fault('evaluate_mixes_prompts', 'evaluate.py', "result['prompt'] == prompt and ", '', 'test_10_7 and not_mixed'),
    Fault('evaluate_norm_per_token', 'evaluate.py', "[x / len(choice) for x, choice in zip(logprobs, row['choices'], "
          'strict=True)]', '[logprob / n for logprob, _, n in results]', 'test_10_7 and by_hand'),
    Fault('evaluate_stride_repeats', 'evaluate.py', 'n = min(block_size if done == 1 else stride,',
          'n = min(stride if done == 1 else block_size,', 'test_10_7 and windows'),
    Fault('compared_across_prompts', 'grade.py', "if len({text.split()[0] for text in [*ours, *theirs]}) != 1:",
          'if False:', 'test_6_4_two_runs'),
    Fault('mcnemar_one_sided', 'grade.py', 'return min(1.0, 2 * total / 2 ** n)', 'return min(1.0, total / 2 ** n)',
          'test_6_4_mcnemars'),
    Fault('interval_leaves_shares', 'grade.py', 'shares = all(0 <= v <= 1 for v in values)', 'shares = False',
          'test_6_4_intervals'),
    # check_docs.py
    Fault('docs_flags_unread', 'check_docs.py', 'configure, [script, *args]', 'configure, [script]', 'a_wrong_command'),
    Fault('docs_status', 'check_docs.py', 'raise SystemExit(1)', 'pass', 'commands_of_the_docs_run'),
    # ---- serving
    Fault('serve_penalty_of_prompt', 'serve.py', 'wanted = penalise(wanted, [row.answer for row in mine], *penalties)',
          'wanted = penalise(wanted, [row.ids for row in mine], *penalties)', 'test_10_6'),
    Fault('serve_logprobs_after_bias', 'serve.py', 'mine, wanted = [rows[i] for i in which], logits[which]  # a copy',
          'mine, wanted = [rows[i] for i in which], logits', 'test_10_6'),
    Fault('serve_stop_not_held_back', 'serve.py', 'len(self.held) - held_back(self.held, words)', 'len(self.held)',
          'test_10_6'),
    Fault('serve_gone_client_keeps_row', 'serve.py', '            row.done |= row.request.cancelled\n',
          '            pass\n', 'test_10_6'),
    Fault('serve_last_token_known', 'serve.py', 'min(len(ids) - 1, len(known)))', 'min(len(ids), len(known)))',
          'test_10_6'),
    Fault('serve_no_nodelay', 'serve.py', 'socket.IPPROTO_TCP)\n    try:', '0)\n    try:', 'test_10_6'),
    Fault('serve_joining_rows_uncounted', 'serve.py', 'self.batch.rows + (joining[0] if joining else []) +',
          'self.batch.rows +', 'test_10_6'),
    Fault('serve_one_chunk', 'serve.py', 'admit_in_parts(rows, shared, PART, cache)',
          'admit_in_parts(rows, shared, 0, cache)', 'test_10_6'),
    Fault('serve_key_prefix', 'serve.py', "hmac.compare_digest(given.encode('latin-1'), self.secret.encode())",
          'True', 'test_10_6'),
    Fault('serve_long_prompt_blocks', 'serve.py', 'rows, shared, cache = self.next_rows(most=PART)',
          'rows, shared, cache = [], 1, None', 'test_10_6'),
    Fault('serve_taken_not_told', 'serve.py', 'for row in self.rows()] + self.taken', 'for row in self.rows()]',
          'test_10_6 and errors_have'),
    Fault('serve_rebinding', 'serve.py', "not in ('127.0.0.1', 'localhost', '[::1]'):", 'in ():', 'test_10_6'),
    Fault('cache_part_shares', 'generate.py', '[[x[row:row + 1, :, :length].clone() for x in stored]',
          '[[x[:1, :, :length].clone() for x in stored]', 'test_10_6'),
    Fault('penalty_once', 'generate.py', 'row[ids] -= presence + frequency * times', 'row[ids] -= presence + frequency',
          'test_10_6'),
    # serve.html
    Fault('page_reads_html', 'serve.html', 'body.textContent = message.content', 'body.innerHTML = message.content',
          'test_10_6 and anything'),
    Fault('page_does_not_stop', 'serve.html', "$('stop').onclick = () => { running?.abort(); composer.focus() }",
          "$('stop').onclick = () => { composer.focus() }", 'test_10_6 and stop_button'),
    Fault('page_sends_while_composing', 'serve.html', '|| event.isComposing || event.keyCode === 229) return',
          ') return', 'test_10_6 and while_it_comes'),
    Fault('page_leaves_thoughts_open', 'serve.html', 'thought.open = false', 'thought.open = true',
          'test_10_6 and folded'),
    Fault('page_shades_by_the_last_token', 'serve.html', '(sum, logprob) => sum + logprob', '(_, logprob) => logprob',
          'test_10_6 and of_a_token'),
    Fault('page_sends_unanswered_questions', 'serve.html', 'return all[i + 1]?.blocks.length === 0 ?', 'return false ?',
          'test_10_6 and stand_in_place'),
    Fault('page_follows_in_any_case', 'serve.html', 'else if (log.scrollTop < lastTop) follow = false',
          'else if (log.scrollTop < lastTop) follow = true', 'test_10_6 and follows'),
]


def make_tree(tree, fault=None):
    """Copies the project to tree, with the fault in it -> '' or what is wrong with the fault."""
    shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND)  # with __pycache__: what is compiled already need not be again
    if fault is None:
        return ''
    path = tree / fault.file
    source = path.read_text(encoding='utf-8')
    if (count := source.count(fault.old)) != 1:
        return f'its text is {count} times in {fault.file}'
    source = source.replace(fault.old, fault.new)
    path.write_text(source, encoding='utf-8')
    try:
        if path.suffix == '.py':
            compile(source, fault.file, 'exec')
    except SyntaxError as error:
        return f'it makes a syntax error: {error}'
    return ''


class Trial:
    """A run of pytest in a tree of its own, in a process forked from this one, which has imported what takes long."""

    def __init__(self, fault, selection, *options):
        self.fault, self.selection, self.began = fault, selection, time.monotonic()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder, self.pid = Path(self.folder.name), 0
        self.output = folder / 'output'
        self.output.touch()
        self.misfit = make_tree(folder / 'tree', fault)
        if self.misfit:
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        os.chdir(folder / 'tree')
        sys.path[0] = str(folder / 'tree')
        os.environ['OMP_NUM_THREADS'] = '1'  # a core for each trial
        with open(self.output, 'wb') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # plain asserts: no verdict needs more, and rewriting them takes longer than most tests
        status = pytest.main(['-q', '-p', 'no:cacheprovider', '--assert=plain', '--override-ini=addopts=',
                              f'--basetemp={folder / "tmp"}', *options, 'test_all.py',
                              *(['-k', selection] if selection else [])])
        sys.stdout.flush()
        os._exit(status)

    def ended(self):
        """None while the tests run, then the exit status of pytest; -1 where they had to be stopped."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done and time.monotonic() - self.began < PATIENCE:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with the processes that tests have started
        if not done:
            os.waitpid(self.pid, 0)
            return -1
        return os.waitstatus_to_exitcode(status)

    def verdict(self, status):
        """What the exit status and the output of pytest say of the fault -> (verdict, why)."""
        printed = self.output.read_text(encoding='utf-8', errors='replace')
        last = (printed.strip().splitlines() or ['nothing was printed'])[-1]
        failed = re.findall(r'^(?:FAILED|ERROR) test_all\.py::(\S+)', printed, re.M)
        slip = SLIPS.search(printed)
        if status == 0:
            return 'NOT CAUGHT', last
        if status == 5:
            return 'NOT CAUGHT', f'no test is selected by {self.selection!r}'
        if status == -1:
            return 'BROKEN', f'no end after {PATIENCE} seconds'
        if status != 1 or not failed or slip:
            return 'BROKEN', f'pytest ended with status {status}: {slip[1] if slip else last}'
        return 'caught', f'by {", ".join(failed)}'


def main():
    all_tests, names = '--all-tests' in sys.argv[1:], [word for word in sys.argv[1:] if word != '--all-tests']
    unknown = sorted(set(names) - {fault.name for fault in FAULTS})
    if unknown:
        known = [fault.name for fault in FAULTS]
        near = difflib.get_close_matches(unknown[0], known) or known
        sys.exit(f'error: {unknown[0]!r} is no fault: {", ".join(near)}')
    faults = [fault for fault in FAULTS if not names or fault.name in names]
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    # first, and without a fault, the tests of all faults, which must pass
    union = ' or '.join(dict.fromkeys(f'({fault.tests})' for fault in faults))
    waiting = [(None, union), *((fault, None if all_tests else fault.tests) for fault in faults)]
    running, counts, sound, began = [], Counter(), '', time.monotonic()
    while waiting or running:
        while waiting and len(running) < os.cpu_count():
            fault, selection = waiting.pop(0)
            running.append(Trial(fault, selection, *(['-x'] if fault else [])))
        time.sleep(0.05)
        for trial in list(running):
            status = None
            if not trial.misfit and (status := trial.ended()) is None:
                continue
            running.remove(trial)
            verdict, why = ('DOES NOT APPLY', trial.misfit) if trial.misfit else trial.verdict(status)
            trial.folder.cleanup()
            seconds = time.monotonic() - trial.began
            if trial.fault is None:
                sound = 'all pass' if status == 0 else f'{verdict} {why}'
                continue
            counts[verdict] += 1
            print(f'{verdict:<14} {trial.fault.file:<15} {trial.fault.name:<30} {seconds:4.0f} s  {why}', flush=True)
    summary = ', '.join(f'{n} {verdict}' for verdict, n in counts.most_common())
    print(f'{len(faults)} faults in {time.monotonic() - began:.0f} s: {summary}; without any fault: {sound}')
    sys.exit(0 if counts['caught'] == len(faults) and sound == 'all pass' else 1)


if __name__ == '__main__':
    main()
