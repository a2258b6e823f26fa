"""Finetuning: pools of images, a GAN model, a few pseudo ground truths, and a loop that can be killed at any moment.

Gives `training.pools.Pools`, `training.plan.plan_finetune` and `training.loop.finetune`.
"""
