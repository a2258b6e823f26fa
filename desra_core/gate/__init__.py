"""Whether a finetuned model may replace the current one: judging images, the verdict, the registry of models.

Gives `gate.criteria.decide`, `gate.comparison.plan_comparison` and `gate.model_registry.promote`.
"""
