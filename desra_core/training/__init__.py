"""Finetune a GAN model on pseudo-GTs of the training pool, in a loop that may be killed at any moment.

Gives `training.pools.Pools`, `training.plan.plan_finetune` and `training.loop.finetune`.
"""
