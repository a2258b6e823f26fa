"""Finetune a GAN model on pseudo-GTs, or train its MSE twin, in a loop that may be killed at any moment.

Gives `training.pools.Pools`, `training.plan.plan_finetune`, `training.twin.plan_twin` and `training.loop.finetune`.
"""
