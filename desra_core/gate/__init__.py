"""Whether a finetuned model may replace the current one: judging images, the verdict, the registry of models."""
